"""Readers of the data of the applications."""
