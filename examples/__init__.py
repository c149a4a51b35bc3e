"""Applications to start from: `expertmesh examples` lists them, and each is a script, too."""
