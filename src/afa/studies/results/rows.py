"""The rows of each experiment: what is trained in which world, and what needs no training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afa.studies.results.entrants import Aggregated, Distilled, Drafted, Entrant, Tuned
from afa.studies.results.parts import Experiment
from afa.studies.results.settings import WITH_ALL_RIVALS
from afa.studies.worlds.recipe import POOLED, WIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from afa.studies.results.settings import StudySettings

AFA, PREDICTIONS = "AFA", "predictions only"
DISTILLED, GUIDED = "distilled", "distilled, guided"
#: aggregators on pictures that the experts drew by drafts
DRAFTED = "trained on drafts"
TUNED, MERGED, LORA = "tuned base", "merge, then tuned", "LoRA on the base"
#: rows that nobody can choose: a mask that knows each layout, and the judge on real scenes
ORACLE, REAL = "oracle mask", "real scenes through the autoencoder"
#: models that saw the data of base and experts
POOLED_ROW, WIDE_ROW = "pooled base", "wide model"
#: their rows by the names of their folders
CEILINGS = {POOLED: POOLED_ROW, WIDE: WIDE_ROW}
#: the first word of rows of sparse routing, and those of them that choose by pixel
TOP = "top-"
SPARSE = tuple(f"{TOP}{count}" for count in (1, 2))
#: aggregators of adequate size at the last site only
PREDICTIONS_ONLY = {"sites": "conv_out", "hidden_ratio": None, "min_scale": 1}
#: aggregators without one of the states (AFA, section 4.4)
ABLATIONS = {
    "AFA without place": {"spatial": False},
    "AFA without timestep": {"timestep": False},
    "AFA without prompt": {"prompt": False},
}


def at_steps(num_steps: int) -> str:
    """The name of the ensemble's row with another number of denoising steps."""
    return f"{AFA}, {num_steps} denoising steps"


def by_step(row: str) -> str:
    """The name of a row of sparse routing whose other experts do not run."""
    return f"{row}, by step"


def drawn_with_afa(settings: StudySettings) -> list[str]:
    """The rows of the main experiment that draw with AFA's ensembles, without a training."""
    sparse = [name for row in SPARSE for name in (row, by_step(row))]
    return [*sparse, *(at_steps(n) for n in settings.other_steps)]


def of_ensemble(name: str) -> bool:
    """Whether a row draws with the ensembles of AFA in another way, without a training."""
    return name.startswith((TOP, f"{AFA}, "))


def counted(row: str, steps: int, number: int | None = None) -> str:
    """The name of a row with its length, and its pictures if they are few."""
    pictures = "" if number is None else f", {number:,} pictures"
    return f"{row} ({steps:,} steps{pictures})"


def trained(
    experiment: Experiment,
    settings: StudySettings,
    rates: Mapping[str, float],
    merge: Mapping[str, Any] | None,
    lengths: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Entrant]:
    """The trainings of an experiment in each of its worlds.

    Args:
        experiment: the experiment.
        settings: of the study.
        rates: learning rates of tuned models, by row, as chosen on tuning prompts.
        merge: settings of the best merge on tuning prompts; None if it is not chosen yet, which
            leaves out what starts from it.
        lengths: of the tuned models of the data curve, by row and number of pictures, as chosen on
            tuning prompts; None, for a list of rows alone, gives all of them AFA's length.
    """
    if experiment == Experiment.DATA:
        return list(_data(settings, rates, merge, lengths))
    seeds = range(settings.num_seeds if experiment in WITH_ALL_RIVALS else 1)
    found: list[Entrant] = []
    for seed in seeds:
        found.append(Aggregated(AFA, seed))
        if experiment in WITH_ALL_RIVALS:
            found.append(Distilled(DISTILLED, seed, teacher=AFA))
            found.append(Drafted(DRAFTED, seed))
        found.append(_predictions(settings, PREDICTIONS, seed))
        found += _tuned(experiment, settings, rates, merge, seed)
    if experiment == Experiment.MAIN:
        found += [Distilled(GUIDED, seed, teacher=AFA, bakes_in=True) for seed in seeds]
        found += [
            Aggregated(row, seed, changes=changes)
            for row, changes in ABLATIONS.items()
            for seed in seeds
        ]
        row = counted(TUNED, settings.total_steps)
        found += [Tuned(row, seed, None, settings.total_steps, rates[TUNED]) for seed in seeds]
        found += [
            Tuned(
                LORA,
                seed,
                None,
                settings.tuned_steps[-1],
                rates[LORA],
                rank=settings.lora_rank,
            )
            for seed in seeds
        ]
    return found


def _predictions(settings: StudySettings, row: str, seed: int = 0) -> Aggregated:
    """Aggregators at the last site only, with their own length and learning rate."""
    steps, rate = settings.predictions_steps, settings.predictions_rate
    return Aggregated(row, seed, changes=PREDICTIONS_ONLY, steps=steps, rate=rate)


def _tuned(
    experiment: Experiment,
    settings: StudySettings,
    rates: Mapping[str, float],
    merge: Mapping[str, Any] | None,
    seed: int,
) -> Iterator[Tuned]:
    """The tuned base and merge: as long as AFA, and in some experiments at all lengths."""
    lengths = {settings.aggregator_steps}
    if experiment in WITH_ALL_RIVALS:
        lengths |= {*settings.tuned_steps}
    for steps in sorted(lengths):
        yield Tuned(counted(TUNED, steps), seed, None, steps, rates[TUNED])
        if merge is not None:
            yield Tuned(counted(MERGED, steps), seed, None, steps, rates[MERGED], merge)


def _data(
    settings: StudySettings,
    rates: Mapping[str, float],
    merge: Mapping[str, Any] | None,
    lengths: Mapping[str, Mapping[str, int]] | None,
) -> Iterator[Entrant]:
    """The rows of the curve over the number of pictures; aggregators have AFA's length."""
    steps = settings.aggregator_steps
    for number in settings.curve_pictures:
        yield Aggregated(counted(AFA, steps, number), 0, number)
        row = counted(PREDICTIONS, steps, number)
        yield replace(_predictions(settings, row), number=number, steps=steps)
        for row, start in of_pictures(merge).items():
            length = steps if lengths is None else lengths[row][str(number)]
            yield Tuned(counted(row, length, number), 0, number, length, rates[row], start)


def of_pictures(merge: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any] | None]:
    """The tuned models of the data curve, by row, with the merge where they start."""
    return {TUNED: None, **({} if merge is None else {MERGED: merge})}
