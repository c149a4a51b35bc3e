"""Weights files: reads and writes safetensors, and inspects a file before it allocates memory for tensors."""
