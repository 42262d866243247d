"""Readers of files from strangers, fed with bytes that a coverage-guided fuzzer makes up."""
