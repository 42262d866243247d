"""`afa zoo`: the bundled small models, their emoji scenes and judges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from afa.cli.console import require_new_folder, say
from afa.cli.progress import Progress
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading
from afa.provenance import UNCOMMITTED, commit
from afa.studies.distillation.parts import Part
from afa.studies.results.parts import Experiment, Stage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from afa.studies.zoo_build.fit import FitStep

app = typer.Typer(
    help="The bundled small models, their emoji scenes and judges.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def build(
    workdir: Annotated[
        Path, typer.Argument(help="Work folder; that of an earlier run is resumed.")
    ],
    family: Annotated[
        Literal["unet", "dit"],
        typer.Option(help="unet: the bundled models; dit: diffusion transformers."),
    ] = "unet",
    font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf; default: the bundled sprites.")
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(help="A world of the study: its name, such as main, or a YAML file."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of a world, with one thread each; default: all.")
    ] = None,
) -> None:
    """Train a zoo: a base model and experts of it. Takes hours.

    `unet` rebuilds the bundled zoo from its sprites: autoencoder, models, judges, ensemble. `dit`
    and `--world` train other models with the bundled autoencoder and judges.

    [bold]Example[/bold]: afa zoo build work/dit --family dit
    """
    quieten_loading()
    if family == "dit" and world is not None:
        raise AfaError("AFA-CLI-026", "--world has U-Nets; got --family dit. Remove one of them.")
    if font is not None and (family == "dit" or world is not None):
        raise AfaError(
            "AFA-CLI-023",
            "--font only applies to the bundled zoo; got --family dit or --world. Remove --font.",
        )
    if processes is not None and world is None:
        raise AfaError(
            "AFA-CLI-028", "--processes only applies to a world. Remove it, or pass --world."
        )
    if world is not None:
        _build_world(workdir, world, processes)
        return
    if family == "dit":
        from afa.studies.zoo_build.transformer import build_transformer_zoo
        from afa.zoo import MODELS

        _show(build_transformer_zoo(workdir))
        say(f"The zoo is in {workdir}: {', '.join(MODELS)}")
        return
    from afa.studies.zoo_build.build import build_zoo

    _show(build_zoo(workdir, font=font))
    say(f"The zoo is in {workdir / 'assets'}")


def _build_world(workdir: Path, named: str, processes: int | None) -> None:
    from afa.studies.worlds.build import build_world
    from afa.studies.worlds.recipe import read_world

    recipe = read_world(named, workdir)
    with Progress() as progress:
        for event in build_world(workdir, recipe, processes or os.cpu_count() or 1):
            progress.update(event.name, event.done, event.total)
    say(f"The world is in {workdir}, with the scores of its models in report.json")


@app.command()
def pack(
    world: Annotated[Path, typer.Argument(help="Folder of afa zoo build --world.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write base and experts of a world in half precision, for `afa zoo unpack`.

    [bold]Example[/bold]: afa zoo pack runs/main packed
    """
    require_new_folder(target)
    from afa.studies.worlds.pack import pack_world

    say(f"{', '.join(pack_world(world, target))} in {target}")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder of afa zoo pack.")],
    world: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write the models of a packed world as Stable Diffusion pipeline folders.

    `afa zoo build --world` then only trains what is missing.

    [bold]Example[/bold]: afa zoo unpack docs/results/worlds/main runs/main
    """
    require_new_folder(world)
    from afa.studies.worlds.pack import unpack_world

    say(f"{', '.join(unpack_world(packed, world))} in {world}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write the base model and the experts as Stable Diffusion pipeline folders.

    [bold]Example[/bold]: afa zoo export zoo
    """
    require_new_folder(directory)
    from afa.zoo import MODELS, export_zoo

    export_zoo(directory)
    say(f"{', '.join(MODELS)} in {directory}")


@app.command()
def distillation(
    workdir: Annotated[
        Path, typer.Argument(help="Work folder; that of an earlier run is resumed.")
    ],
    docs: Annotated[Path, typer.Option(help="Folder with distillation.md.")],
    processes: Annotated[
        int | None, typer.Option(min=1, help="With one thread each; default: one per core.")
    ] = None,
    part: Annotated[
        list[Part] | None,
        typer.Option(help="Repeatable; default: all parts."),
    ] = None,
) -> None:
    """Distil the bundled ensemble into students, compare them, and write the page's tables.

    Each part takes one to three hours on two cores. Run the same command again to resume.

    [bold]Example[/bold]: afa zoo distillation runs/distillation --docs docs --part main
    """
    from afa.studies.distillation.run import run_study
    from afa.studies.jobs import JobProgress

    quieten_loading()
    with Progress() as progress:
        for event in run_study(workdir, docs, None, processes, part or tuple(Part)):
            if isinstance(event, JobProgress):
                progress.update(event.name, event.done, event.total)
            else:
                say(f"Next: {event.name}")
    say(f"Tables in {docs / 'distillation.md'}, figures in {docs / 'distillation.json'}")


