"""The one exception that users see."""

#: characters at which a text is broken into lines; names in untrusted files may have some
_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")

#: what libraries raise of a configuration that describes no model
NO_MODEL = (
    *(ArithmeticError, AssertionError, AttributeError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)


class AfaError(ValueError):
    """An error that the user can fix, on one line; the command line prints it and exits with 2.

    Args:
        code: stable name of the error, such as "AFA-LOAD-017": a code is never used for another
            error, and stays when the wording changes. docs/messages.md lists all codes.
        message: what is wrong, what is required, and what fixes it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message.translate(_BREAKS))
        self.code = code
        self.add_note(f"{code}: docs/messages.md lists all errors of afa by their codes.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))
