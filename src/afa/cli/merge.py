"""`afa merge`: merge several checkpoints into one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.console import say
from afa.cli.progress import Progress

if TYPE_CHECKING:
    from afa.merging import MergePlan

_MB = 10**6


def merge(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file: method, experts, settings of the method.")
    ],
    output: Annotated[
        Path, typer.Option(help="New folder, or a new .safetensors file if the experts are files.")
    ],
) -> None:
    """Merge checkpoints into one, with one tensor of each in memory at a time.

    Methods: weighted, add_difference, slerp, ties, dare, block_weights.

    [bold]Example[/bold]: afa merge merge.yaml --output merged
    """
    from afa.merging import load_merge_recipe, plan_merge

    plan = plan_merge(load_merge_recipe(recipe), output)
    say(_announcement(plan))
    _show(plan)
    say(_how_to_use(plan))


def _announcement(plan: MergePlan) -> str:
    from afa.merging.report import notes

    recipe = plan.recipe
    lines = [
        f"Merging {len(plan.tensors)} tensors of {len(plan.experts)} experts ({recipe.method}) "
        f"into {plan.num_bytes / 1e9:.2f} GB: {', '.join(recipe.experts)}"
    ]
    return "\n".join([*lines, *notes(plan)])


def _show(plan: MergePlan) -> None:
    """Run a merge, and show the MB that were hashed and then merged."""
    from afa.merging import run_merge

    with Progress() as progress:
        for step in run_merge(plan):
            tensors = f"{step.num_tensors}/{step.total_tensors} tensors"
            progress.update(
                step.stage,
                step.num_bytes // _MB,
                step.total_bytes // _MB,
                tensors if step.stage == "merge" else "",
                "MB",
            )


def _how_to_use(plan: MergePlan) -> str:
    if plan.output.is_dir():
        return (
            f"Merged pipeline in {plan.output}. Load it like any other: "
            f"StableDiffusionPipeline.from_pretrained('{plan.output}')"
        )
    return (
        f"Merged checkpoint in {plan.output}. Load it like its experts: in ComfyUI, the web UIs "
        f"or afa.load_pipeline(['{plan.output}'])"
    )
