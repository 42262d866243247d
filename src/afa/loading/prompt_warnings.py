"""Warn about truncated prompts of a recipe before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.loading.manifest import read_manifest
from afa.loading.truncation import limits_of_folder, prompt_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.loading.planned import Plan


def warnings_of_plan(
    plan: Plan, prompts: Sequence[str], negative_prompt: str = "", guidance: float | None = None
) -> list[str]:
    """Return the warnings about prompts for a plan's models, each line once.

    The first expert's tokenizers of every group are used, as in the ensemble's pipeline; those of
    all experts if their predictions are fused.

    Args:
        plan: of an evaluation, a search or an ensemble.
        guidance: see `afa.loading.truncation.prompt_warnings`.

    Raises:
        AfaError: if an expert cannot be found or read.
    """
    folders = {
        read_manifest(expert, group.companions).config
        for group in plan.groups
        for expert in group.experts[: None if group.fuse == "predictions" else 1]
    }
    lines: dict[str, None] = {}
    for folder in sorted(folders):
        limits, kind = limits_of_folder(folder)
        found = prompt_warnings(limits, prompts, negative_prompt, guidance=guidance, kind=kind)
        lines |= dict.fromkeys(found)
    return list(lines)
