"""The one exception that users see."""

#: characters at which a text is broken into lines; names in files from strangers may have some
_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")

#: what libraries raise of a configuration that describes no model
NO_MODEL = (
    *(ArithmeticError, AssertionError, AttributeError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)


class AfaError(ValueError):
    """An error the user can act on, on one line; the CLI prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message.translate(_BREAKS))
