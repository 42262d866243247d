"""The nodes, one in each file."""
