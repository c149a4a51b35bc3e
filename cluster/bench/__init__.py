"""`expertmesh bench`: an open-loop load on a running cluster, and the report of its measurements."""
