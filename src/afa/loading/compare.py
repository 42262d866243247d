"""Compatibility of experts: compares each with the first, by their facts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.architecture import difference
from afa.loading.compare_predictions import conversion, prompt_problem, schedule_difference
from afa.loading.facts import facts_of
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
    fuse: Fuse | None = "blocks",
) -> Iterator[Finding]:
    """Find all differences that prevent or impair an ensemble, the most basic first.

    Args:
        experts: their facts; the first expert's settings are those of the ensemble.
        allow_duplicates: whether experts may have the same weights.
        converts: whether predictions of another kind or on another noise schedule are converted, as
            ensembles do it.
        fuse: `predictions` only requires one latent space; None as in `afa.load_pipeline`.
    """
    if not allow_duplicates:
        yield from _duplicates(experts)
    for other in experts[1:]:
        for check in _OF_PREDICTIONS if fuse == "predictions" else _CHECKS:
            found = check(experts[0], other)
            if found is not None and check is schedule_difference and converts:
                found = conversion(experts[0], other, fuse) or found
            if found is not None:
                yield found
                if check in (_family, prompt_problem):
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
        "An ensemble can fuse their predictions: fuse = predictions.",
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
    schedule_difference,
)


#: what ensembles of predictions need
_OF_PREDICTIONS = (prompt_problem, _latents, schedule_difference)


def check_experts(
    experts: Sequence[Expert], *, allow_duplicates: bool = False, fuse: Fuse | None = "blocks"
) -> None:
    """Check that loaded experts can be ensembled.

    Raises:
        AfaError: if they differ; the first difference, the expert that has it and its effect.
    """
    facts = [facts_of(expert) for expert in experts]
    require_none_wrong(compare(facts, allow_duplicates=allow_duplicates, fuse=fuse))
