"""Plans: the models that a command would load, in groups, and the work with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import SABWConfig
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.expert_source import first_folder
from afa.loading.memory.needs import Training
from afa.loading.published import is_published, published_aggregators, published_experts
from afa.loading.saved import read_config, saved_aggregators, sources_in
from afa.loading.single_file.load import Companions
from afa.loading.weights import hash_files, weights_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.loading.expert_source import AnySource, Fuse

_NUM_STEPS = 50  # default number of steps for a picture


@dataclass(frozen=True)
class Work:
    """The work to be done with each group of experts.

    Attributes:
        device: that computes.
        batch: size of a step's batch, in units of `batch_name`.
        batch_name: its key in the recipe; None for one picture, which cannot be smaller.
        samples_each: samples per unit of the batch; two for a picture with guidance.
        num_steps: of the complete training, or of a picture.
        pixels: height times width of a picture; None for the experts' native resolution.
        training: of aggregators; None if pictures are drawn.
        is_offloaded: whether the experts' layers are moved to the device one at a time.
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
    """Experts that are loaded together.

    Attributes:
        label: their purpose, for messages.
        experts: as in recipes.
        companions: parts missing in single files.
        aggregators: of all sites; None for the mean, or if there is nothing to fuse.
        allow_duplicates: whether the same expert may be listed twice.
        is_loose: whether they may be of an unknown kind, as models to merge may be.
        num_experts: for one folder that contains several; None if each is listed.
        encoder_sets: likewise, the number of different sets of text encoders.
        is_drawn: whether they draw, with the first one's autoencoder; not the inputs of merges.
        is_merged: whether their weights are merged, so that all must predict the same quantity.
        fuse: what is fused; None as in `afa.load_pipeline`.
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
    is_merged: bool = False
    fuse: Fuse | None = "blocks"


@dataclass(frozen=True)
class Plan:
    """Everything that a recipe would load.

    Attributes:
        groups: of experts, each loaded separately.
        work: of every group; None if no step is computed.
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
    judge: AnySource | None = None,
) -> Plan:
    """Plan `afa generate`; by default one picture with guidance and without a judge of drafts."""
    work = Work(device, 1, samples_each=samples_each, num_steps=num_steps, pixels=pixels)
    groups = [group_of_ensemble("ensemble", folder, dtype)]
    if judge is not None:
        groups.append(Group("judge", [judge], companions_of_ensemble(folder, dtype)))
    return Plan(groups, work)


def companions_of(recipe: Any, dtype: torch.dtype) -> Companions:
    """Return the sources of parts that single files among a recipe's experts lack."""
    return Companions(
        dtype,
        config=recipe.config,
        fallback=first_folder(recipe.experts),
        parts=recipe.parts or (),
        own_vae=recipe.vae is None,
    )


def companions_of_ensemble(folder: str | Path, dtype: torch.dtype) -> Companions:
    """The sources of parts that a single file beside an ensemble's experts lacks."""
    group = group_of_ensemble("ensemble", folder, dtype)
    return replace(group.companions, own_vae=True)  # a single model has its own autoencoder


def group_of_ensemble(label: str, folder: str | Path, dtype: torch.dtype) -> Group:
    """Group the experts of an ensemble folder; for the published code, the folder itself."""
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
        allow_duplicates=True,  # were allowed in training
        fuse=saved["fuse"],
    )
