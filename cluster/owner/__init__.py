"""The process that starts a cluster, owns its actors and declares its layers."""
