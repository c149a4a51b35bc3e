"""`expertmesh demo`: a sparse layer trained on real text, served, and swapped under traffic."""
