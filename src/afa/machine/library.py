"""Classes of the libraries, by the names that files give."""

from __future__ import annotations

from typing import Any

from afa.errors import AfaError


def library_class(library: Any, name: str, base: type) -> Any:
    """A class that a folder names, if it is of the expected kind.

    Raises:
        AfaError: the library has none of this name and kind.
    """
    found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AfaError(
            "AFA-MACHINE-003",
            f"A part of a pipeline must be a {base.__name__} that {library.__name__} has; its "
            f"model_index.json names '{name}'. Is the installed version older than the model?",
        )
    return found
