"""The processes of a cluster: router, controller and replicas, run in this process or as Ray actors."""
