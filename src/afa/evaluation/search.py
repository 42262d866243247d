"""Search the block weights of a static merge for the best score of a metric (autoMBW)."""

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
from afa.ensemble.prompt_syntax import words_of_prompt
from afa.errors import AfaError
from afa.evaluation.identity import Identities, of_metric
from afa.evaluation.planned import plan_of_search
from afa.evaluation.prompts import load_prompts
from afa.evaluation.recipe import SamplingRecipe
from afa.evaluation.scoring import open_scorer
from afa.evaluation.search_recipe import SearchRecipe
from afa.evaluation.work import draw
from afa.files import is_unused, read_json, write_atomic
from afa.loading.pipeline import load_pipeline
from afa.loading.scheduler_choice import require_scheduler
from afa.loading.task import check_text_to_image
from afa.machine.ownership import owned
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

#: key of the text encoders' weights, which are searched like a block (base alpha of web UIs)
_TEXT = "text_encoder"
_IDENTITY = "search.json"


@dataclass(frozen=True)
class Trial:
    """A finished trial: its score, and the best score so far."""

    number: int
    num_trials: int
    score: float
    best: float
    seconds: float


def search_block_weights(recipe: SearchRecipe, output: Path) -> Generator[Trial, None, None]:
    """Search block weights with a tree-structured Parzen estimator (Bergstra et al., 2011; optuna).

    Writes optuna's journal to `study.log` in `output`, and after each trial the best weights so
    far to `merge.yaml`, a recipe of `afa merge`. Calling it again resumes an earlier search, with
    the same result as without the interruption. The first trial is the uniform merge, so the best
    score is at least that of the uniform merge.

    Args:
        recipe: experts, prompts, metric, number of trials.
        output: a new folder, or that of an earlier run of this recipe.

    Yields:
        Each finished trial.

    Raises:
        AfaError: if the folder contains something else, or the recipe cannot be loaded.
    """
    require_scheduler(plan_of_search(recipe), recipe.sampling.scheduler)
    prompts = load_prompts(recipe.prompts)
    identity = _identity(recipe, prompts)
    _check_folder(identity, output)
    device = pick_device(recipe.sampling.device)
    scorer = open_scorer(recipe.metric, device, words_of(prompts, recipe.sampling))
    with owned(output), fixed_threads(recipe.sampling.num_threads):
        write_atomic(output / _IDENTITY, json.dumps(identity, indent=2) + "\n")
        yield from _trials(recipe, prompts, scorer, device, output)


def _trials(
    recipe: SearchRecipe,
    prompts: Sequence[Prompt],
    scorer: PictureScorer,
    device: torch.device,
    output: Path,
) -> Iterator[Trial]:
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
    if first > 0:  # the process may have stopped before it wrote the last trial's recipe
        _write_merge(recipe, study, output)
    for number in range(first, recipe.num_trials):
        started = time.perf_counter()
        trial = _ask(study, recipe, number, keys)
        weights = _suggest(trial, keys, len(recipe.experts))
        merged = merged_pipeline(pipeline, BlockWeights(weights))
        score = mean_score(merged, prompts, recipe.sampling, scorer)
        trial.set_user_attr("weights", weights)
        study.tell(trial, score)
        _write_merge(recipe, study, output)
        seconds = time.perf_counter() - started
        yield Trial(number + 1, recipe.num_trials, score, study.best_value, seconds)


def require_same_search(recipe: SearchRecipe, output: Path) -> None:
    """Require that a folder is new or contains an earlier search of this recipe.

    Raises:
        AfaError: if it does not; names what differs.
    """
    _check_folder(_identity(recipe, load_prompts(recipe.prompts)), output)


def _identity(recipe: SearchRecipe, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The inputs that a trial's score depends on; files are identified by their hashes."""
    settings = recipe.model_dump(mode="json", exclude={"num_trials": True, "sampling": {"device"}})
    judge = of_metric(recipe.metric)
    del judge["releases"]  # so that a search can be resumed after an upgrade
    identity = {
        **settings,
        "config": None,
        "parts": [],
        **Identities(recipe).experts(),
        "prompts": [prompt.text for prompt in prompts],
        "metric weights": judge,
    }
    return json.loads(json.dumps(identity))


def _check_folder(identity: dict[str, Any], output: Path) -> None:
    path = output / _IDENTITY
    written = read_json(path) if path.is_file() else None
    if not is_unused(output) and written != identity:
        found = "is neither new nor an earlier search"
        if written is not None:
            found = f"contains a search that differs in {', '.join(differing(written, identity))}"
        raise AfaError(
            "AFA-EVAL-027", f"The output folder '{output}' {found}. Pass another folder."
        )


def _open_study(file: Path) -> optuna.Study:
    """Open the study in a file, and mark interrupted trials as failed."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = file.resolve()
    _repair(file)
    # optuna's own choice is a symbolic link, which needs permissions on Windows
    journal = JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file)))
    study = optuna.create_study(
        study_name="block-weights",
        storage=JournalStorage(journal),
        direction="maximize",
        load_if_exists=True,
    )
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _repair(file: Path) -> None:
    """Remove what a killed process left: the journal's lock, and an incomplete last line.

    This process owns the folder, so no other process can hold the lock.
    """
    for lock in file.parent.glob(f"{file.name}.lock*"):
        lock.unlink()
    content = file.read_bytes() if file.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        write_atomic(file, complete)


def _complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    import optuna

    return study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])


def _ask(
    study: optuna.Study, recipe: SearchRecipe, number: int, keys: Sequence[str]
) -> optuna.Trial:
    """The next trial; its values depend only on the seed, its number and earlier trials."""
    import optuna

    # an interrupted first trial may have left one waiting
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
    """Parameter names: for two experts one per key (weight of the second), else one per expert."""
    if count == 2:
        return list(keys)
    return [f"{key}/{n}" for key in keys for n in range(count)]


def _suggest(trial: optuna.Trial, keys: Sequence[str], count: int) -> dict[str, list[float]]:
    """One weight per expert for each key, with a sum of 1."""
    numbers = {name: trial.suggest_float(name, 0.0, 1.0) for name in _names(keys, count)}
    if count == 2:
        return {key: [1 - numbers[key], numbers[key]] for key in keys}
    weights = {}
    for key in keys:
        raw = [numbers[f"{key}/{n}"] for n in range(count)]
        total = sum(raw)
        weights[key] = [number / total for number in raw] if total > 0 else [1 / count] * count
    return weights


def words_of(prompts: Sequence[Prompt], sampling: SamplingRecipe) -> list[str]:
    """What prompts say, without the syntax of weights."""
    return [words_of_prompt(prompt.text, sampling.prompt_syntax) for prompt in prompts]


def mean_score(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    sampling: SamplingRecipe,
    scorer: PictureScorer,
) -> float:
    """The mean score over all prompts and seeds.

    Raises:
        AfaError: if it is not finite.
    """
    scores: list[float] = []
    texts = [prompt.text for prompt in prompts]
    for seed in sampling.seeds:
        for start in range(0, len(texts), sampling.batch_size):
            places = range(start, min(start + sampling.batch_size, len(texts)))
            chosen = [texts[place] for place in places]
            pictures = draw(pipeline, chosen, places, seed, sampling.num_steps, sampling)
            words = words_of([prompts[place] for place in places], sampling)
            scores += next(iter(scorer(pictures, words).values()))
    mean = float(np.mean(scores))
    if not math.isfinite(mean):
        raise AfaError(
            "AFA-EVAL-028",
            f"The mean score must be finite; got {mean}. Check whether the pictures are black.",
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
