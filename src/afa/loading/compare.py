"""Compatibility of experts: compares each with the first, by their facts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from diffusers.configuration_utils import FrozenDict

from afa.denoisers.architecture import difference
from afa.denoisers.kinds import kinds
from afa.denoisers.objective import FLOW, PredictionType
from afa.ensemble.conversion import can_convert
from afa.loading.facts import SCHEDULE, facts_of
from afa.loading.finding import Finding, require_none_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from afa.loading.expert_source import Fuse
    from afa.loading.facts import Facts
    from afa.loading.loaded import Expert


def compare(
    experts: Sequence[Facts],
    *,
    allow_duplicates: bool = False,
    converts: bool = True,
    fuse: Fuse = "blocks",
) -> Iterator[Finding]:
    """Find all differences that prevent or impair an ensemble, the most basic first.

    Args:
        experts: their facts; the first expert's settings are those of the ensemble.
        allow_duplicates: whether experts may have the same weights.
        converts: whether predictions of another kind or on another noise schedule are converted, as
            ensembles do it.
        fuse: `predictions` only requires one latent space.
    """
    if not allow_duplicates:
        yield from _duplicates(experts)
    for other in experts[1:]:
        for check in _CHECKS if fuse == "blocks" else _OF_PREDICTIONS:
            found = check(experts[0], other)
            if found is not None and check is _schedule and converts:
                found = _converted(experts[0], other, fuse) or found
            if found is not None:
                yield found
                if check in (_family, _prompted):
                    break  # models of different families have nothing else to compare
    yield from _distilled(experts)
    for expert in experts:
        yield from _single(expert)


def _duplicates(experts: Sequence[Facts]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for expert in experts:
        if expert.identity is None:
            continue
        if expert.identity in first:
            yield Finding(
                "AFA-LOAD-001",
                "error",
                "duplicates",
                f"'{expert.short}' has the same weights as '{first[expert.identity]}'; experts "
                "must differ.",
                "A duplicate only costs time.",
                "Remove it, or set allow_duplicates.",
            )
        first.setdefault(expert.identity, expert.short)


def _family(first: Facts, other: Facts) -> Finding | None:
    if other.kind is first.kind:
        return None
    return Finding(
        "AFA-LOAD-002",
        "error",
        "family",
        f"'{other.name}' is a {other.kind.name} model, '{first.name}' is a {first.kind.name} "
        "model; all experts must be of one family.",
        "Features of different families cannot be fused.",
        "Fuse their predictions: fuse = predictions.",
    )


def _latents(first: Facts, other: Facts) -> Finding | None:
    if not first.latents or not other.latents:
        return None
    for key, ours in first.latents.items():
        theirs = other.latents.get(key)
        if ours != theirs:
            return Finding(
                "AFA-LOAD-003",
                "error",
                "latents",
                f"The autoencoder of '{other.name}' has {key} = {theirs}, that of '{first.name}' "
                f"has {ours}; all experts must share one latent space.",
                "The same latent would decode to different pictures.",
            )
    return None


def _architecture(first: Facts, other: Facts) -> Finding | None:
    model_class = first.kind.family.model_class
    found = difference(first.denoiser, other.denoiser, model_class)
    if found is None:
        return None
    key, ours, theirs = found
    return Finding(
        "AFA-LOAD-004",
        "error",
        "architecture",
        f"'{other.name}' has {key} = {theirs}, the first expert has {ours}; all experts must have "
        "the same architecture.",
        "",
        "Use checkpoints of one family.",
    )


def _encoders(first: Facts, other: Facts) -> Finding | None:
    unsure = first.unsure | other.unsure
    if (first.encoders.keys() ^ other.encoders.keys()) - unsure:
        return Finding(
            "AFA-LOAD-005",
            "error",
            "text encoders",
            f"'{other.name}' has the text encoders {', '.join(other.encoders) or 'none'}, "
            f"'{first.name}' has {', '.join(first.encoders) or 'none'}; all experts must have the "
            "same ones.",
            "",
            "Add the missing text encoders.",
        )
    for name, width in first.encoders.items():
        theirs = other.encoders.get(name)
        if width != theirs and name not in unsure:
            return Finding(
                "AFA-LOAD-006",
                "error",
                "text encoders",
                f"{name} of '{other.name}' has hidden size {theirs}, that of '{first.name}' has "
                f"{width}; they must be equal.",
                "The denoiser cannot read embeddings of another size.",
                "Use the text encoder that the expert was trained with.",
            )
    return None


def _tokenizers(first: Facts, other: Facts) -> Finding | None:
    unsure = {name.replace("text_encoder", "tokenizer") for name in first.unsure | other.unsure}
    if all(
        other.vocabularies.get(part) == ours
        for part, ours in first.vocabularies.items()
        if part not in unsure
    ):
        return None
    return Finding(
        "AFA-LOAD-007",
        "error",
        "tokenizer",
        f"The tokenizer of '{other.name}' has another vocabulary than that of '{first.name}'; all "
        "experts must share one tokenizer.",
        "The same words would become different tokens.",
    )


def _lengths(first: Facts, other: Facts) -> Finding | None:
    """Compare tokenizer settings: the first expert's tokenizers are used for all experts."""
    for name, ours in first.settings.items():
        theirs, most = other.settings.get(name, ours), other.positions.get(name)
        length = ours["model_max_length"]
        if ours != theirs and most is not None and length > most:
            return Finding(
                "AFA-LOAD-008",
                "error",
                "tokenizer",
                f"{name} of '{first.name}' has model_max_length = {length}, but the text encoder "
                f"of '{other.name}' takes at most {most} tokens.",
                "The first expert's tokenizer is used for all experts, so drawing would fail.",
                f"Correct model_max_length in {name}/tokenizer_config.json of '{first.name}', or "
                "list the other expert first.",
            )
        different = [key for key in ours if ours[key] != theirs[key]]
        if different:
            differences = " and ".join(
                f"{key} = {theirs[key]!r} (first expert: {ours[key]!r})" for key in different
            )
            return Finding(
                "AFA-LOAD-009",
                "warning",
                "tokenizer",
                f"{name} of '{other.name}' has {differences}. The first expert's tokenizer "
                "truncates and pads the prompts of all experts.",
                f"'{other.short}' gets other tokens than it does alone.",
                "List the expert with the right tokenizer first, or set equal values in "
                f"{name}/tokenizer_config.json.",
            )
    return None


