"""The command line: one file per command, and the tables and error lines they share."""
