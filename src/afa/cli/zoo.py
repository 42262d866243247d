"""`afa zoo`: the embedded emoji scenes, their experts and judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.console import console, quieten_loading, require_new_folder, show_steps

app = typer.Typer(
    help="The embedded emoji scenes, their experts and judges.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def build(
    workdir: Annotated[Path, typer.Argument(help="Work folder; an earlier run's goes on.")],
    font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf; by default the shipped sprites.")
    ] = None,
) -> None:
    """Make the whole zoo again: sprites, autoencoder, base, experts, judges. Takes hours.

    [bold]Example[/bold]: afa zoo build work --font NotoColorEmoji.ttf
    """
    from afa.zoo.build import build_zoo

    quieten_loading()
    show_steps(build_zoo(workdir, font=font), "zoo")
    console.print(f"The zoo is in {workdir / 'assets'}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write base and experts as stock Stable Diffusion pipeline folders.

    [bold]Example[/bold]: afa zoo export zoo
    """
    require_new_folder(directory)
    from afa.zoo import MODELS, export_zoo

    export_zoo(directory)
    console.print(f"{', '.join(MODELS)} in {directory}")