def _schedule(first: Facts, other: Facts) -> Finding | None:
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


def _converted(first: Facts, other: Facts, fuse: Fuse) -> Finding | None:
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
    effect = "The ensemble draws with the schedule and the sampling settings of the first expert."
    ours_zero, theirs_zero = (_has_zero_snr(expert) for expert in (first, other))
    if ours_zero and not theirs_zero:
        effect = (
            "The first expert's schedule begins with pure noise (zero terminal SNR). There, "
            f"'{other.short}' is used at its own last timestep."
        )
    elif theirs_zero and not ours_zero:
        effect = (
            "The first expert's schedule does not begin with pure noise (zero terminal SNR), so "
            f"very dark and bright pictures of '{other.short}' are lost. List it first to keep "
            "them."
        )
    return Finding(
        "AFA-LOAD-105",
        "note",
        "schedule",
        f"'{other.name}' {what}. Its timesteps and predictions are converted.",
        effect,
    )


def _has_betas(expert: Facts) -> bool:
    return any(expert.schedule.get(key) for key in ("beta_schedule", "trained_betas"))


def _has_zero_snr(expert: Facts) -> bool:
    is_flow = expert.schedule.get("prediction_type") == FLOW
    return is_flow or bool(expert.schedule.get("rescale_betas_zero_snr"))


