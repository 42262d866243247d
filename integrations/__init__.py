"""Parts of afa for other programs, which load them from here."""
