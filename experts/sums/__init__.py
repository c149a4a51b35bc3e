"""Weighted sums in a fixed order, and rows on their way to a device and back."""
