"""The digests that versions are named after."""
