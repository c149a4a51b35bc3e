"""The layer and its mathematics: declaration, dispatch, combine, capacity, balance, and the layer in one process."""
