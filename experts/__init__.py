"""What one expert is, and how a host runs it (the ground floor: also errors, protocol and wire)."""
