"""A new version is built beside the old one, verified, and kept within memory."""
