"""This machine and its user: run files, name locks, token files, logs, ports, and checks of the set-up."""
