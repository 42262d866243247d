"""Read untrusted files safely.

Weights and recipes may come from the web. This package never runs code from a file, reads a path
outside the file's folder, or allocates memory only because a header says so. SECURITY.md lists the
guarantees.
"""
