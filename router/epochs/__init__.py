"""Which version of every expert and gate a request runs on: epochs, pins, leases, and the staging of new gates."""
