"""`evaluate`: every method draws the same prompts from the same noise, and all is measured.

The work is cut into batches that leave their pictures, scores and features on disk as soon as they
exist. A run that was stopped, however it was stopped, does only what is missing; a run of several
processes does the same batches and so comes to the same report.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.prompts import load_prompts, source_warnings
from afa.evaluation.report import write_report
from afa.evaluation.results import Results
from afa.evaluation.scoring import Scoring
from afa.evaluation.shares import record_shares
from afa.evaluation.work import MARK_FILE, Claim, Store, draw_unit, units_of, write_json
from afa.files import is_unused, owned, read_json
from afa.machine.processes import Processes, fixed_threads
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe
    from afa.evaluation.work import Unit

_MARK = {"format": "afa-evaluation", "version": 1}


@dataclass(frozen=True)
class EvaluateProgress:
    """How far an evaluation is: so many parts of one stage.

    `note` says what it is at; `notes` are what a user should know, one line each.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    notes: tuple[str, ...] = ()


def evaluate(recipe: EvaluateRecipe, output: Path) -> Iterator[EvaluateProgress]:
    """Draw, measure and compare; write the report.

    `output` gets pictures, scores and features as they come, and at the end `report.json`,
    `report.md` and drawings. The same call on a folder of an earlier run goes on where that one
    stopped; methods, metrics, seeds and numbers of steps may be added meanwhile.

    Args:
        recipe: what is compared.
        output: a new folder, or one of an earlier run.

    Raises:
        AfaError: a checkpoint, prompt file, picture or metric's weights that cannot be had, or a
            folder that holds something else. What was finished is kept.
    """
    processes = Processes()
    sampling = recipe.sampling
    device = pick_device(processes.device or sampling.device)
    if processes.is_main:
        require_evaluation(output, recipe.references)
    with owned(output) if processes.is_main else nullcontext(), fixed_threads(sampling.num_threads):
        store = Store(output)
        # the zoo's true pictures are drawn by one process, and then found by the others
        scratch = output / "references" if recipe.prompts.zoo is not None else None
        if processes.is_main:
            write_json(output / MARK_FILE, _MARK)
            load_prompts(recipe.prompts, scratch)
        processes.wait()
        prompts = load_prompts(recipe.prompts, scratch)
        scoring = Scoring(recipe, prompts, store, device)
        builder = MethodBuilder(recipe, device)
        if processes.is_main:
            store.claim(list(_claims(recipe, prompts, store, builder.identity)))
        processes.wait()
        if processes.is_main:
            said = (
                *source_warnings(recipe.prompts),
                *scoring.warnings(),
                *_cut_prompts(recipe, prompts),
            )
            yield EvaluateProgress("prompts", len(prompts), len(prompts), notes=said)

        batches = list(processes.share(scoring.reference_batches()))
        for done, (network, number) in enumerate(batches):
            yield EvaluateProgress("references", done, len(batches), network)
            scoring.extract_references(network, number)
            yield EvaluateProgress("references", done + 1, len(batches))
        processes.wait()
        if processes.is_main and (converted := scoring.converted_references()):
            count = len(batches)
            yield EvaluateProgress("references", count, count, notes=(converted,))
        work = _Work(recipe, prompts, store, builder, scoring, processes)
        main = units_of(recipe, range(len(prompts)), sampling.num_steps)
        yield from work.run("pictures", main)
        processes.wait()

        results = Results(recipe, prompts, scoring, store)
        yield from work.run("steps", results.curve_units())
        processes.wait()
        if processes.is_main:
            yield EvaluateProgress("report", 0, 1)
            record_shares(recipe, prompts, builder, store)
            write_report(results, output)
            yield EvaluateProgress("report", 1, 1)
        processes.wait()


