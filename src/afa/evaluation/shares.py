"""How much of each expert an ensemble takes, by site and step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of
from afa.ensemble.recording import record_weights
from afa.evaluation.prompts import groups_of
from afa.evaluation.work import digest, draw, write_json
from afa.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.evaluation.methods import MethodBuilder
    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.work import Store


def record_shares(
    recipe: EvaluateRecipe, prompts: Sequence[Prompt], builder: MethodBuilder, store: Store
) -> None:
    """Draw the first batch of every group once more and keep the subject's mean weights.

    Of the subject's first replica; nothing where it is no ensemble. With guidance, the weights are
    those of the prompted half.
    """
    method = next(m for m in recipe.methods if m.name == recipe.subject_name)
    place = shares_file(store, recipe)
    if method.ensemble is None or place.exists():
        return
    pipeline = builder.build(method)
    sampling = recipe.sampling
    content: dict[str, Any] = {
        "experts": denoiser_of(pipeline).provenance.names,
        "sites": [site.name for site in denoiser_of(pipeline).sites],
        "groups": {},
    }
    for group, places in groups_of(prompts).items():
        chosen = places[: sampling.batch_size]
        with record_weights(denoiser_of(pipeline)) as record:
            texts = [prompts[n].text for n in chosen]
            seed, num_steps = sampling.seeds[0], sampling.num_steps
            draw(pipeline, texts, chosen, seed, num_steps, sampling, output_type="latent")
        content["groups"][group] = {
            "timesteps": [step.timestep for step in record.steps],
            "shares": [
                {
                    site: weights[-len(chosen) :].float().mean((0, 2, 3)).tolist()
                    for site, weights in step.weights.items()
                }
                for step in record.steps
            ],
        }
    write_json(place, content)


def shares_file(store: Store, recipe: EvaluateRecipe) -> Path:
    """Where the subject's mean weights lie, for these steps, batches and this seed."""
    sampling = recipe.sampling
    drawn = [sampling.num_steps, sampling.seeds[0], sampling.batch_size]
    return store.method(recipe.subject_name, 0) / f"weights-{digest(drawn)}.json"


def read_shares(store: Store, recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """What `record_shares` has kept; None where the subject is no ensemble."""
    place = shares_file(store, recipe)
    return read_json(place) if place.exists() else None
