"""`evaluate`: every method draws the same prompts from the same noise and is scored.

Each batch saves its pictures, scores and features as soon as they exist, so a resumed run only
computes what is missing. Several processes compute the same batches, so the report is the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.evaluation.given import identities_of_pictures, take_unit
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.evaluation.planned import plan_of_evaluation
from afa.evaluation.prompts import load_prompts, source_warnings
from afa.evaluation.report import write_report
from afa.evaluation.results import Results
from afa.evaluation.scoring import Scoring
from afa.evaluation.shares import record_shares
from afa.evaluation.work import MARK_FILE, Claim, Store, draw_unit, units_of, write_json
from afa.files import is_unused, read_json
from afa.loading.scheduler_choice import require_scheduler
from afa.loading.student_record import baked_guidance
from afa.machine.ownership import owned
from afa.machine.processes import Processes, fixed_threads
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.work import Unit

_MARK = {"format": "afa-evaluation", "version": 1}


@dataclass(frozen=True)
class EvaluateProgress:
    """Progress of one stage of an evaluation.

    `note` names the current method or network; `notes` are warnings for the user, one line each.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    notes: tuple[str, ...] = ()


def evaluate(recipe: EvaluateRecipe, output: Path) -> Iterator[EvaluateProgress]:
    """Draw and score the pictures of all methods, and write the report.

    Writes pictures, scores and features to `output` as they are finished, and `report.json`,
    `report.md`, `scores.csv` and figures at the end. A call with the folder of an earlier run
    resumes it; methods, metrics, seeds and numbers of steps may be added in between.

    Args:
        recipe: the comparison.
        output: a new folder, or that of an earlier run.

    Yields:
        The progress.

    Raises:
        AfaError: if a checkpoint, prompt file, picture or metric's weights cannot be loaded, or
            the folder contains something else. Finished batches are kept.
    """
    processes = Processes()
    sampling = recipe.sampling
    device = pick_device(processes.device or sampling.device)
    if processes.is_main:
        require_evaluation(output, recipe.references)
    with owned(output) if processes.is_main else nullcontext(), fixed_threads(sampling.num_threads):
        store = Store(output)
        # the main process renders the zoo's reference pictures; the others find them
        scratch = output / "references" if recipe.prompts.zoo is not None else None
        require_scheduler(plan_of_evaluation(recipe), sampling.scheduler)
        if processes.is_main:
            write_json(output / MARK_FILE, _MARK)
            load_prompts(recipe.prompts, scratch)
        processes.wait()
        prompts = load_prompts(recipe.prompts, scratch)
        scoring = Scoring(recipe, prompts, store, device)
        builder = MethodBuilder(recipe, sampling, device)
        notes: tuple[str, ...] = ()
        if processes.is_main:
            notes = (
                *source_warnings(recipe.prompts),
                *scoring.warnings(),
                *_cut_prompts(recipe, prompts),  # refuses before the recipe is recorded
                *_guided_twice(recipe),
            )
            store.claim(list(_claims(recipe, prompts, store)))
        processes.wait()
        if processes.is_main:
            yield EvaluateProgress("prompts", len(prompts), len(prompts), notes=notes)

        batches = list(processes.share(scoring.reference_batches()))
        for done, (network, number) in enumerate(batches):
            yield EvaluateProgress("references", done, len(batches), network)
            scoring.extract_references(network, number)
            yield EvaluateProgress("references", done + 1, len(batches))
        processes.wait()
        if processes.is_main and (converted := scoring.converted_references()):
            count = len(batches)
            yield EvaluateProgress("references", count, count, notes=(converted,))
        results = Results(recipe, prompts, scoring, store)
        main = units_of(recipe, range(len(prompts)), sampling.num_steps)
        yield from _work("pictures", main, results, builder, processes)
        processes.wait()
        yield from _work("steps", results.curve_units(), results, builder, processes)
        processes.wait()
        if processes.is_main:
            yield EvaluateProgress("report", 0, 1)
            record_shares(recipe, prompts, builder, store)
            write_report(results, output)
            yield EvaluateProgress("report", 1, 1)
        processes.wait()


