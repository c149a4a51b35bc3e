"""Weighted sums in a fixed order, and copies of rows to a device and back."""
