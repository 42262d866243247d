"""`afa distill`: turn an ensemble into one ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import say
from afa.cli.train import ContinueWith, run_until_stopped
from afa.machine.quiet import quieten_loading


def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML file: teacher, student, training.")],
    output: Annotated[Path, typer.Option(help="New folder, or that of a run to resume.")],
    run_check: RunCheck = True,
    continue_with: ContinueWith = False,
) -> None:
    """Distil an ensemble into one ordinary model, or into a LoRA on one.

    The teacher draws, and its predictions are recorded; then the student learns them without the
    teacher in memory. Run the same command again to resume. Ctrl-C saves and stops. Several
    processes: accelerate launch -m afa distill ...

    [bold]Example[/bold]: afa distill recipe.yaml --output runs/student
    """
    from afa.distilling.recipe import load_distill_recipe

    checked = load_distill_recipe(recipe)

    from afa.distilling.planned import plan_of_distillation
    from afa.distilling.run import distill as run
    from afa.machine.processes import Processes

    quieten_loading()
    is_main = Processes().is_main
    if is_main and run_check:
        require_sound(plan_of_distillation(checked))
    run_until_stopped(
        lambda stop: run(checked, output, should_stop=stop, continue_with=continue_with), is_main
    )
    if is_main and checked.student.what == "full":
        say(
            f"Student in {output}, a diffusers folder; see README.md there. One file for other "
            f"programs: afa export {output} --output student.safetensors"
        )
    elif is_main:
        say(f"LoRA files of the student in {output}: lora.safetensors; see README.md there")
