"""From recipes to pictures and figures, and pictures that can be made again."""
