"""What survives a restart: the registry of versions and epochs, version folders, and uploads."""
