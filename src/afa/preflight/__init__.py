"""May these experts be ensembled at all, and will they fit? Says so before any work.

`check_sources` reads configurations and headers; `afa.preflight.run` looks into weights as well,
which is what `afa check` and every long command do first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.preflight.compare import compare
from afa.preflight.facts import facts_of, read_facts
from afa.preflight.finding import Finding, require_none_wrong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.experts import Expert
    from afa.single_file import Described

__all__ = ["DescribedSource", "Finding", "check_experts", "check_folders"]


def check_experts(experts: Sequence[Expert], *, allow_duplicates: bool = False) -> None:
    """Refuse experts that are loaded and do not fit each other.

    Args:
        experts: all of them.
        allow_duplicates: whether one may be named twice.

    Raises:
        AfaError: names the first difference, which expert has it, and what it would do.
    """
    facts = [facts_of(expert) for expert in experts]
    require_none_wrong(compare(facts, allow_duplicates=allow_duplicates))


@dataclass(frozen=True)
class DescribedSource:
    """An expert before it is loaded: its source, what describes it, and whether it is a file."""

    name: str
    described: Described
    is_file: bool


def check_folders(experts: Sequence[DescribedSource]) -> None:
    """The same before anything is loaded; equal weights are not seen.

    Args:
        experts: each once.

    Raises:
        AfaError: see `check_experts`.
    """
    facts = [read_facts(each.name, each.described, is_file=each.is_file) for each in experts]
    require_none_wrong(compare(facts))
