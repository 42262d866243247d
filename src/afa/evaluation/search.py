"""autoMBW: block weights of a static merge, searched against any scorer."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from afa.denoisers.kinds import denoiser_of
from afa.drawing.merged import merged_pipeline
from afa.errors import AfaError
from afa.evaluation.identity import Identities, of_metric
from afa.evaluation.prompts import load_prompts
from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.scoring import open_scorer
from afa.evaluation.search_recipe import SearchRecipe
from afa.evaluation.work import draw
from afa.files import is_unused, owned, read_json, write_atomic
from afa.loading.pipeline import check_text_to_image, load_pipeline
from afa.machine.processes import fixed_threads
from afa.merging import BlockWeights
from afa.recipe import differing
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import optuna
    from diffusers import StableDiffusionPipeline

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.scoring import PictureScorer

#: the text encoders' weights are searched like those of a block, as the web UIs' base alpha is
_TEXT = "text_encoder"
_IDENTITY = "search.json"


@dataclass(frozen=True)
class Trial:
    """One finished trial: its score, and the best so far."""

    number: int
    num_trials: int
    score: float
    best: float
    seconds: float


def search_block_weights(recipe: SearchRecipe, output: Path) -> Generator[Trial, None, None]:
    """Search with a tree-structured Parzen estimator (Bergstra et al., 2011; optuna).

    `output` gets `study.log`, optuna's journal, and after every trial the best weights so far as
    `merge.yaml`, a recipe for `afa merge`. The same call goes on where an earlier one was stopped
    and comes to the same result. The first trial is the uniform merge, which the best never falls
    below on these prompts.

    Args:
        recipe: experts, prompts, scorer, number of trials.
        output: a new folder, or one of an earlier run of this recipe.

    Raises:
        AfaError: the folder holds something else, or anything in the recipe cannot be had.
    """
    prompts = load_prompts(recipe.prompts)
    identity = _identity(recipe, prompts)
    _check_folder(identity, output)
    with owned(output), fixed_threads(recipe.sampling.num_threads):
        write_atomic(output / _IDENTITY, json.dumps(identity, indent=2) + "\n")
        yield from _trials(recipe, prompts, output)


def _trials(recipe: SearchRecipe, prompts: Sequence[Prompt], output: Path) -> Iterator[Trial]:
    device = pick_device(recipe.sampling.device)
    scorer = open_scorer(recipe.metric, device)
    pipeline = load_pipeline(
        recipe.experts,
        vae=recipe.vae,
        config=recipe.config,
        parts=recipe.parts,
        torch_dtype=getattr(torch, recipe.sampling.dtype),
        device=device,
    )
    check_text_to_image(pipeline)
    study = _open_study(output / "study.log")
    keys = [_TEXT, *(site.name for site in denoiser_of(pipeline).sites)]
    first = len(_complete(study))
    if first > 0:  # a stop may have come between a trial and its recipe
        _write_merge(recipe, study, output)
    for number in range(first, recipe.num_trials):
        started = time.perf_counter()
        trial = _ask(study, recipe, number, keys)
        weights = _suggest(trial, keys, len(recipe.experts))
        merged = merged_pipeline(pipeline, BlockWeights(weights))
        score = _score(merged, prompts, recipe.sampling, scorer)
        trial.set_user_attr("weights", weights)
        study.tell(trial, score)
        _write_merge(recipe, study, output)
        seconds = time.perf_counter() - started
        yield Trial(number + 1, recipe.num_trials, score, study.best_value, seconds)


def require_same_search(recipe: SearchRecipe, output: Path) -> None:
    """Refuse a folder that is not new and not of an earlier search of this recipe.

    Raises:
        AfaError: names what differs.
    """
    _check_folder(_identity(recipe, load_prompts(recipe.prompts)), output)


def _identity(recipe: SearchRecipe, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """All that a trial's score depends on; files by their hashes, prompts by their words."""
    asked = recipe.model_dump(mode="json", exclude={"num_trials": True, "sampling": {"device"}})
    judge = of_metric(recipe.metric)
    del judge["releases"]  # after an upgrade the trials before it still count
    identity = {
        **asked,
        "config": None,
        "parts": [],
        **Identities(recipe).experts(),
        "prompts": [prompt.text for prompt in prompts],
        "metric weights": judge,
    }
    return json.loads(json.dumps(identity))


