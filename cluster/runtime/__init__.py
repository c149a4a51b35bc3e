"""Processes: the router's, the controller's and the replicas', started in this process or as Ray actors."""
