"""The direct channel: carries rows between a router and its replicas over plain sockets."""
