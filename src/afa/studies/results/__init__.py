"""The comparison on emoji scenes that docs/results.md shows, from training to page."""
