"""Worlds: bases and experts whose knowledge is set by a short description."""
