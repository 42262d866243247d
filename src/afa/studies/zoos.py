"""The zoos whose models studies and benchmarks combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.zoo import EXPERTS, MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Zoo:
    """A base and the experts that were fine-tuned from it.

    Attributes:
        experts: sources of the experts, by domain.
        base: source of their base.
    """

    experts: Mapping[str, str]
    base: str


#: the one in the package
SHIPPED = Zoo({name: f"zoo:{name}" for name in EXPERTS}, "zoo:base")


def transformers(folder: Path) -> Zoo:
    """The zoo in a folder of `afa zoo build --family dit`.

    Raises:
        AfaError: if models are missing.
    """
    missing = [name for name in MODELS if not (folder / name).is_dir()]
    if missing:
        raise AfaError(
            "AFA-STUDY-003",
            f"The zoo '{folder}' lacks {', '.join(missing)}. Build it: afa zoo build {folder} "
            "--family dit.",
        )
    return zoo_in(folder)


def zoo_in(folder: Path) -> Zoo:
    """The zoo in a folder with a base and an expert of each domain, which may be made later."""
    folder = folder.resolve()
    return Zoo({name: str(folder / name) for name in EXPERTS}, str(folder / "base"))
