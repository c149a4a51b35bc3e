"""What every application of `examples/` does alike: seeds, fair comparisons, a live update, a table and a picture."""
