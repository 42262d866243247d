"""`afa train`: train the aggregators of an ensemble from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import printable, say
from afa.cli.progress import Progress
from afa.machine.quiet import quieten_loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from afa.training import CacheProgress, TrainStep
    from afa.training.recipe import Recipe


ContinueWith = Annotated[
    bool,
    typer.Option(
        "--continue-with",
        help="Resume with the recipe's new learning rate, schedule or other settings.",
    ),
]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: experts, data, aggregator, training.")],
    output: Annotated[Path, typer.Option(help="New folder, or that of a run to resume.")],
    run_check: RunCheck = True,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Encode pictures and captions again in every step.")
    ] = False,
    continue_with: ContinueWith = False,
) -> None:
    r"""Train the aggregators of an ensemble; the experts stay frozen.

    Run the same command again to resume. Ctrl-C saves a checkpoint and stops. Several processes:
    accelerate launch -m afa train ...

    The smallest recipe has three lines:

    experts: \[./a, ./b.safetensors]

    data: {folder: ./pictures}

    training: {num_steps: 10000}

    [bold]Example[/bold]: afa train recipe.yaml --output runs/first
    """
    from afa.training.recipe import load_recipe

    checked = load_recipe(recipe)
    if no_cache:
        checked = _without_cache(checked)

    from afa.machine.processes import Processes
    from afa.training import train as train_ensemble
    from afa.training.planned import plan_of_training

    quieten_loading()
    is_main = Processes().is_main
    if is_main and run_check:
        require_sound(plan_of_training(checked))
    run_until_stopped(
        lambda stop: train_ensemble(checked, output, should_stop=stop, continue_with=continue_with),
        is_main,
    )
    if is_main:
        say(f"Ensemble in {output}. Try: afa generate {output} 'a prompt' --output pictures")


def _without_cache(recipe: Recipe) -> Recipe:
    from afa.errors import AfaError

    if recipe.data.dataset is not None and recipe.data.dataset.streaming:
        raise AfaError(
            "AFA-CLI-017",
            "A streamed data set must be cached. Remove --no-cache or data.dataset.streaming.",
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": False})})


def run_until_stopped(
    start: Callable[[Callable[[], bool]], Iterable[TrainStep | CacheProgress]], is_main: bool
) -> None:
    """Run a training, which the first Ctrl-C, SIGTERM or SIGHUP saves and stops.

    Args:
        start: a function of `should_stop` that returns the training's events.
        is_main: whether this process shows them.

    Raises:
        typer.Exit: with 128 + n after signal n.
    """
    from afa.training import Stopped, stop_on_signals

    with stop_on_signals() as should_stop:
        try:
            _show(start(should_stop), is_main=is_main)
        except Stopped as stopped:
            if is_main:
                say(
                    f"Stopped after step {stopped.step} of {stopped.num_steps} and saved. Run the "
                    "same command again to resume."
                )
            raise typer.Exit(128 + (should_stop.signal or 0)) from None


def _show(events: Iterable[TrainStep | CacheProgress], *, is_main: bool) -> None:
    """Run a training, and show a smoothed loss and its notes."""
    from afa.training import TrainStep

    loss: float | None = None
    with Progress(visible=is_main) as progress:
        for event in events:
            for note in event.notes if is_main else ():
                say(printable(note))
            if isinstance(event, TrainStep):
                loss = event.loss if loss is None else loss + 0.05 * (event.loss - loss)
                note = f"loss {loss:.4f}"
                progress.update("train", event.step, event.num_steps, note, "steps")
            else:
                progress.update(event.stage, event.done, event.total)
