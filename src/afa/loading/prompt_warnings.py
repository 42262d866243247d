"""Warn about truncated prompts of a recipe before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.kinds import kind_of
from afa.ensemble.weighted_prompts import require_weighted
from afa.files import read_json
from afa.loading.manifest import read_manifest
from afa.loading.truncation import limits_of_folder, prompt_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.ensemble.prompt_syntax import PromptSyntax
    from afa.loading.planned import Plan


def warnings_of_plan(
    plan: Plan,
    prompts: Sequence[str],
    negative_prompt: str = "",
    guidance: float | None = None,
    syntax: PromptSyntax | None = None,
) -> list[str]:
    """Return the warnings about prompts for a plan's models, each line once.

    The first expert's tokenizers of every group are used, as in the ensemble's pipeline; those of
    all experts if their predictions are fused.

    Args:
        plan: of an evaluation, a search or an ensemble.
        guidance: see `afa.loading.truncation.prompt_warnings`.
        syntax: of the prompts; None if the user cannot choose it.

    Raises:
        AfaError: if an expert cannot be found or read, or the prompts are weighted and cannot be
            read or encoded by all models.
    """
    if syntax is not None:
        require_syntax(plan, syntax)
    if any(group.fuse == "predictions" for group in plan.groups):
        syntax = None
    folders = {
        read_manifest(expert, group.companions).config
        for group in plan.groups
        for expert in group.experts[: None if group.fuse == "predictions" else 1]
    }
    lines: dict[str, None] = {}
    for folder in sorted(folders):
        limits, kind = limits_of_folder(folder)
        found = prompt_warnings(
            limits, prompts, negative_prompt, guidance=guidance, kind=kind, syntax=syntax
        )
        lines |= dict.fromkeys(found)
    return list(lines)


def require_syntax(plan: Plan, syntax: PromptSyntax) -> None:
    """Require that all models of a plan can draw prompts of a syntax.

    Raises:
        AfaError: if an expert cannot be found or read, or its prompts cannot be weighted.
    """
    for group in plan.groups if syntax == "weighted" else ():
        for expert in group.experts[:1]:
            folder = read_manifest(expert, group.companions).config
            class_name = str(read_json(folder / "model_index.json").get("_class_name"))
            require_weighted(
                kind_of(class_name, folder), fuses_predictions=group.fuse == "predictions"
            )
