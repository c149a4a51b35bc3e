"""Pure decisions about which actors a cluster needs and what runs in each of them."""
