"""Rivals and bounds that draw in their own way; each file adds one."""
