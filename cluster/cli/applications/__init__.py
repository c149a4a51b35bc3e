"""Commands that show what a mesh is for: the demo and the examples."""
