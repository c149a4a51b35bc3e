"""Commands that compare a running cluster with a file, or change what it declares."""
