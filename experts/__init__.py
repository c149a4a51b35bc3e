"""Experts and the host that runs them; also the base of all packages: errors, protocol and wire format."""
