"""Check experts, data and this machine before any work."""
