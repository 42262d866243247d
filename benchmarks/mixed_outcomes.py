"""The tables of docs/checkpoints.md about experts of several kinds, from docs/mixed.json.

python -m benchmarks.mixed_outcomes
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.files import read_json
from afa.statistics import mean_interval, paired_difference
from benchmarks.outcomes import clusters_of, replace_between

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from afa.statistics import Interval, Scores

DOCS = Path(__file__).parent.parent / "docs"
FILE, PAGE = "mixed.json", "checkpoints.md"
#: the names of ensembles whose predictions alone are fused end so
PREDICTIONS = ", predictions"
#: those with `training.velocity_loss`
BY_VELOCITY = ", velocity loss"
#: ensembles of equal experts, and of several kinds with the first expert's named first
EQUAL = "velocity alone"
MIXED = ("noise and velocity", "velocity and noise")
#: two U-Nets and a transformer, which have no common features
FAMILIES = f"U-Nets and a transformer{PREDICTIONS}"
#: the rows of merges have this in their name
MERGE = "merge"
#: the group of prompts with objects of two experts, and the column of all others
GROUP, OWN = "mixed", "own domains"


class Outcomes:
    """The outcomes of a comparison.

    Args:
        content: of its file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._rows = content["rows"]
        self._captions = [caption for caption, _ in content["prompts"]]
        self._is_mixed = np.array([group == GROUP for _, group in content["prompts"]])

    def mean(self, name: str, group: str) -> Interval:
        """The share of right pictures, with an interval over pairs of objects and trainings."""
        clusters = clusters_of(self._captions_of(group))
        return mean_interval(self._scores(name, group), is_outcome=True, clusters=clusters)

    def difference(self, name: str, other: str, group: str) -> Interval:
        """The difference of two rows, with its interval."""
        ours, theirs = self._scores(name, group), self._scores(other, group)
        clusters = clusters_of(self._captions_of(group))
        return paired_difference(ours, theirs, clusters=clusters).difference

    @property
    def best_merge(self) -> str:
        """The merge with the most pictures of mixed prompts right."""
        merges = [name for name in self._rows if MERGE in name]
        return max(merges, key=lambda name: self.mean(name, GROUP).mean)

    def table(self) -> Iterator[str]:
        """The shares of right pictures of all rows."""
        yield f"| row | {GROUP} | {OWN} | calls | trainings |"
        yield "|---" * 5 + "|"
        for name, row in self._rows.items():
            count = len(row["both"]) if self._is_ensemble(name) else ""
            shown = f"{self.mean(name, GROUP)} | {self.mean(name, OWN)}"
            yield f"| {name} | {shown} | {row['calls']:.0f} | {count} |"

    def differences(self) -> Iterator[str]:
        """Predictions and features, mixed and equal experts, the loss, and the best merge."""
        yield f"| difference | {GROUP} | {OWN} |"
        yield "|---" * 3 + "|"
        for name, other in self._pairs():
            found = [self.difference(name, other, group) for group in (GROUP, OWN)]
            cells = [f"{each.mean:+.2f} [{each.low:+.2f}, {each.high:+.2f}]" for each in found]
            yield f"| {name} - {other} | {' | '.join(cells)} |"

    def _pairs(self) -> Iterator[tuple[str, str]]:
        ensembles = [name for name in self._rows if self._is_ensemble(name)]
        for name in (EQUAL, *MIXED):
            yield f"{name}{PREDICTIONS}", name
        for name in self._rows:
            if name.endswith(BY_VELOCITY):
                yield name, name.removesuffix(BY_VELOCITY)
        for name in MIXED:
            yield name, EQUAL
            yield f"{name}{PREDICTIONS}", f"{EQUAL}{PREDICTIONS}"
        if FAMILIES in self._rows:
            yield FAMILIES, f"{EQUAL}{PREDICTIONS}"
        for name in ensembles:
            yield name, self.best_merge

    @staticmethod
    def _is_ensemble(name: str) -> bool:
        plain = name.removesuffix(BY_VELOCITY).removesuffix(PREDICTIONS)
        return plain in (EQUAL, *MIXED) or name == FAMILIES

    def _captions_of(self, group: str) -> list[str]:
        wanted = self._is_mixed == (group == GROUP)
        return [caption for caption, want in zip(self._captions, wanted, strict=True) if want]

    def _scores(self, name: str, group: str) -> Scores:
        every = np.array([[float(bit) for bit in bits] for bits in self._rows[name]["both"]])
        return every[:, self._is_mixed == (group == GROUP)]


def write_page(docs: Path) -> None:
    """Replace the tables between the marks of docs/checkpoints.md."""
    outcomes = Outcomes(read_json(docs / FILE))
    lines = [*outcomes.table(), "", *outcomes.differences()]
    replace_between(docs / PAGE, "kinds", lines)


if __name__ == "__main__":
    write_page(DOCS)
