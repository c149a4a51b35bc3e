"""What a version's digits are computed from."""
