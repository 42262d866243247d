"""Broken machines: what must hold when a disk is full, a process is killed, memory runs out."""
