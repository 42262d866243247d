"""Mean fusion weights of an ensemble by expert, site and step."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of
from afa.drafting import way_of
from afa.ensemble.prompt_syntax import words_of_prompt
from afa.ensemble.recording import record_weights
from afa.evaluation.prompts import groups_of
from afa.evaluation.work import digest, draw, drawn_together, write_json
from afa.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.ensemble.recording import WeightRecord
    from afa.evaluation.methods import MethodBuilder
    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.work import Store


def record_shares(
    recipe: EvaluateRecipe, prompts: Sequence[Prompt], builder: MethodBuilder, store: Store
) -> None:
    """Draw the first batch of every group again, and store the subject's mean fusion weights.

    Uses the subject's first replica; does nothing if it is not an ensemble. With guidance, the
    weights are those of the conditional half of the batch.
    """
    method = next(m for m in recipe.methods if m.name == recipe.subject_name)
    path = shares_file(store, recipe)
    if method.ensemble is None or path.exists():
        return
    pipeline = builder.build(method)
    sampling = recipe.sampling_of(method)
    content: dict[str, Any] = {
        "experts": denoiser_of(pipeline).provenance.names,
        "sites": [site.name for site in denoiser_of(pipeline).sites],
        "groups": {},
    }
    for group, places in groups_of(prompts).items():
        first = places[: sampling.batch_size]
        ways: dict[str, list[dict[str, Any]]] = {}
        for batch in drawn_together(pipeline, [prompts[n].text for n in first], sampling):
            chosen = [first[n] for n in batch]
            texts = [prompts[n].text for n in chosen]
            with record_weights(denoiser_of(pipeline)) as record:
                seed, num_steps = sampling.seeds[0], sampling.num_steps
                draw(pipeline, texts, chosen, seed, num_steps, sampling, output_type="latent")
            way = way_of(pipeline, words_of_prompt(texts[0], sampling.prompt_syntax))
            ways.setdefault(way, []).append(_shares(record, len(chosen)))
        for way, batches in ways.items():
            title = group if way == "aggregators" or len(ways) == 1 else f"{group}, by {way}"
            content["groups"][title] = _mean(batches)
    write_json(path, content)


def _shares(record: WeightRecord, count: int) -> dict[str, Any]:
    """The mean weights of the last `count` pictures of a batch, by step and site."""
    return {
        "timesteps": [step.timestep for step in record.steps],
        "shares": [
            {
                site: weights[-count:].float().mean((0, 2, 3)).tolist()
                for site, weights in step.weights.items()
            }
            for step in record.steps
        ],
    }


def _mean(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of batches of equal size."""
    steps = zip(*(batch["shares"] for batch in batches), strict=True)
    return {
        "timesteps": batches[0]["timesteps"],
        "shares": [
            {
                site: [fmean(values) for values in zip(*(s[site] for s in each), strict=True)]
                for site in each[0]
            }
            for each in steps
        ],
    }


def shares_file(store: Store, recipe: EvaluateRecipe) -> Path:
    """The file of the subject's mean weights for these steps, seed and batch size."""
    sampling = recipe.sampling
    drawn: list[Any] = [sampling.num_steps, sampling.seeds[0], sampling.batch_size]
    sparse = next(m for m in recipe.methods if m.name == recipe.subject_name).sparse
    if sparse is not None:
        drawn.append([*sparse.model_dump().values(), "picture"])
    return store.method(recipe.subject_name, 0) / f"weights-{digest(drawn)}.json"


def read_shares(store: Store, recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """Read what `record_shares` stored; returns None if the subject is not an ensemble."""
    path = shares_file(store, recipe)
    return read_json(path) if path.exists() else None
