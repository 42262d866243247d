"""`AfaError`, the exception for users."""

#: line breaks, which names in untrusted files may contain
_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")

#: exceptions of libraries for a configuration that does not describe a model
NO_MODEL = (
    *(ArithmeticError, AssertionError, AttributeError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)


class AfaError(ValueError):
    """An error that the user can fix, on one line; the command line prints it and exits with 2.

    Args:
        code: stable name of the error, such as "AFA-LOAD-017". It does not change with the wording
            and is never used for another error. docs/messages.md lists all codes.
        message: what is wrong, what is required, and what fixes it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message.translate(_BREAKS))
        self.code = code
        self.add_note(f"{code}: docs/messages.md lists all errors of afa by their codes.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))
