"""Draw pictures from recipes, reproduce them, and draw figures."""
