"""Everything that the page says, computed from the committed outcomes of single pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from afa.files import read_json
from afa.statistics import Interval, Paired, equivalence, mean_interval, paired_difference
from afa.studies.evidence.rows import ORACLE, REAL
from afa.zoo.scenes import parse_caption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from afa.statistics import Clusters, Scores

#: what a comparison of two rows says
Verdict = Literal["above", "below", "equivalent", "not told apart"]
_LEVEL = 0.05


@dataclass(frozen=True)
class Compared:
    """A row against another one on the same prompts.

    Attributes:
        paired: the difference and its sign test, with pairs of objects as clusters.
        verdict: what it says. `above` and `below` need the interval and the sign test;
            `equivalent` needs an equivalence test.
    """

    paired: Paired
    verdict: Verdict


class Outcomes:
    """The outcomes of one test.

    Args:
        content: of a file of `afa.studies.evidence.outcomes`.
        margin: see `EvidenceSettings`.
        num_resamples: of all bootstraps.
    """

    def __init__(self, content: dict[str, Any], margin: float, num_resamples: int) -> None:
        self.content, self._margin, self._num_resamples = content, margin, num_resamples
        self.rows: dict[str, dict[str, Any]] = content["rows"]

    @classmethod
    def read(cls, path: Path, margin: float, num_resamples: int) -> Outcomes:
        """Read a file of outcomes."""
        return cls(read_json(path), margin, num_resamples)

    @cached_property
    def groups(self) -> list[str]:
        """The groups of prompts, in their order."""
        return list(dict.fromkeys(group for _, group in self.content["prompts"]))

    @property
    def own(self) -> list[str]:
        """The groups of one expert's prompts each."""
        return [group for group in self.groups if group not in self.mixed]

    @property
    def mixed(self) -> list[str]:
        """The groups of pairs of two experts."""
        found: list[str] = self.content["mixed"]
        return found

    @property
    def best_merge(self) -> str:
        """The merge that was best on tuning prompts."""
        merges = {
            row: each["score"]
            for row, each in self.content["rivals"].items()
            if "merge" in each["method"]
        }
        return max(merges, key=lambda row: merges[row])

    def places(self, groups: Sequence[str]) -> list[int]:
        """The indices of the prompts of some groups."""
        wanted = set(groups)
        return [n for n, (_, group) in enumerate(self.content["prompts"]) if group in wanted]

    def clusters(self, places: Sequence[int]) -> Clusters:
        """The cluster of each prompt: its pair of objects, in either order."""
        found: list[str] = []
        for place in places:
            scene = parse_caption(self.content["prompts"][place][0])
            found.append("+".join(sorted((scene.left, scene.right))))
        clusters: NDArray[np.int64] = np.unique(found, return_inverse=True)[1].astype(np.int64)
        return clusters

    def scores(self, row: str, groups: Sequence[str], score: str = "both") -> Scores:
        """The scores [replicas, prompts] of a row."""
        places = self.places(groups)
        if score == "clip_t":
            values = np.array(self.rows[row]["clip_t"], dtype=np.float64)
        else:
            listed = self.rows[row]["outcomes"][score]
            values = np.array([[float(bit) for bit in bits] for bits in listed])
        return values[:, places]

    def mean(self, row: str, groups: Sequence[str], score: str = "both") -> Interval:
        """The mean score of a row, with its interval by pairs of objects."""
        return mean_interval(
            self.scores(row, groups, score),
            self._num_resamples,
            is_outcome=score != "clip_t",
            clusters=self.clusters(self.places(groups)),
        )

    def compared(
        self, row: str, other: str, groups: Sequence[str], score: str = "both"
    ) -> Compared:
        """A row against another one."""
        clusters = self.clusters(self.places(groups))
        ours, theirs = self.scores(row, groups, score), self.scores(other, groups, score)
        paired = paired_difference(ours, theirs, self._num_resamples, clusters=clusters)
        is_told = paired.p_value < _LEVEL
        verdict: Verdict = "not told apart"
        if is_told and paired.difference.low > 0:
            verdict = "above"
        elif is_told and paired.difference.high < 0:
            verdict = "below"
        elif equivalence(ours, theirs, self._margin, self._num_resamples, clusters=clusters):
            verdict = "equivalent"
        return Compared(paired, verdict)

    def total(self, row: str) -> int | None:
        """All pictures that a row was trained on; None is unknown."""
        budget: dict[str, int] = self.rows[row]["budget"]
        return sum(budget.values()) if budget else None

    def front(self, cost: Literal["total", "expert_calls"], groups: Sequence[str]) -> list[str]:
        """The rows that no other one beats at the same or a smaller cost, cheapest first.

        Ceilings are none of them, since nobody can choose them.

        Args:
            cost: pictures in all trainings, or expert calls for a picture.
            groups: of the prompts.
        """
        costs = {
            row: self.total(row) if cost == "total" else self.rows[row]["expert_calls"]
            for row in self.rows
            if row not in (ORACLE, REAL)
        }
        known = {row: value for row, value in costs.items() if value is not None}
        means = {row: float(self.scores(row, groups).mean()) for row in known}
        found: list[str] = []
        best = -1.0
        for row in sorted(known, key=lambda row: (known[row], -means[row])):
            if means[row] > best:
                found.append(row)
                best = means[row]
        return found