def _check_folder(identity: dict[str, Any], output: Path) -> None:
    place = output / _IDENTITY
    written = read_json(place) if place.is_file() else None
    if not is_unused(output) and written != identity:
        found = f"'{output}' is neither"
        if written is not None:
            changed = ", ".join(differing(written, identity))
            found = f"that in '{output}' was made with another state of: {changed}"
        raise AfaError(
            "AFA-EVAL-027",
            "The output folder must be new or hold an earlier search of this recipe with the same "
            f"checkpoints; {found}. Name another one.",
        )


def _open_study(file: Path) -> optuna.Study:
    """The study kept in a file; trials that a stop cut off do not count."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = file.resolve()  # the library's own lock is a link to this path
    _mend(file)
    study = optuna.create_study(
        study_name="block-weights",
        storage=JournalStorage(JournalFileBackend(str(file))),
        direction="maximize",
        load_if_exists=True,
    )
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _mend(file: Path) -> None:
    """Take away what a killed process left: the journal's lock, and half of its last line.

    The folder is this process's alone, so the lock is nobody's.
    """
    for lock in file.parent.glob(f"{file.name}.lock*"):
        lock.unlink()
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(file, whole)


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    import optuna

    return study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])


def _ask(
    study: optuna.Study, recipe: SearchRecipe, number: int, keys: Sequence[str]
) -> optuna.Trial:
    """The next trial; its draws depend on the seed, its number and the trials before it alone."""
    import optuna

    # a stop between asking and telling leaves one that is waiting, too
    waiting = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING])
    if number == 0 and not waiting:
        names = _names(keys, len(recipe.experts))
        uniform = 1 / len(recipe.experts) if len(recipe.experts) == 2 else 0.5
        study.enqueue_trial(dict.fromkeys(names, uniform))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(seed=(recipe.seed * 100_003 + number) % 2**32)
    return study.ask()


def _names(keys: Sequence[str], count: int) -> list[str]:
    """One number per key for two experts, the second one's weight; else one per expert."""
    if count == 2:
        return list(keys)
    return [f"{key}/{n}" for key in keys for n in range(count)]


def _suggest(trial: optuna.Trial, keys: Sequence[str], count: int) -> dict[str, list[float]]:
    """One weight per expert for every key, summing to 1."""
    numbers = {name: trial.suggest_float(name, 0.0, 1.0) for name in _names(keys, count)}
    if count == 2:
        return {key: [1 - numbers[key], numbers[key]] for key in keys}
    weights = {}
    for key in keys:
        raw = [numbers[f"{key}/{n}"] for n in range(count)]
        total = sum(raw)
        weights[key] = [number / total for number in raw] if total > 0 else [1 / count] * count
    return weights


def _score(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    sampling: SamplingRecipe,
    scorer: PictureScorer,
) -> float:
    """The mean score of all prompts and seeds.

    Raises:
        AfaError: it is not finite.
    """
    scores: list[float] = []
    texts = [prompt.text for prompt in prompts]
    for seed in sampling.seeds:
        for start in range(0, len(texts), sampling.batch_size):
            places = range(start, min(start + sampling.batch_size, len(texts)))
            chosen = [texts[place] for place in places]
            pictures = draw(pipeline, chosen, places, seed, sampling.num_steps, sampling)
            scores += next(iter(scorer(pictures, chosen).values()))
    mean = float(np.mean(scores))
    if not math.isfinite(mean):
        raise AfaError(
            "AFA-EVAL-028",
            f"The mean score must be finite, came {mean}. Is the metric's input black?",
        )
    return mean


def _write_merge(recipe: SearchRecipe, study: optuna.Study, output: Path) -> None:
    """Write the best weights so far as a recipe of `afa merge`."""
    best = study.best_trial
    content = {
        "method": "block_weights",
        "experts": recipe.experts,
        "block_weights": best.user_attrs["weights"],
    }
    name = recipe.metric if isinstance(recipe.metric, str) else recipe.metric.name
    note = f"# found by afa search: mean {name} {best.value:.4f} over its prompts\n"
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    write_atomic(output / "merge.yaml", note + text)
