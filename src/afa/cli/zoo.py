"""`afa zoo`: the embedded emoji scenes, their experts and judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from afa.cli.console import require_new_folder, say
from afa.cli.progress import Progress
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from afa.studies.zoo_build.fit import FitStep

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
            raise AfaError(
                "AFA-CLI-023",
                "--font is for --family unet; transformers are shown the same sprites.",
            )
        _show(build_transformer_zoo(workdir))
        say(f"The zoo is in {workdir}: {', '.join(MODELS)}")
        return
    from afa.studies.zoo_build.build import build_zoo

    _show(build_zoo(workdir, font=font))
    say(f"The zoo is in {workdir / 'assets'}")


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
    say(f"{', '.join(MODELS)} in {directory}")


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
    with Progress() as progress:
        for event in run_study(workdir, docs, num_processes=processes, zoo=studied):
            if isinstance(event, JobProgress):
                progress.update(event.name, event.done, event.total)
            else:
                say(f"Next: {event.name}")
    say(f"Page in {docs / 'results.md'}, figures in {docs / 'results.json'}")


def _show(steps: Iterable[FitStep]) -> None:
    """Run trainings to their end with a smoothed loss, one bar a model."""
    with Progress() as progress:
        model, loss = "", 0.0
        for step in steps:
            loss = step.loss if step.name != model else loss + 0.05 * (step.loss - loss)
            model = step.name
            progress.update(step.name, step.step, step.num_steps, f"loss {loss:.4f}", "steps")