def _work(
    stage: str,
    units: Sequence[Unit],
    results: Results,
    builder: MethodBuilder,
    processes: Processes,
) -> Iterator[EvaluateProgress]:
    """Draw and score this process's share of the unfinished batches, one pipeline at a time."""
    methods = {method.name: method for method in results.recipe.methods}
    # single models first, because the other methods keep all experts in memory
    mine = list(processes.share(sorted(units, key=lambda u: methods[u.method].needs_experts)))
    loaded: tuple[str, int] | None = None
    pipeline: Any = None
    for done, unit in enumerate(mine):
        yield EvaluateProgress(stage, done, len(mine), unit.method)
        method, seeds = methods[unit.method], results.recipe.sampling.seeds
        is_drawn = results.store.cost(unit).exists()
        if not is_drawn and method.pictures is not None:
            take_unit(method.pictures[unit.replica], unit, seeds, results.store)
        elif not is_drawn:
            if loaded != (unit.method, unit.replica):
                loaded = pipeline = None  # before the next one is loaded
                pipeline = builder.build(method, unit.replica)
                loaded = unit.method, unit.replica
            sampling = results.recipe.sampling_of(method)
            draw_unit(pipeline, unit, results.prompts, sampling, results.store)
        results.scoring.score(unit)
    if mine:
        yield EvaluateProgress(stage, len(mine), len(mine))


def require_evaluation(output: Path, references: Path | None = None) -> None:
    """Require that an output folder is new or contains an earlier evaluation.

    Args:
        output: the folder.
        references: folder of real pictures, which must not contain `output`.

    Raises:
        AfaError: if the folder cannot be used.
    """
    if references is not None and output.resolve().is_relative_to(references.resolve()):
        raise AfaError(
            "AFA-EVAL-017",
            f"The output '{output}' is inside the references '{references}', so its pictures would "
            "count as real ones. Pass an output folder elsewhere.",
        )
    mark = output / MARK_FILE
    if not is_unused(output) and not (mark.is_file() and read_json(mark) == _MARK):
        raise AfaError(
            "AFA-EVAL-018",
            f"The output folder '{output}' is neither new nor an earlier evaluation. Pass another "
            "folder.",
        )


def _cut_prompts(recipe: EvaluateRecipe, prompts: Sequence[Prompt]) -> list[str]:
    """Warnings of prompts that are longer than a method's text encoders can read."""
    from afa.loading.prompt_warnings import warnings_of_plan

    sampling = recipe.sampling
    texts = [prompt.text for prompt in prompts]
    plan = plan_of_evaluation(recipe)
    return warnings_of_plan(
        plan, texts, sampling.negative_prompt, sampling.guidance, sampling.prompt_syntax
    )


def _guided_twice(recipe: EvaluateRecipe) -> list[str]:
    """Warnings of students with guidance in their prediction that are drawn with guidance."""
    lines = []
    for method in recipe.methods:
        for model in method.model or ():
            baked = baked_guidance(Path(model.lora or model.source).expanduser())
            if baked is not None and recipe.sampling_of(method).guidance > 1:
                lines.append(
                    f"The model of '{method.name}' predicts with guidance {baked:g} already, and "
                    "is drawn with guidance again. Set guidance: 1 for this method."
                )
    return lines


def require_same_evaluation(
    recipe: EvaluateRecipe, prompts: Sequence[Prompt], output: Path
) -> None:
    """Require that the pictures in a folder were drawn with these prompts and models.

    Raises:
        AfaError: if they were not; names what differs.
    """
    if is_unused(output):
        return
    store = Store(output)
    for claim in _claims(recipe, prompts, store):
        store.require(claim)


def _claims(recipe: EvaluateRecipe, prompts: Sequence[Prompt], store: Store) -> Iterator[Claim]:
    """The inputs from which the files of an evaluation are made."""
    identities = Identities(recipe)
    apart = {"num_steps", "seeds", "device", "num_threads"}
    listed = [[prompt.text, prompt.group] for prompt in prompts]
    syntax = recipe.sampling.prompt_syntax
    read_as = {} if syntax == "plain" else {"prompt_syntax": syntax}
    yield Claim(store.folder / "prompts.json", {"prompts": listed, **read_as}, "the prompts")
    for method in recipe.methods:
        sampling = recipe.sampling_of(method).model_dump(mode="json", exclude=apart)
        for replica in range(method.num_replicas):
            folder, what = store.method(method.name, replica), f"the method '{method.name}'"
            if method.pictures is not None:
                place, seeds = method.pictures[replica], recipe.sampling.seeds
                found = identities_of_pictures(place, range(len(prompts)), seeds)
                for seed, identity in found.items():
                    path = folder / f"given-seed-{seed}.json"
                    yield Claim(path, identity, what, (f"seed-{seed}/*",))
                continue
            identity = {**identities.method(method, replica), "sampling": sampling}
            yield Claim(folder / "method.json", identity, what)
