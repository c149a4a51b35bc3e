"""Experiments with a cluster that changes its size: several routers, replicas that come and go, a load that shifts."""
