"""What a command would load, group by group, and what it would do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.aggregators import SABWConfig
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.expert_source import first_folder
from afa.loading.published import is_published, published_aggregators, published_experts
from afa.loading.saved import read_config, saved_aggregators, sources_in
from afa.loading.single_file.load import Companions
from afa.loading.weights import hash_files, weights_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.loading.expert_source import AnySource

from dataclasses import dataclass

import torch

from afa.loading.memory.needs import Training

_NUM_STEPS = 50  # of a picture, where nobody says


@dataclass(frozen=True)
class Work:
    """What is to be done, whoever does it.

    Attributes:
        device: where.
        batch: of a step, as `batch_name` counts it.
        batch_name: what a recipe calls it; None where it is one picture and cannot be smaller.
        samples_each: how many samples one of the batch is; a picture with guidance is two.
        num_steps: of the whole training, or of a picture.
        pixels: height times width of a picture; None for what the experts were made for.
        training: of aggregators; None where pictures are drawn.
        is_offloaded: whether the experts' layers come to the device one at a time.
    """

    device: torch.device
    batch: int
    batch_name: str | None = None
    samples_each: int = 1
    num_steps: int = 1
    pixels: int | None = None
    training: Training | None = None
    is_offloaded: bool = False


@dataclass(frozen=True)
class Group:
    """Experts that are to work together.

    Attributes:
        label: what they are for.
        experts: as recipes name them.
        companions: what single files leave out.
        aggregators: of all sites; None for the mean, or where there is nothing to fuse.
        allow_duplicates: whether one may be named twice.
        is_loose: whether it may be of a kind that nothing is known of, as what is merged may.
        num_experts: where one folder holds several; None where each is named.
        encoder_sets: likewise, how many different text encoders they have.
        is_drawn: whether they draw, with the first one's autoencoder; not what merges begin with.
    """

    label: str
    experts: Sequence[AnySource]
    companions: Companions
    aggregators: SABWConfig | None = None
    allow_duplicates: bool = False
    is_loose: bool = False
    num_experts: int | None = None
    encoder_sets: int | None = None
    is_drawn: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything that a recipe would load.

    Attributes:
        groups: of experts, each loaded by itself.
        work: of every group; None where no step is taken.
    """

    groups: Sequence[Group]
    work: Work | None = None


def plan_of_ensemble(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    samples_each: int = 2,
    num_steps: int = _NUM_STEPS,
    pixels: int | None = None,
) -> Plan:
    """Of `afa generate`; as it is without options, one picture with guidance."""
    work = Work(device, 1, samples_each=samples_each, num_steps=num_steps, pixels=pixels)
    return Plan([group_of_ensemble("ensemble", folder, dtype)], work)


def companions_of(recipe: Any, dtype: torch.dtype) -> Companions:
    """What single files of a recipe's experts leave out, and where it is."""
    return Companions(
        dtype,
        config=recipe.config,
        fallback=first_folder(recipe.experts),
        parts=recipe.parts or (),
        own_vae=recipe.vae is None,
    )


def group_of_ensemble(label: str, folder: str | Path, dtype: torch.dtype) -> Group:
    """The experts that an ensemble's folder names; of the published code's the folder itself."""
    place = ensemble_folder(folder)
    if is_published(place):
        inside = published_experts(place)
        encoders = {hash_files(part, weights_in(part)[1]) for _, part in inside}
        return Group(
            label,
            [place],
            Companions(dtype),
            published_aggregators(place),
            num_experts=len(inside),
            encoder_sets=len(encoders),
        )
    saved = read_config(place)
    experts, config, parts = sources_in(saved, place)
    return Group(
        label,
        experts,
        Companions(
            dtype,
            config=config,
            fallback=first_folder(experts),
            parts=parts,
            own_vae=saved["vae"] is None or saved["vae"]["source"] == saved["experts"][0]["source"],
        ),
        saved_aggregators(saved),
        allow_duplicates=True,  # whoever trained it has allowed them
    )
