"""Everything that the page says, computed from the committed outcomes of single pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from afa.files import read_json
from afa.statistics import Interval, Paired, equivalence, holm, mean_interval, paired_difference
from afa.studies.results.rows import ORACLE, POOLED_ROW, REAL, WIDE_ROW
from afa.zoo.scenes import parse_caption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from afa.statistics import Clusters, Scores

#: what a comparison of two rows says
Verdict = Literal["above", "below", "equivalent", "not told apart", "one training"]
_LEVEL = 0.05
#: distances of sets of pictures
SETS = ("fid", "kid", "cmmd")


@dataclass(frozen=True)
class Compared:
    """A row against another one on the same prompts.

    Attributes:
        paired: the difference and its sign test, with pairs of objects as clusters.
        verdict: what it says. `above` and `below` need the interval and the adjusted sign test;
            `equivalent` needs an equivalence test. `one training` says nothing, since other
            trainings of the same row may be better or worse.
        p_value: of the sign test, adjusted for all planned rows.
    """

    paired: Paired
    verdict: Verdict
    p_value: float


class Outcomes:
    """The outcomes of one test.

    Args:
        content: of a file of `afa.studies.results.outcomes`.
        margin: see `StudySettings`.
        num_resamples: of all bootstraps.
    """

    def __init__(self, content: dict[str, Any], margin: float, num_resamples: int) -> None:
        self.content, self._margin, self._num_resamples = content, margin, num_resamples
        self.rows: dict[str, dict[str, Any]] = content["rows"]
        self._comparisons: dict[tuple[str, tuple[str, ...]], dict[str, Compared]] = {}

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
            for row, each in self.content["chosen"]["rivals"].items()
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

    def distance(self, row: str, name: str) -> Interval:
        """The distance of a row from real scenes by one of `SETS`, a mean over its trainings."""
        listed = self.rows[row]["sets"][name]
        mean, low, high = (
            sum(each[key] for each in listed) / len(listed) for key in ("value", "low", "high")
        )
        return Interval(mean, low, high)

    def compared(
        self, rows: Sequence[str], other: str, groups: Sequence[str]
    ) -> dict[str, Compared]:
        """Several rows against another one: the verdicts hold for all planned rows together.

        The p-values of the sign tests are adjusted by Holm's method for the number of rows that the
        test has or will have, so that a verdict is the same in all tables, and does not depend on
        what else is asked; those of rows that are missing count as 1. Two rows with other seeds of
        training are compared by the seeds that they share.
        """
        found = self._compared_with(other, tuple(groups))
        return {row: found[row] for row in rows}

    def _compared_with(self, other: str, groups: tuple[str, ...]) -> dict[str, Compared]:
        """All rows against one of them."""
        if (other, groups) in self._comparisons:
            return self._comparisons[other, groups]
        clusters = self.clusters(self.places(groups))
        pairs, found = {}, {}
        for row in self.rows:
            if row == other:
                continue
            ours, theirs = self.scores(row, groups), self.scores(other, groups)
            pairs[row] = self._of_shared_seeds(row, other, ours, theirs)
            found[row] = paired_difference(*pairs[row], self._num_resamples, clusters=clusters)
        missing = len({*self.content.get("planned", ())} - {*self.rows})
        adjusted = holm([*(paired.p_value for paired in found.values()), *([1.0] * missing)])
        self._comparisons[other, groups] = {
            row: Compared(
                paired, self._verdict(row, paired, p_value, *pairs[row], clusters), p_value
            )
            for (row, paired), p_value in zip(found.items(), adjusted, strict=False)
        }
        return self._comparisons[other, groups]

    def _verdict(
        self,
        row: str,
        paired: Paired,
        p_value: float,
        ours: Scores,
        theirs: Scores,
        clusters: Clusters,
    ) -> Verdict:
        if row in (POOLED_ROW, WIDE_ROW):
            return "one training"
        if p_value < _LEVEL and paired.difference.low > 0:
            return "above"
        if p_value < _LEVEL and paired.difference.high < 0:
            return "below"
        if equivalence(ours, theirs, self._margin, self._num_resamples, clusters=clusters):
            return "equivalent"
        return "not told apart"

    def _of_shared_seeds(
        self, row: str, other: str, ours: Scores, theirs: Scores
    ) -> tuple[Scores, Scores]:
        one, two = (self.rows[each].get("seeds") for each in (row, other))
        if one is None or two is None or one == two:
            return ours, theirs
        shared = [seed for seed in one if seed in two]
        return ours[[one.index(s) for s in shared]], theirs[[two.index(s) for s in shared]]

    def total(self, row: str) -> int | None:
        """All pictures that a row was trained on; None is unknown."""
        budget: dict[str, int] = self.rows[row]["budget"]
        return sum(budget.values()) if budget else None

    def calls(self, row: str) -> float | None:
        """The evaluations of a denoiser for a picture, in those of one expert; None is unknown."""
        found: float | None = self.rows[row]["expert_calls"]
        return None if found is None else found * self.rows[row].get("size", 1.0)

    def can_be_equivalent(self, row: str, groups: Sequence[str]) -> bool:
        """Whether the equivalence test can be passed: by a row and a copy of it."""
        scores, clusters = self.scores(row, groups), self.clusters(self.places(groups))
        return equivalence(scores, scores, self._margin, self._num_resamples, clusters=clusters)

    def front(self, cost: Literal["total", "expert_calls"], groups: Sequence[str]) -> list[str]:
        """The rows that no other one beats at the same or a smaller cost, cheapest first.

        Ceilings are none of them, since nobody can choose them.

        Args:
            cost: pictures in all trainings, or expert calls for a picture.
            groups: of the prompts.
        """
        costs = {
            row: self.total(row) if cost == "total" else self.calls(row)
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
