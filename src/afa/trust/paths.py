"""Paths that a recipe names: in its own folder, in the current one, or where the user allows."""

from __future__ import annotations

import os
from pathlib import Path

from afa.errors import AfaError
from afa.trust.policy import FOLDERS_VARIABLE, policy


def require_within(path: str | Path, folder: Path, said_by: str) -> None:
    """Refuse a path that a recipe has no business with.

    A recipe may come from the web; one that names `../../.ssh` is stopped before it is looked at.

    Args:
        path: absolute.
        folder: of the recipe.
        said_by: where it stands, for the error.

    Raises:
        AfaError: it is in none of the folders that the user has named.
    """
    place = Path(os.path.abspath(path))  # links stay: what a user has linked is the user's
    roots = [folder, Path.cwd(), *policy().folders]
    if not any(place.is_relative_to(Path(os.path.abspath(root))) for root in roots):
        raise AfaError(
            f"{said_by} may name paths in its own folder and in the current one; '{place}' is in "
            f"neither. If you trust it, say so: --allow-folder '{place.parent}', or in the "
            f"environment variable {FOLDERS_VARIABLE}."
        )
