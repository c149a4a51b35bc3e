"""Models of the applications that would be too long for the file of one."""
