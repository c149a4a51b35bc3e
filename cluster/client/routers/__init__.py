"""Which router a call goes to, and the connections to them."""
