"""Configuration: mesh.yaml and the settings of a cluster, read, checked, and reported with file and line."""
