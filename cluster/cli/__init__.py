"""The command line: one file a command, and the tables and error lines that they share."""
