"""This machine: processes, memory, environment variables, damaged files."""
