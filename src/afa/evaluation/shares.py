"""How much of each expert an ensemble takes, by site and step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.evaluation.prompts import groups_of
from afa.evaluation.recipe import slug
from afa.evaluation.work import noise_of, write_json
from afa.files import read_json
from afa.maps import record_weights

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
    place = shares_file(store, method.name)
    if method.ensemble is None or place.exists():
        return
    pipeline = builder.build(method)
    sampling = recipe.sampling
    content: dict[str, Any] = {
        "experts": [Path(r.source).name.split(":")[-1] for r in pipeline.unet.references],
        "sites": [site.name for site in pipeline.unet.sites],
        "groups": {},
    }
    for group, places in groups_of(prompts).items():
        chosen = places[: sampling.batch_size]
        with torch.no_grad(), record_weights(pipeline.unet) as record:
            pipeline(
                [prompts[n].text for n in chosen],
                num_inference_steps=sampling.num_steps,
                guidance_scale=sampling.guidance,
                height=sampling.height,
                width=sampling.width,
                generator=noise_of(chosen, sampling.seeds[0]),
                output_type="latent",
            )
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


def shares_file(store: Store, method: str) -> Path:
    """Where the mean weights of a method lie."""
    return store.folder / "weights" / f"{slug(method)}.json"


def read_shares(store: Store, method: str) -> dict[str, Any] | None:
    """What `record_shares` has kept; None where the method is no ensemble."""
    place = shares_file(store, method)
    return read_json(place) if place.exists() else None