class _Work:
    """Draws and scores batches, with one pipeline in memory at a time."""

    def __init__(
        self,
        recipe: EvaluateRecipe,
        prompts: Sequence[Prompt],
        store: Store,
        builder: MethodBuilder,
        scoring: Scoring,
        processes: Processes,
    ) -> None:
        self._recipe, self._prompts, self._store = recipe, prompts, store
        self._builder, self._scoring, self._processes = builder, scoring, processes
        self._methods = {method.name: method for method in recipe.methods}
        self._loaded: tuple[str, int] | None = None
        self._pipeline: StableDiffusionPipeline | None = None

    def run(self, stage: str, units: Sequence[Unit]) -> Iterator[EvaluateProgress]:
        """Do this process's part of the batches that are not done yet."""
        # what needs one model first: the others keep all experts in memory, once they are loaded
        ordered = sorted(units, key=lambda unit: self._methods[unit.method].needs_experts)
        mine = list(self._processes.share(ordered))
        for done, unit in enumerate(mine):
            yield EvaluateProgress(stage, done, len(mine), unit.method)
            if not self._store.cost(unit).exists():
                pipeline = self._pipeline_of(unit)
                draw_unit(pipeline, unit, self._prompts, self._recipe.sampling, self._store)
            self._scoring.score(unit)
        if mine:
            yield EvaluateProgress(stage, len(mine), len(mine))

    def _pipeline_of(self, unit: Unit) -> StableDiffusionPipeline:
        key = (unit.method, unit.replica)
        if self._loaded != key or self._pipeline is None:
            self._pipeline = None  # before the next one is loaded
            self._pipeline = self._builder.build(self._methods[unit.method], unit.replica)
            self._loaded = key
        return self._pipeline


def require_evaluation(output: Path, references: Path | None = None) -> None:
    """Refuse a folder that is not new and not of an earlier evaluation.

    Args:
        output: the folder.
        references: of real pictures, in which it must not be.

    Raises:
        AfaError: names it.
    """
    if references is not None and output.resolve().is_relative_to(references.resolve()):
        raise AfaError(
            "AFA-EVAL-017",
            f"The output '{output}' is in the folder of references '{references}'; the pictures "
            "that are drawn there would be taken for real ones. Name a folder elsewhere.",
        )
    mark = output / MARK_FILE
    if not is_unused(output) and not (mark.is_file() and read_json(mark) == _MARK):
        raise AfaError(
            "AFA-EVAL-018",
            f"The output folder must be new or hold an earlier evaluation; '{output}' is neither. "
            "Name another one.",
        )


def _cut_prompts(recipe: EvaluateRecipe, prompts: Sequence[Prompt]) -> list[str]:
    """What the text encoders of all methods do not read."""
    from afa.evaluation.planned import plan_of_evaluation
    from afa.loading.prompt_warnings import warnings_of_plan

    sampling = recipe.sampling
    texts = [prompt.text for prompt in prompts]
    plan = plan_of_evaluation(recipe)
    return warnings_of_plan(plan, texts, sampling.negative_prompt, sampling.guidance)


def require_same_evaluation(
    recipe: EvaluateRecipe, prompts: Sequence[Prompt], output: Path
) -> None:
    """Refuse a folder whose pictures were drawn from other prompts or other models.

    Raises:
        AfaError: names what differs.
    """
    if is_unused(output):
        return
    store = Store(output)
    for claim in _claims(recipe, prompts, store, Identities(recipe).method):
        store.require(claim)


def _claims(
    recipe: EvaluateRecipe,
    prompts: Sequence[Prompt],
    store: Store,
    identity_of: Callable[[MethodRecipe, int], dict[str, Any]],
) -> Iterator[Claim]:
    """What everything in an evaluation's folder is made from."""
    sampling = recipe.sampling.model_dump(
        mode="json", exclude={"num_steps", "seeds", "device", "num_threads"}
    )
    listed = [[prompt.text, prompt.group] for prompt in prompts]
    yield Claim.of(store.folder / "prompts.json", {"prompts": listed}, "the prompts")
    for method in recipe.methods:
        for replica in range(method.num_replicas):
            identity = {**identity_of(method, replica), "sampling": sampling}
            place = store.method(method.name, replica) / "method.json"
            yield Claim.of(place, identity, f"the method '{method.name}'")
