"""`python -m afa` is `afa`."""

from afa.cli import main

main()
