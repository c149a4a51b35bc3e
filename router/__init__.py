"""Which experts answer a row, and how their answers become one."""
