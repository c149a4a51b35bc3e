"""Builds an expert from its declaration, and determines shapes and dtypes of its rows."""
