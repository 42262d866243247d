"""The one exception that users see."""


class AfaError(ValueError):
    """An error the user can act on; the CLI prints its message as one line and exits with 2."""
