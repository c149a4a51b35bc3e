"""Layers of a cluster as modules of torch, with gradients."""
