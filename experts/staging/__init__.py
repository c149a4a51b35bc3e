"""Builds a new version beside the old one, verifies it, and checks that memory suffices."""
