"""The commands that train, and that show who trains."""
