"""Placement of experts on devices, in files and over processes, and the exchange of features."""
