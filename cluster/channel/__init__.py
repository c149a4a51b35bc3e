"""The direct channel that carries rows between a router and its replicas, over sockets of our own."""
