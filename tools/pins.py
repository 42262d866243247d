"""The pins: constraints.txt, and the lock files, which have the same versions with hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packaging.utils import NormalizedName, canonicalize_name

from afa.errors import AfaError
from tools import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CONSTRAINTS = ROOT / "constraints.txt"
#: installed by `make install`: the package's dependencies and those of its extra `dev`
LOCK = ROOT / "requirements.lock"
#: the distributions that extras other than `dev` add
EXTRAS_LOCK = ROOT / "requirements-extras.lock"
TOOLS_LOCK = ROOT / "tools" / "requirements.lock"

_PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;]+)(?: ; (.+?))?(?: \\)?")
_HASH = re.compile(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?")
_BESIDE = re.compile(r"# not on the index: (\S+) sha256:([0-9a-f]{64})")


@dataclass
class Pin:
    """A version of a distribution, the environments that need it, and the hashes of its files.

    Attributes:
        name: Normalized as in PEP 503: lower case, words joined by dashes.
        version: The pinned version.
        marker: The environments that need it; empty for all.
        hashes: SHA-256 of every file of the release that may be installed.
        beside: Files that are not on the package index, and their SHA-256.
    """

    name: NormalizedName
    version: str
    marker: str = ""
    hashes: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)

    def as_text(self) -> str:
        """The pin as lines of a requirements file."""
        above = [f"# not on the index: {file} sha256:{sha}" for file, sha in self.beside.items()]
        first = f"{self.name}=={self.version}" + f" ; {self.marker}" * bool(self.marker)
        hashes = sorted({*self.hashes, *self.beside.values()})
        lines = [first, *(f"    --hash=sha256:{sha}" for sha in hashes)]
        return "\n".join([*above, " \\\n".join(lines)]) + "\n"


Pins = dict[NormalizedName, Pin]


def read_pins(path: Path) -> Pins:
    """Read the pins of a requirements file, by name.

    Raises:
        AfaError: if the file is missing, or a line is neither a pin nor a hash.
    """
    if not path.exists():
        raise AfaError(
            "AFA-TOOL-011", f"The file '{path.name}' does not exist. Write it: make lock"
        )
    pins: Pins = {}
    beside: dict[str, str] = {}
    last = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := _BESIDE.fullmatch(line):
            beside[found[1]] = found[2]
        elif not line or line.startswith("#"):
            continue
        elif found := _PIN.fullmatch(line):
            name = canonicalize_name(found[1])
            last = pins[name] = Pin(name, found[2], found[3] or "", beside=beside)
            beside = {}
        elif last is not None and (found := _HASH.fullmatch(line)):
            last.hashes.append(found[1])
        else:
            raise AfaError(
                "AFA-TOOL-012",
                f"Line {number} of '{path.name}' is '{line[:80]}'. Every line must be a pin or a "
                "hash. Write the file again: make lock",
            )
    return pins
