"""This machine and this user on it: run files, name locks, token files, logs, ports, and checks of its set-up."""
