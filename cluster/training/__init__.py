"""The trainer: sub-models on their subsets, then the gate, then all together, here or on a cluster."""
