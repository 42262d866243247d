"""The distributions of a virtual environment, and their dependencies."""

from __future__ import annotations

from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from afa.errors import AfaError

PROJECT = canonicalize_name("afa")
#: the environment with the package and all extras; `make licences` creates it
EVERYTHING = Path(__file__).parent.parent / ".venv-all"


class Installed:
    """The distributions of a virtual environment, by name.

    Raises:
        AfaError: if the project is not installed there.
    """

    def __init__(self, venv: Path) -> None:
        places = [str(place) for place in venv.glob("lib*/**/site-packages")][:1]
        found = {canonicalize_name(each.name): each for each in distributions(path=places)}
        if PROJECT not in found:
            raise AfaError(
                "AFA-TOOL-003",
                f"afa is not installed in '{venv}'. A virtual environment with afa and all of its "
                "extras is required. Create it: make .venv-all/.installed",
            )
        self.distributions: dict[NormalizedName, Distribution] = found

    def parts(self) -> dict[str, tuple[set[NormalizedName], list[str]]]:
        """Return the project's own dependencies, under `""`, and those that each extra adds.

        If an extra includes other extras, their dependencies are left out and their names listed.
        """
        core = self.needed()
        extras = sorted(self.distributions[PROJECT].metadata.get_all("Provides-Extra") or [])
        added = {extra: self.needed(extra) - core for extra in extras}
        parts: dict[str, tuple[set[NormalizedName], list[str]]] = {"": (core, [])}
        for extra, names in added.items():
            included = [other for other in extras if added[other] and added[other] < names]
            parts[extra] = (names.difference(*(added[other] for other in included)), included)
        return parts

    def needed(self, *extras: str) -> set[NormalizedName]:
        """Return all dependencies of the project with some of its extras, without the project.

        Raises:
            AfaError: if one of them is not installed.
        """
        seen: set[tuple[NormalizedName, str]] = set()
        waiting = [(PROJECT, extra) for extra in ("", *extras)]
        while waiting:
            name, extra = waiting.pop()
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for each in self._asked(name, extra):
                found = canonicalize_name(each.name)
                waiting += [(found, further) for further in ("", *each.extras)]
        return {name for name, _ in seen} - {PROJECT}

    def _asked(self, name: NormalizedName, extra: str) -> list[Requirement]:
        if name not in self.distributions:
            raise AfaError(
                "AFA-TOOL-004",
                f"{name} is not installed. All dependencies of afa and its extras are required. "
                "Install them: make .venv-all/.installed",
            )
        asked = [Requirement(text) for text in self.distributions[name].requires or []]
        return [each for each in asked if not each.marker or each.marker.evaluate({"extra": extra})]
