"""Untrusted files: what of them is read, and how.

Weights come from the web, and so do recipes. Nothing here runs code that a file brings, reads a
path that a file names outside the place it is in, or takes memory because a header says so. What is
promised is in SECURITY.md.
"""
