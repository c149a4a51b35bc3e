"""The rows of the benchmark: what is compared with what, at which sizes, and what is to be reached."""
