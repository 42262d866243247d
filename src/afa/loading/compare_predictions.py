"""Compatibility of what experts predict: noise schedules, their conversion, and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from diffusers.configuration_utils import FrozenDict

from afa.denoisers.kinds import kinds
from afa.denoisers.objective import FLOW, PredictionType
from afa.ensemble.conversion import can_convert
from afa.loading.facts import SCHEDULE
from afa.loading.finding import Finding, Level

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.loading.expert_source import Fuse
    from afa.loading.facts import Facts


def schedule_difference(first: Facts, other: Facts) -> Finding | None:
    """Check that two experts have one noise schedule and predict the same quantity."""
    for key in SCHEDULE:
        ours, theirs = first.schedule.get(key), other.schedule.get(key)
        if (ours or None) != (theirs or None):
            return Finding(
                "AFA-LOAD-010",
                "error",
                "schedule",
                f"'{other.name}' has {key} = {theirs}, the first expert has {ours}; all experts "
                "must have the same noise schedule and prediction type.",
                "Their predictions cannot be converted into one kind.",
            )
    return None


def conversion(first: Facts, other: Facts, fuse: Fuse | None) -> Finding | None:
    """Report that the predictions of an expert are converted; None if they cannot be."""
    predicts = [expert.schedule.get("prediction_type") for expert in (first, other)]
    is_known = all(
        kind in get_args(PredictionType) and (kind == FLOW or _has_betas(expert))
        for kind, expert in zip(predicts, (first, other), strict=True)
    )
    is_other = any(
        expert.schedule.get("noise_levels") or expert.schedule.get("timesteps")
        for expert in (first, other)
    )
    if is_other or not (is_known and (fuse == "predictions" or can_convert(first.kind.family))):
        return None
    ours, theirs = predicts
    what = f"has another noise schedule than '{first.name}'"
    if ours != theirs:
        what = f"predicts {theirs}, '{first.name}' predicts {ours}"
    level: Level = "note"
    remedy = ""
    effect = "The ensemble draws with the schedule and the sampling settings of the first expert."
    ours_zero, theirs_zero = (_has_zero_snr(expert) for expert in (first, other))
    if ours_zero and not theirs_zero:
        effect = (
            "The first expert's schedule begins with pure noise (zero terminal SNR). There, "
            f"'{other.short}' is used at its own last timestep."
        )
        if fuse is None:
            effect += (
                " Predictions alone are fused, since features of such experts fuse worse; set fuse "
                "= blocks for features."
            )
    elif theirs_zero and not ours_zero:
        effect = (
            "The first expert's schedule does not begin with pure noise (zero terminal SNR), so "
            f"very dark and bright pictures of '{other.short}' are lost, and aggregators choose "
            "experts worse."
        )
        if theirs != FLOW:  # whose pipeline may not be able to draw for the others
            level, remedy = "warning", f"List '{other.short}' first."
    return Finding(
        "AFA-LOAD-105",
        level,
        "schedule",
        f"'{other.name}' {what}. Its timesteps and predictions are converted.",
        effect,
        remedy,
    )


def prefers_predictions(experts: Sequence[Facts]) -> bool:
    """Whether predictions alone are fused by default; see `afa.ensemble.conversion.Objectives`."""
    begin = [_has_zero_snr(expert) for expert in experts]
    return begin[0] and not all(begin)


def _has_betas(expert: Facts) -> bool:
    return any(expert.schedule.get(key) for key in ("beta_schedule", "trained_betas"))


def _has_zero_snr(expert: Facts) -> bool:
    is_flow = expert.schedule.get("prediction_type") == FLOW
    return is_flow or bool(expert.schedule.get("rescale_betas_zero_snr"))


def prompt_problem(first: Facts, other: Facts) -> Finding | None:
    """Check that experts draw from prompts, and that the first one's pipeline can call the rest."""
    if other.denoiser.get("time_cond_proj_dim"):
        return Finding(
            "AFA-LOAD-121",
            "error",
            "family",
            f"'{other.name}' embeds the scale of guidance (as LCM models do), which the first "
            "expert's pipeline does not pass.",
            "It would draw as with another scale.",
            "List it first, or remove it.",
        )
    for expert in (first, other):
        channels = expert.latents.get("latent_channels")
        if expert.kind.conditioning is not None and channels is not None:
            own = expert.kind.latent_channels(FrozenDict(expert.denoiser))
            if own != channels:
                return Finding(
                    "AFA-LOAD-122",
                    "error",
                    "family",
                    f"'{expert.name}' takes {own} channels, and its autoencoder has {channels}: it "
                    "is for another task, such as inpainting.",
                    "",
                    "Use a text-to-image model.",
                )
        if expert.kind.conditioning is None:
            return Finding(
                "AFA-LOAD-106",
                "error",
                "family",
                f"'{expert.name}' is a {expert.kind.name} model, which does not draw from prompts.",
                "",
                "Remove it.",
            )
    if not first.kind.carries_prompts:
        named = ", ".join(kind.name for kind in kinds() if kind.carries_prompts)
        return Finding(
            "AFA-LOAD-107",
            "error",
            "family",
            f"The first expert, '{first.name}', is a {first.kind.name} model, whose pipeline "
            f"cannot pass the prompt to the others; it must be one of {named}.",
            "",
            "List another expert first.",
        )
    return None
