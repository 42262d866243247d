"""Estimate an ensemble's memory, and choose where to store its experts so that it fits."""
