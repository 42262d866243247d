"""Steering: leaning on one expert, by a bias of the logits that the fusion weights are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import Separate
from afa.denoisers.kinds import denoiser_of
from afa.ensemble.protocol import expert_names
from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.denoisers import Site
    from afa.ensemble.denoiser import EnsembleDenoiser

#: parts of a denoiser: on the way to its coarsest features, there, and on the way back
STAGES = ("down", "mid", "up")

#: by an expert's name or number: for all of the denoiser, or by stage
Bias = Mapping[str, float | Mapping[str, float]]


def steer(pipeline: DiffusionPipeline | EnsembleDenoiser, bias: Bias | None) -> None:
    """Lean on experts, or away from them, in all pictures from now on.

        afa.steer(pipeline, {"animals": 1.0, "food": {"up": -0.5}})

    The fusion weights are a softmax over the experts of what the aggregators say, their logits
    (AFA, eq. 3); the bias is added to these. One of `+1.0` makes an expert's odds against every
    other e = 2.7 times what they were, at every place; the aggregators go on deciding where. A bias
    of 0 is no bias, bit for bit.

    Args:
        pipeline: with an ensemble, or the ensemble itself.
        bias: by the expert's name, or its number from 0; one value for the whole denoiser, or one
            for some of its stages, `down`, `mid` and `up`. In a transformer, which has no such
            stages, they are the first, the middle and the last third of its blocks. None steers no
            more; nothing of an earlier call is kept.

    Raises:
        AfaError: no ensemble, no such expert or stage, a value that is not finite, or aggregators
            whose weights are not made of logits.
    """
    from afa.ensemble.denoiser import EnsembleDenoiser

    denoiser: Any = pipeline
    if not isinstance(pipeline, EnsembleDenoiser):
        denoiser = denoiser_of(pipeline)
        if not isinstance(denoiser, EnsembleDenoiser):
            raise AfaError(
                "AFA-ENSEMBLE-051", "Only an ensemble can be steered; this is a single model."
            )
    denoiser.bias = site_biases(denoiser, bias or {})


def site_biases(denoiser: EnsembleDenoiser, bias: Bias) -> dict[str, torch.Tensor]:
    """What is added to the logits of all experts, [N] by site; only sites where it is not 0.

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
                    f"A bias must be for one of the stages {', '.join(STAGES)}; that of '{key}' "
                    f"names '{stage}'.",
                )
            if not math.isfinite(value):
                raise AfaError(
                    "AFA-ENSEMBLE-053",
                    f"A bias must be a finite number; that of '{key}' is {value}.",
                )
            by_stage[stage][expert] += value
    biases = {
        site.name: by_stage[stage]
        for site, stage in zip(denoiser.sites, stages_of(denoiser.sites), strict=True)
        if by_stage[stage].any()
    }
    rigid = {type(rule).__name__ for rule in denoiser.aggregators if not _can_steer(rule)}
    if biases and rigid:
        raise AfaError(
            "AFA-ENSEMBLE-054",
            "Only aggregators that make weights of logits can be steered; these are "
            f"{', '.join(sorted(rigid))}. Train some: afa train.",
        )
    return biases


def _can_steer(rule: Any) -> bool:
    """Whether a rule's weights are made of logits, or it fuses nothing."""
    return isinstance(rule, Separate) or getattr(rule, "can_steer", False)


def stages_of(sites: Sequence[Site]) -> list[str]:
    """The stage of every site.

    Args:
        sites: of a denoiser, in their order.
    """
    blocks = [site.block for site in sites]
    if any(block.startswith("up.") for block in blocks):  # a U-Net
        ends = {"conv_in": "down", "conv_out": "up"}
        return [ends.get(block, block.split(".")[0]) for block in blocks]
    distinct = list(dict.fromkeys(blocks))
    return [STAGES[distinct.index(block) * len(STAGES) // len(distinct)] for block in blocks]


def _expert(key: str, names: Sequence[str]) -> int:
    """The number of an expert by its name or number."""
    stems = [name.removesuffix(".safetensors") for name in names]
    for known in (names, stems):
        if known.count(key) == 1:
            return known.index(key)
    if key.isdecimal() and int(key) < len(names):
        return int(key)
    listed = ", ".join(f"{n} {name}" for n, name in enumerate(names))
    what = "several" if key in (*names, *stems) else "none"
    raise AfaError(
        "AFA-ENSEMBLE-055",
        f"A bias must name one expert, by name or number, of {listed}; '{key}' names {what}.",
    )


def parse_bias(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """A bias as the command line has it: `EXPERT=VALUE` or `EXPERT@STAGE=VALUE`, added up.

    Raises:
        AfaError: a word that is neither.
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
                "--bias must be EXPERT=NUMBER or EXPERT@STAGE=NUMBER with a stage of "
                f"{', '.join(STAGES)}, such as animals=+1.0; came '{word}'.",
            )
        parts = bias.setdefault(expert, dict.fromkeys(STAGES, 0.0))
        for each in [stage] if stage else STAGES:
            parts[each] += value
    return bias
