"""Weights files: reading and writing safetensors, and inspecting a file before anything is allocated."""
