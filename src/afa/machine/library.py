"""Find library classes by names in files."""

from __future__ import annotations

from typing import Any

from afa.errors import AfaError


def library_class(library: Any, name: str, base: type) -> Any:
    """Return the library's class with this name, a subclass of `base`.

    Raises:
        AfaError: if there is none.
    """
    found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AfaError(
            "AFA-MACHINE-003",
            f"model_index.json names '{name}', which is not a {base.__name__} of the installed "
            f"{library.__name__}. If the model is newer, update {library.__name__}.",
        )
    return found
