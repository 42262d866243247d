"""Steering: a bias towards experts, added to the logits of their fusion weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of
from afa.ensemble.combinations import require_logits
from afa.ensemble.protocol import expert_names
from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.denoisers import Site
    from afa.ensemble.denoiser import EnsembleDenoiser

#: the parts of a denoiser: encoder, bottleneck and decoder
STAGES = ("down", "mid", "up")

#: by an expert's name or number: one bias for the whole denoiser, or one by stage
Bias = Mapping[str, float | Mapping[str, float]]


def steer(pipeline: DiffusionPipeline | EnsembleDenoiser, bias: Bias | None) -> None:
    """Set a bias towards or against experts, for all pictures from now on.

        afa.steer(pipeline, {"animals": 1.0, "food": {"up": -0.5}})

    Fusion weights are the softmax over the experts of the aggregators' logits (AFA, eq. 3). The
    bias is added to these logits. A bias of +1 multiplies an expert's odds against every other by
    e = 2.7 at every pixel; the aggregators still decide where each expert is used. A bias of 0
    changes nothing, bit for bit.

    Args:
        pipeline: a pipeline with an ensemble, or the ensemble itself.
        bias: by the expert's name or its number from 0: one value for the whole denoiser, or values
            by stage, `down`, `mid` and `up`. In a transformer the stages are the first, middle and
            last third of the blocks. It replaces the bias of an earlier call; None removes it.

    Raises:
        AfaError: if the pipeline has no ensemble, an expert or stage is unknown, a value is not
            finite, or the weights of an aggregator are not a softmax of logits.
    """
    from afa.ensemble.denoiser import EnsembleDenoiser

    denoiser: Any = pipeline
    if not isinstance(pipeline, EnsembleDenoiser):
        denoiser = denoiser_of(pipeline)
        if not isinstance(denoiser, EnsembleDenoiser):
            raise AfaError(
                "AFA-ENSEMBLE-051",
                "This pipeline has a single model, and only an ensemble can be steered. Load one "
                "with afa.load_ensemble.",
            )
    denoiser.bias = site_biases(denoiser, bias or {})


def site_biases(denoiser: EnsembleDenoiser, bias: Bias) -> dict[str, torch.Tensor]:
    """The bias [N] of the experts' logits, by site; sites without a bias are left out.

    Raises:
        AfaError: see `steer`.
    """
    names = expert_names(denoiser)
    by_stage = {stage: torch.zeros(len(names)) for stage in STAGES}
    for key, given in bias.items():
        expert = _expert(key, names)
        parts = given if isinstance(given, Mapping) else dict.fromkeys(STAGES, given)
        for stage, value in parts.items():
            if stage not in STAGES:
                raise AfaError(
                    "AFA-ENSEMBLE-052",
                    f"The bias of '{key}' names the unknown stage '{stage}'. Use one of "
                    f"{', '.join(STAGES)}.",
                )
            if not math.isfinite(value):
                raise AfaError(
                    "AFA-ENSEMBLE-053",
                    f"The bias of '{key}' must be a finite number; got {value}.",
                )
            by_stage[stage][expert] += value
    biases = {
        site.name: by_stage[stage]
        for site, stage in zip(denoiser.sites, stages_of(denoiser.sites), strict=True)
        if by_stage[stage].any()
    }
    if biases:
        require_logits(denoiser.aggregators)
    return biases


def stages_of(sites: Sequence[Site]) -> list[str]:
    """The stage (`down`, `mid` or `up`) of every site.

    Args:
        sites: all sites of a denoiser, in their order.
    """
    blocks = [site.block for site in sites]
    if any(block.startswith("up.") for block in blocks):  # a U-Net
        ends = {"conv_in": "down", "conv_out": "up"}
        return [ends.get(block, block.split(".")[0]) for block in blocks]
    distinct = list(dict.fromkeys(blocks))
    return [STAGES[distinct.index(block) * len(STAGES) // len(distinct)] for block in blocks]


def _expert(key: str, names: Sequence[str]) -> int:
    """Find an expert by its name or number, and return its number."""
    stems = [name.removesuffix(".safetensors").removesuffix(".gguf") for name in names]
    for known in (names, stems):
        if known.count(key) == 1:
            return known.index(key)
    if key.isdecimal() and int(key) < len(names):
        return int(key)
    listed = ", ".join(f"{n} {name}" for n, name in enumerate(names))
    found = "several experts" if key in (*names, *stems) else "no expert"
    raise AfaError(
        "AFA-ENSEMBLE-055",
        f"A bias must name one expert, but '{key}' names {found}. Use a number or a unique name "
        f"of: {listed}.",
    )


def parse_bias(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Parse the values of `--bias`: each is `EXPERT=VALUE` or `EXPERT@STAGE=VALUE`; they add up.

    Raises:
        AfaError: if a word has neither form.
    """
    bias: dict[str, dict[str, float]] = {}
    for word in words:
        key, equals, number = word.rpartition("=")
        expert, at, stage = key.rpartition("@")
        if not at or stage not in STAGES:
            expert, stage = key, ""
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not expert or not math.isfinite(value):
            raise AfaError(
                "AFA-ENSEMBLE-056",
                "--bias must be EXPERT=NUMBER or EXPERT@STAGE=NUMBER; got "
                f"'{word}'. Write for example animals=+1.0; stages are {', '.join(STAGES)}.",
            )
        parts = bias.setdefault(expert, dict.fromkeys(STAGES, 0.0))
        for each in [stage] if stage else STAGES:
            parts[each] += value
    return bias
