"""May these experts be ensembled at all, and will they fit? Says so before any work.

`check_sources` reads configurations and headers; `afa.preflight.run` looks into weights as well,
which is what `afa check` and every long command do first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.preflight.compare import compare
from afa.preflight.facts import facts_of, read_facts
from afa.preflight.finding import Finding, require_none_wrong

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from afa.experts import Expert

__all__ = ["Finding", "check_experts", "check_folders"]


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


def check_folders(described: Mapping[str, tuple[Path, bool]]) -> None:
    """The same before anything is loaded; equal weights are not seen.

    Args:
        described: by every expert's source the pipeline's folder that describes it, and whether it
            is a single file.

    Raises:
        AfaError: see `check_experts`.
    """
    facts = [
        read_facts(name, folder, is_file=is_file) for name, (folder, is_file) in described.items()
    ]
    require_none_wrong(compare(facts))
