"""Do experts fit each other? Every one beside the first, by facts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.architecture import difference
from afa.loading.facts import SCHEDULE, facts_of
from afa.loading.finding import Finding, require_none_wrong
from afa.loading.loaded import LATENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from afa.loading.facts import Facts
    from afa.loading.loaded import Expert


def compare(experts: Sequence[Facts], *, allow_duplicates: bool = False) -> Iterator[Finding]:
    """All that keeps experts from being ensembled, the most basic first.

    Args:
        experts: of all of them.
        allow_duplicates: whether one may be named twice.
    """
    if not allow_duplicates:
        yield from _duplicates(experts)
    for other in experts[1:]:
        for check in _CHECKS:
            found = check(experts[0], other)
            if found is not None:
                yield found
                if check is _family:
                    break  # nothing else of it can be compared
    yield from _distilled(experts)
    for expert in experts:
        yield from _alone(expert)


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
                f"Experts must differ: '{expert.short}' has the same weights as "
                f"'{first[expert.identity]}'.",
                "It would only cost time;",
                "leave it out, or set allow_duplicates.",
            )
        first.setdefault(expert.identity, expert.short)


def _family(first: Facts, other: Facts) -> Finding | None:
    if other.kind is first.kind:
        return None
    return Finding(
        "AFA-LOAD-002",
        "error",
        "family",
        f"Experts must be of one family: '{other.name}' is a {other.kind.name} model, "
        f"'{first.name}' is of {first.kind.name}.",
        "Their features have nothing in common.",
    )


def _latents(first: Facts, other: Facts) -> Finding | None:
    if not first.latents or not other.latents:
        return None
    for key in LATENTS:
        ours, theirs = first.latents[key], other.latents[key]
        if ours != theirs:
            return Finding(
                "AFA-LOAD-003",
                "error",
                "latents",
                f"Experts must share one space of latents: the autoencoder of '{other.name}' has "
                f"{key} = {theirs}, that of '{first.name}' has {ours}.",
                "The same numbers would mean different pictures.",
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
        f"Experts must share one architecture: '{other.name}' has {key} = {theirs}, the first "
        f"expert has {ours}.",
        "",
        "Ensemble checkpoints of one family.",
    )


def _encoders(first: Facts, other: Facts) -> Finding | None:
    unsure = first.unsure | other.unsure
    if (first.encoders.keys() ^ other.encoders.keys()) - unsure:
        return Finding(
            "AFA-LOAD-005",
            "error",
            "text encoders",
            f"Experts must have the same text encoders: '{other.name}' has "
            f"{', '.join(other.encoders) or 'none'}, '{first.name}' has "
            f"{', '.join(first.encoders) or 'none'}.",
            "",
            "Add what is missing.",
        )
    for name, width in first.encoders.items():
        theirs = other.encoders.get(name)
        if width != theirs and name not in unsure:
            return Finding(
                "AFA-LOAD-006",
                "error",
                "text encoders",
                f"Experts must have text encoders of one width: {name} of '{other.name}' is "
                f"{theirs} wide, that of '{first.name}' {width}.",
                "The denoiser could not read it.",
                "Take the text encoder that the expert was trained with.",
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
        f"Experts must share one tokenizer: that of '{other.name}' has another vocabulary than "
        f"that of '{first.name}'.",
        "The same words would mean different tokens.",
    )


def _lengths(first: Facts, other: Facts) -> Finding | None:
    """The first expert's tokenizers read the prompts of all; the others' are not used."""
    for name, ours in first.settings.items():
        theirs, most = other.settings.get(name, ours), other.positions.get(name)
        length = ours["model_max_length"]
        if ours != theirs and most is not None and length > most:
            return Finding(
                "AFA-LOAD-008",
                "error",
                "tokenizer",
                f"The first expert's tokenizer reads the prompts of all: {name} of '{first.name}' "
                f"has model_max_length = {length}, and the text encoder of '{other.name}' takes "
                f"{most} tokens.",
                "Pictures could not be drawn.",
                f"Correct model_max_length in {name}/tokenizer_config.json of '{first.name}', or "
                "put the other expert first.",
            )
        different = [key for key in ours if ours[key] != theirs[key]]
        if different:
            told = " and ".join(
                f"{key} = {theirs[key]!r} (the first: {ours[key]!r})" for key in different
            )
            return Finding(
                "AFA-LOAD-009",
                "warning",
                "tokenizer",
                f"Experts should read prompts alike: {name} of '{other.name}' has {told}. The "
                "first expert's tokenizer cuts and fills up the prompts of all.",
                f"'{other.short}' gets other tokens than it does alone.",
                "Put the expert first whose tokenizer is right, or make them alike in "
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
                f"Experts must share one noise schedule and objective: '{other.name}' has {key} = "
                f"{theirs}, the first expert has {ours}.",
                "Their predictions cannot be mixed.",
            )
    return None


def _distilled(experts: Sequence[Facts]) -> Iterator[Finding]:
    """Models for few steps beside models for many."""
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
        f"{first.distilled.where}), {others} not. Experts should take the same number of steps and "
        "the same guidance.",
        "With many steps and guidance the distilled one burns out, with few the others blur.",
        "Leave it out, or combine it with experts that were distilled in the same way.",
    )


def _alone(expert: Facts) -> Iterator[Finding]:
    """What is odd about one expert by itself."""
    yield from _prediction(expert)
    if expert.unknown:
        yield Finding(
            "AFA-LOAD-012",
            "warning",
            "configuration",
            f"The installed diffusers does not know {', '.join(expert.unknown)} in the denoiser's "
            f"configuration of '{expert.name}', and ignores it.",
            "The model may need it.",
            "Compare its pictures with those of the program it was made for, or update diffusers.",
        )
    zero_snr = expert.schedule.get("rescale_betas_zero_snr")
    predicts = expert.schedule.get("prediction_type")
    if zero_snr and predicts == "epsilon":
        yield Finding(
            "AFA-LOAD-013",
            "error",
            "schedule",
            f"With zero terminal SNR an expert must predict velocity; '{expert.name}' predicts "
            "epsilon.",
            "At the first step the picture is noise alone, of which epsilon says nothing.",
            "Correct prediction_type in its scheduler_config.json.",
        )
    if zero_snr and expert.spacing not in (None, "trailing"):
        yield Finding(
            "AFA-LOAD-014",
            "warning",
            "schedule",
            f"With zero terminal SNR, timesteps should be spaced 'trailing'; '{expert.name}' has "
            f"'{expert.spacing}'.",
            "The first step, at full noise, is left out, and pictures come out grey.",
            "Set timestep_spacing in the first expert's scheduler_config.json.",
        )


def _prediction(expert: Facts) -> Iterator[Finding]:
    """What a single file predicts, where that is an assumption or against what the file says."""
    found = expert.prediction
    if found is None:
        return
    if found.overruled is not None:
        yield Finding(
            "AFA-LOAD-015",
            "warning",
            "prediction",
            f"'{expert.name}' is used as a model that predicts {found.type}, as the recipe says; "
            f"{found.overruled}.",
            "If the recipe is wrong, pictures are noise.",
            "Leave prediction_type out to believe the file.",
        )
    if found.is_assumed and found.type != "flow_prediction":
        yield Finding(
            "AFA-LOAD-016",
            "note",
            "prediction",
            f"'{expert.name}' is assumed to predict {found.type}, as {found.where} does; nothing "
            "in the file says so.",
            "If it predicts velocity, pictures are noise.",
            "Then name it as {model: FILE, prediction_type: v_prediction}; with zero terminal SNR, "
            "as XL models have it, as {model: FILE, config: stable-diffusion-xl-v}.",
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


def check_experts(experts: Sequence[Expert], *, allow_duplicates: bool = False) -> None:
    """Refuse experts that are loaded and do not fit each other.

    Args:
        experts: all of them.
        allow_duplicates: whether one may be named twice.

    Raises:
        AfaError: names the first difference, which expert has it, and what it would do.
    """
    facts = [facts_of(expert) for expert in experts]
    require_none_wrong(compare(facts, allow_duplicates=allow_duplicates))


def check_facts(experts: Sequence[Facts]) -> None:
    """The same before anything is loaded; equal weights are not seen.

    Args:
        experts: each once.

    Raises:
        AfaError: see `check_experts`.
    """
    require_none_wrong(compare(experts))
