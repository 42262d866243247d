"""The scores of a comparison as arrays, and the pairs of methods to compare."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from afa.aggregators.fusion import ShellRecipe
from afa.evaluation.prompts import groups_of, load_prompts
from afa.evaluation.scoring import Scoring
from afa.evaluation.work import Store, Unit, read_cost, units_of
from afa.statistics import Interval, Paired, mean_interval, paired_difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe
    from afa.metrics import SetMetric
    from afa.statistics import Scores


@dataclass(frozen=True)
class MeanCost:
    """The cost of one picture of a method; `peak_memory` in bytes; None is unknown.

    `seconds` is the median over the batches, which is robust to a busy machine.
    """

    seconds: float | None
    peak_memory: int | None
    expert_calls: float | None


class Results:
    """Reads a finished comparison from its folder.

    Args:
        recipe: the comparison.
        prompts: all prompts.
        scoring: the metrics.
        store: the comparison's folder.
    """

    def __init__(
        self, recipe: EvaluateRecipe, prompts: Sequence[Prompt], scoring: Scoring, store: Store
    ) -> None:
        self.recipe, self.prompts, self.scoring, self.store = recipe, prompts, scoring, store
        self.groups = groups_of(prompts)
        self.methods = [method.name for method in recipe.methods]
        self._units = units_of(recipe, range(len(prompts)), recipe.sampling.num_steps)

    # -- scores -------------------------------------------------------------------------------

    @functools.cached_property
    def _scores(self) -> dict[str, dict[str, Scores]]:
        return {name: self._read(self._of(self._units, name)) for name in self.methods}

    @staticmethod
    def _of(units: Sequence[Unit], method: str) -> list[Unit]:
        return [unit for unit in units if unit.method == method]

    def _read(self, units: Sequence[Unit]) -> dict[str, Scores]:
        """The scores [replicas, prompts] of one method's batches, averaged over the seeds."""
        values: dict[str, dict[int, dict[int, list[float]]]] = {}
        for unit in units:
            for score, numbers in self.scoring.scores_of(unit).items():
                by_place = values.setdefault(score, {}).setdefault(unit.replica, {})
                for place, number in zip(unit.places, numbers, strict=True):
                    by_place.setdefault(place, []).append(number)
        return {
            score: np.array(
                [
                    [float(np.mean(by_place[place])) for place in sorted(by_place)]
                    for _, by_place in sorted(replicas.items())
                ]
            )
            for score, replicas in values.items()
        }

    def of_pictures(self) -> Iterator[dict[str, Any]]:
        """The scores of each picture of the main comparison, with its method and its prompt."""
        for unit in self._units:
            scores = self.scoring.scores_of(unit)
            for row, place in enumerate(unit.places):
                prompt = self.prompts[place]
                yield {
                    "method": unit.method,
                    "replica": unit.replica,
                    "seed": unit.seed,
                    "prompt_number": place,
                    "group": prompt.group,
                    "prompt": prompt.text,
                    **{name: values[row] for name, values in scores.items()},
                }

    @functools.cached_property
    def _outcomes(self) -> set[str]:
        """The scores that are 0 or 1 for every picture."""
        numbers: dict[str, set[float]] = {}
        for unit in self._units:
            for score, values in self.scoring.scores_of(unit).items():
                numbers.setdefault(score, set()).update(values)
        return {score for score, seen in numbers.items() if seen <= {0.0, 1.0}}

    @property
    def score_names(self) -> list[str]:
        """The scores of single pictures."""
        return list(self._scores[self.methods[0]])

    @property
    def primary(self) -> str | None:
        """The score that selects the best methods; None without a metric of single pictures."""
        names = self.score_names
        return self.recipe.primary or (names[0] if names else None)

    def scores(self, method: str, score: str, group: str) -> Scores:
        """Scores [replicas, prompts of the group], averaged over the seeds."""
        return self._scores[method][score][:, self.groups[group]]

    def mean(self, method: str, score: str, group: str) -> Interval:
        """A method's mean score with its interval."""
        return self._interval(score, self.scores(method, score, group))

    def _interval(self, score: str, values: Scores) -> Interval:
        return mean_interval(values, self.recipe.num_resamples, is_outcome=score in self._outcomes)

    def paired(self, method: str, reference: str, score: str, group: str) -> Paired:
        """The paired difference `method` minus `reference` on the same prompts."""
        ours, theirs = (self.scores(name, score, group) for name in (method, reference))
        return paired_difference(ours, theirs, self.recipe.num_resamples)

    def scores_at(self, method: str, score: str, places: Sequence[int]) -> Scores:
        """Scores [replicas, prompts] of some prompts, averaged over the seeds."""
        return self._scores[method][score][:, list(places)]

    def features_of(
        self, method: str, metric: SetMetric, group: str
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The features of drawn and of real pictures of a group, for each replica of a method.

        Real ones are None if the metric needs none.
        """
        network, wanted = metric.extractor.name, set(self.groups[group])
        real = self._real(network, group) if metric.needs_real else None
        units = self._of(self._units, method)
        for replica in sorted({unit.replica for unit in units}):
            rows = [
                row
                for unit in units
                if unit.replica == replica
                for place, row in zip(
                    unit.places, self.scoring.features_of(network, unit), strict=True
                )
                if place in wanted
            ]
            yield torch.stack(rows), real

    def set_scores(self, method: str, group: str) -> dict[str, list[float]]:
        """The metrics of sets, with one number per replica.

        Omits metrics of groups that have fewer than two drawn or real pictures.
        """
        found: dict[str, list[float]] = {}
        for metric in self.scoring.set_metrics:
            for generated, real in self.features_of(method, metric, group):
                if len(generated) < 2 or (real is not None and len(real) < 2):
                    continue
                found.setdefault(metric.name, []).append(metric.compute(generated, real))
        return found

    def _real(self, network: str, group: str) -> torch.Tensor:
        """Features of the real pictures of the group, or of the folder of references."""
        real = self.scoring.reference_features(network)
        return real if self.recipe.references is not None else real[self.groups[group]]

    def pictures(self, method: str, places: Sequence[int]) -> list[Path]:
        """The files of a method's pictures of these prompts, from its first replica and seed."""
        seed = self.recipe.sampling.seeds[0]
        files = {
            place: self.store.picture(unit, place)
            for unit in self._of(self._units, method)
            if unit.replica == 0 and unit.seed == seed
            for place in unit.places
        }
        return [files[place] for place in places]

    # -- pairs of methods ---------------------------------------------------------------------

    def kind(self, method: MethodRecipe) -> str:
        """`expert`, `model`, `ensemble`, `merge`, `pictures`, or the name of a fusion."""
        if method.pictures is not None:
            return "pictures"
        if method.fusion is not None:
            return method.fusion.rule
        if method.merge is not None:
            return "merge"
        if method.ensemble is not None:
            return "ensemble"
        is_expert = method.model is not None and set(method.model) <= set(self.recipe.experts)
        return "expert" if is_expert else "model"

    def best(self, kind: str, group: str) -> MethodRecipe | None:
        """The first method of a kind with the highest primary score in a group."""
        candidates = [m for m in self.recipe.methods if self.kind(m) == kind]
        if self.primary is None or not candidates:
            return None
        score = self.primary
        return max(candidates, key=lambda m: self.scores(m.name, score, group).mean())

    def shell_of(self, expert: MethodRecipe) -> MethodRecipe | None:
        """The control that runs this expert alone as an ensemble (rule `shell`)."""
        assert expert.model is not None, "an expert is a model"
        shell = ShellRecipe(expert=self.recipe.experts.index(expert.model[0]))
        return next((m for m in self.recipe.methods if m.fusion == shell), None)

    def references(self, group: str) -> dict[str, str]:
        """The methods that all others are compared with in a group, by role."""
        roles = {"subject": self.recipe.subject_name}
        expert = self.best("expert", group)
        if expert is not None:
            roles["best expert"] = expert.name
            shell = self.shell_of(expert)
            if shell is not None:
                roles["shell of the best expert"] = shell.name
        return roles

    # -- cost and curve -----------------------------------------------------------------------

    def cost(self, method: str) -> MeanCost:
        """The cost of one picture of the main comparison."""
        return self._cost(self._of(self._units, method))

    def _cost(self, units: Sequence[Unit]) -> MeanCost:
        costs = [(read_cost(self.store, unit), len(unit.places)) for unit in units]
        peaks = [cost.peak_memory for cost, _ in costs if cost.peak_memory is not None]
        seconds = [cost.seconds / count for cost, count in costs if cost.seconds is not None]
        calls = [cost.expert_calls for cost, _ in costs if cost.expert_calls is not None]
        return MeanCost(
            statistics.median(seconds) if len(seconds) == len(costs) else None,
            max(peaks, default=None),
            sum(calls) / sum(n for _, n in costs) if len(calls) == len(costs) else None,
        )

    def machines(self) -> list[str]:
        """The distinct machines, with their software, on which batches were drawn."""
        units = [*self._units, *self.curve_units()]
        return sorted({read_cost(self.store, unit).measured_on for unit in units} - {""})

    def curve_places(self) -> list[int]:
        """The prompts of the curve: those of the first group, up to the limit."""
        assert self.recipe.curve is not None, "the recipe has a curve"
        first = next(iter(self.groups.values()))
        return first[: self.recipe.curve.limit]

    def curve_methods(self) -> list[str]:
        """The methods of the curve: the named ones, or the subject, best expert and best merge."""
        assert self.recipe.curve is not None, "the recipe has a curve"
        names = self.recipe.curve.methods
        if names is None:
            group = next(iter(self.groups))
            best = [self.best(kind, group) for kind in ("expert", "merge")]
            names = [self.recipe.subject_name, *(method.name for method in best if method)]
        return list(dict.fromkeys([*names, *self.recipe.curve.also]))

    def curve_units(self) -> list[Unit]:
        """The batches of the curve that are not part of the main comparison."""
        if self.recipe.curve is None:
            return []
        names = self.curve_methods()
        return [
            unit
            for num_steps in self.recipe.curve.num_steps
            if num_steps != self.recipe.sampling.num_steps
            for unit in self._curve_units(num_steps, names)
        ]

    def _curve_units(self, num_steps: int, methods: Sequence[str]) -> list[Unit]:
        return units_of(self.recipe, self.curve_places(), num_steps, methods, part="curve")

    def curve_point(self, method: str, num_steps: int) -> tuple[dict[str, Interval], MeanCost]:
        """The scores of a method at a number of steps, and the cost of a picture.

        At the number of steps of the main comparison, its pictures are used.
        """
        if num_steps == self.recipe.sampling.num_steps:
            places = self.curve_places()
            values = {name: scores[:, places] for name, scores in self._scores[method].items()}
            cost = self.cost(method)
        else:
            units = self._curve_units(num_steps, [method])
            values, cost = self._read(units), self._cost(units)
        return {name: self._interval(name, scores) for name, scores in values.items()}, cost

    def worst(self, count: int, group: str) -> list[int]:
        """The prompts with the subject's lowest scores, in stable order.

        For scores of 0 or 1, prompts that it always gets right are omitted.
        """
        assert self.primary is not None, "a metric scores single pictures"
        means = self.scores(self.recipe.subject_name, self.primary, group).mean(0)
        order = [int(n) for n in np.argsort(means, kind="stable")[:count]]
        if self.primary in self._outcomes:
            order = [n for n in order if means[n] < 1]
        return [self.groups[group][n] for n in order]


def read_results(recipe: EvaluateRecipe, output: Path) -> Results:
    """Read a finished comparison again, without drawing anything.

    Args:
        recipe: of the comparison.
        output: its folder.
    """
    scratch = output / "references" if recipe.prompts.zoo is not None else None
    prompts, store = load_prompts(recipe.prompts, scratch), Store(output)
    return Results(recipe, prompts, Scoring(recipe, prompts, store, torch.device("cpu")), store)