def _distilled(experts: Sequence[Facts]) -> Iterator[Finding]:
    """Find experts distilled for few steps beside experts that are not."""
    few = [expert for expert in experts if expert.distilled is not None]
    if not few or len(few) == len(experts):
        return
    first = few[0]
    assert first.distilled is not None
    others = ", ".join(f"'{each.short}'" for each in experts if each.distilled is None)
    yield Finding(
        "AFA-LOAD-011",
        "warning",
        "distilled",
        f"'{first.short}' seems to be distilled for few steps ({first.distilled.method}, by "
        f"{first.distilled.where}), but {others} not. Experts should need the same number of steps "
        "and the same guidance.",
        "With many steps and guidance the distilled expert oversaturates; with few steps the "
        "others blur.",
        "Remove it, or combine it with experts that were distilled in the same way.",
    )


def _single(expert: Facts) -> Iterator[Finding]:
    """Find problems of one expert that do not depend on the others."""
    yield from _prediction(expert)
    if expert.unknown:
        yield Finding(
            "AFA-LOAD-012",
            "warning",
            "configuration",
            f"The installed diffusers ignores {', '.join(expert.unknown)} in the denoiser "
            f"configuration of '{expert.name}'.",
            "The model may need it.",
            "Update diffusers, or compare the pictures with those of the program that the model "
            "was made for.",
        )
    zero_snr = expert.schedule.get("rescale_betas_zero_snr")
    predicts = expert.schedule.get("prediction_type")
    if zero_snr and predicts == "epsilon":
        yield Finding(
            "AFA-LOAD-013",
            "error",
            "schedule",
            f"'{expert.name}' has zero terminal SNR and predicts epsilon; with zero terminal SNR "
            "it must predict velocity.",
            "At the first step the latent is pure noise, and epsilon carries no information.",
            "Correct prediction_type in its scheduler_config.json.",
        )
    if zero_snr and expert.spacing not in (None, "trailing"):
        yield Finding(
            "AFA-LOAD-014",
            "warning",
            "schedule",
            f"'{expert.name}' has zero terminal SNR and timestep_spacing '{expert.spacing}'; it "
            "should be 'trailing'.",
            "The first step, at full noise, is skipped, and pictures become grey.",
            "Set timestep_spacing in the first expert's scheduler_config.json.",
        )


def _prediction(expert: Facts) -> Iterator[Finding]:
    """Report a prediction type that is assumed, or that contradicts the file."""
    found = expert.prediction
    if found is None:
        return
    if found.overruled is not None:
        yield Finding(
            "AFA-LOAD-015",
            "warning",
            "prediction",
            f"The recipe sets prediction_type {found.type} for '{expert.name}', but "
            f"{found.overruled}.",
            "If the recipe is wrong, pictures are noise.",
            "Remove prediction_type to use what the file says.",
        )
    if found.is_assumed and found.type != "flow_prediction":
        yield Finding(
            "AFA-LOAD-016",
            "note",
            "prediction",
            f"'{expert.name}' does not say what it predicts; {found.type} is assumed, from "
            f"{found.where}.",
            "If it predicts velocity, pictures are noise.",
            "In that case set {model: FILE, prediction_type: v_prediction}, or for XL models with "
            "zero terminal SNR {model: FILE, config: stable-diffusion-xl-v}.",
        )


_CHECKS: tuple[Callable[[Facts, Facts], Finding | None], ...] = (
    _family,
    _latents,
    _architecture,
    _encoders,
    _tokenizers,
    _lengths,
    _schedule,
)


def _prompted(first: Facts, other: Facts) -> Finding | None:
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


#: what ensembles of predictions need
_OF_PREDICTIONS = (_prompted, _latents, _schedule)


def check_experts(
    experts: Sequence[Expert], *, allow_duplicates: bool = False, fuse: Fuse = "blocks"
) -> None:
    """Check that loaded experts can be ensembled.

    Raises:
        AfaError: if they differ; the first difference, the expert that has it and its effect.
    """
    facts = [facts_of(expert) for expert in experts]
    require_none_wrong(compare(facts, allow_duplicates=allow_duplicates, fuse=fuse))
