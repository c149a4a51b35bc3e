"""Training of experts: where they live, exactly once, and on which rows."""