def _show(steps: Iterable[FitStep]) -> None:
    """Run trainings with one bar per model, and show a smoothed loss."""
    with Progress() as progress:
        model, loss = "", 0.0
        for step in steps:
            loss = step.loss if step.name != model else loss + 0.05 * (step.loss - loss)
            model = step.name
            progress.update(step.name, step.step, step.num_steps, f"loss {loss:.4f}", "steps")


@app.command()
def results(
    workdir: Annotated[
        Path, typer.Argument(help="Work folder; that of an earlier run is resumed.")
    ],
    stage: Annotated[
        list[Stage] | None, typer.Option(help="Repeatable; default: all stages, in their order.")
    ] = None,
    experiment: Annotated[
        list[Experiment] | None, typer.Option(help="Repeatable; default: all experiments.")
    ] = None,
    docs: Annotated[
        Path, typer.Option(help="Folder of the documentation, which keeps what stages find.")
    ] = Path("docs"),
    row: Annotated[
        list[str] | None,
        typer.Option(help="Train and test only this row of one experiment; repeatable."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With one thread each; default: one per core.")
    ] = None,
) -> None:
    """Ask when adaptive aggregation pays: worlds, rivals, trainings. Takes many hours.

    Each stage of each experiment can be stopped, and continued on another day by the same command.

    [bold]Example[/bold]: afa zoo results runs/results --stage worlds --experiment main
    """
    from afa.studies.jobs import JobProgress
    from afa.studies.results.settings import StudySettings
    from afa.studies.results.stages import run_stage
    from afa.studies.results.study import Study

    quieten_loading()
    if row and len(experiment or ()) != 1:
        raise AfaError(
            "AFA-CLI-030", "--row needs one --experiment, whose row it is. Pass one --experiment."
        )
    if commit().endswith(UNCOMMITTED) and {*(stage or Stage)} - {Stage.WORLDS}:
        raise AfaError(
            "AFA-CLI-031",
            "The code has uncommitted changes, so nobody could measure the same again. Commit them "
            "before other stages than worlds.",
        )
    count = processes or os.cpu_count() or 1
    study = Study(workdir.resolve(), StudySettings(), count, docs.resolve(), rows=tuple(row or ()))
    with Progress() as progress:
        for chosen in stage or list(Stage):
            for asked in experiment or list(Experiment):
                for event in run_stage(study, chosen, asked):
                    if isinstance(event, JobProgress):
                        progress.update(event.name, event.done, event.total)
                    else:
                        say(f"Next: {event.name}")


@app.command()
def prompts(
    world: Annotated[str, typer.Argument(help="A world of the study: its name or a YAML file.")],
    output: Annotated[Path, typer.Option(help="CSV file that afa evaluate reads as drawbench.")],
    used_for: Annotated[
        Literal["tuning", "development"], typer.Option("--set", help="What they are used for.")
    ] = "tuning",
    number: Annotated[int, typer.Option(min=1, help="Of each group.")] = 48,
) -> None:
    """Write prompts of a world on which settings may be chosen; none of them is in its test.

    [bold]Example[/bold]: afa zoo prompts main --output tuning.csv
    """
    from afa.studies.results.comparison import write_prompts
    from afa.studies.worlds.prompts import prompts_of
    from afa.studies.worlds.recipe import read_world

    if output.exists():
        raise AfaError("AFA-CLI-029", f"The file '{output}' exists. Pass a new one as --output.")
    listed = prompts_of(read_world(world, Path(world)), used_for, number)
    write_prompts(output, listed)
    say(f"{sum(map(len, listed.values()))} prompts in {output}")


@app.command()
def results_page(
    docs: Annotated[Path, typer.Option(help="Folder with results.md and results/.")],
) -> None:
    """Write results.json, and tables and figures of results.md, from the outcomes alone.

    [bold]Example[/bold]: afa zoo results-page --docs docs
    """
    from afa.studies.results.page import write_page
    from afa.studies.results.settings import StudySettings

    write_page(docs, StudySettings())
    say(f"Page in {docs / 'results.md'}")
