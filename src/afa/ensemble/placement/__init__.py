"""Where experts are: devices, processes, files; and how features come together."""
