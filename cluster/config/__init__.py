"""Configuration: reads and checks mesh.yaml and the settings of a cluster, and reports mistakes with file and line."""
