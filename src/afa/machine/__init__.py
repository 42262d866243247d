"""The machine: processes, memory, environment variables, library errors about damaged files."""
