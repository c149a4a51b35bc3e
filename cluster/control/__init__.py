"""The controller: pure decisions about swaps and health, and the turns that carry them out."""
