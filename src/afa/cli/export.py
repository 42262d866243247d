"""`afa export`: write a pipeline folder as a single file that every program loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from afa.cli.console import say
from afa.cli.progress import Progress

if TYPE_CHECKING:
    from afa.exporting import ExportPlan

_MB = 10**6


def export(
    source: Annotated[str, typer.Argument(help="Diffusers folder, hub id, or zoo:animals.")],
    output: Annotated[Path, typer.Option(help="New .safetensors file.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision of the weights; by default that of the source."),
    ] = None,
) -> None:
    """Write a model as one file, as ComfyUI, the web UIs and diffusers load it.

    The file has denoiser, text encoders and autoencoder in the layout of the original code: Stable
    Diffusion 1.x, 2.x, XL, 3.x, Flux, Chroma or Z-Image. An ensemble cannot be exported.

    [bold]Example[/bold]: afa export merged --output merged.safetensors --dtype float16
    """
    from afa.exporting import plan_export

    plan = plan_export(source, output, dtype)
    _show(plan)


def _show(plan: ExportPlan) -> None:
    from afa.exporting import run_export

    size = f"{plan.num_bytes / 1e9:.2f} GB"
    say(f"Writing {len(plan.tensors)} tensors of '{plan.source}' into {size}")
    for note in plan.notes:
        say(f"note: {note}")
    with Progress() as progress:
        for step in run_export(plan):
            if step.num_bytes == step.total_bytes and 0 < step.num_tensors < step.total_tensors:
                continue  # markers without values follow; the last line is written once
            tensors = f"{step.num_tensors}/{step.total_tensors} tensors"
            progress.update(
                step.stage,
                step.num_bytes // _MB,
                step.total_bytes // _MB,
                tensors if step.stage == "export" else "",
                "MB",
            )
    say(
        f"One file: {plan.output}. Put it into the checkpoints of ComfyUI or a web UI, or name it "
        "wherever afa takes a model"
    )
