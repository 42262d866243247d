"""`afa zoo`: the embedded emoji scenes, their experts and judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from afa.cli.console import console, progress_bar, require_new_folder, show_steps
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(
    help="The embedded emoji scenes, their experts and judges.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def build(
    workdir: Annotated[Path, typer.Argument(help="Work folder; an earlier run's goes on.")],
    family: Annotated[
        Literal["unet", "dit"], typer.Option(help="U-Nets, which ship; or diffusion transformers.")
    ] = "unet",
    font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf; by default the shipped sprites.")
    ] = None,
) -> None:
    """Make a zoo: a base model and its three experts. Takes hours.

    `unet` makes what ships, from the sprites on: autoencoder, models, judges, ensemble. `dit` makes
    a second zoo of PixArt's kind, with the shipped autoencoder and judges.

    [bold]Example[/bold]: afa zoo build work/dit --family dit
    """
    quieten_loading()
    if family == "dit":
        from afa.studies.zoo_build.transformer import build_transformer_zoo
        from afa.zoo import MODELS

        if font is not None:
            raise AfaError("--font is for --family unet; transformers are shown the same sprites.")
        show_steps(build_transformer_zoo(workdir), "zoo")
        console.print(f"The zoo is in {workdir}: {', '.join(MODELS)}")
        return
    from afa.studies.zoo_build.build import build_zoo

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


@app.command()
def results(
    workdir: Annotated[Path, typer.Argument(help="Work folder; an earlier run's goes on.")],
    docs: Annotated[Path, typer.Option(help="Gets results.md, results.json and drawings.")],
    processes: Annotated[
        int | None, typer.Option(min=1, help="One thread each; by default one for each core.")
    ] = None,
    zoo: Annotated[
        Path | None, typer.Option(help="Of `afa zoo build --family dit`; by default the shipped.")
    ] = None,
) -> None:
    """Train and compare every way of combining the experts, and write the page of results.

    Takes over an hour on two cores; the same command goes on where it was stopped. With --zoo the
    experts are that zoo's, and what comes of it a section of the page.

    [bold]Example[/bold]: afa zoo results runs/results --docs docs
    """
    from afa.studies.results.jobs import JobProgress
    from afa.studies.results.plan import SHIPPED, transformers
    from afa.studies.results.run import run_study

    quieten_loading()
    studied = SHIPPED if zoo is None else transformers(zoo)
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}
        for event in run_study(workdir, docs, num_processes=processes, zoo=studied):
            if isinstance(event, JobProgress):
                if event.name not in tasks:
                    tasks[event.name] = progress.add_task(event.name, total=event.total, note="")
                progress.update(tasks[event.name], completed=event.done)
            else:
                console.print(f"Next: {event.name}")
    console.print(f"Page in {docs / 'results.md'}, figures in {docs / 'results.json'}")
