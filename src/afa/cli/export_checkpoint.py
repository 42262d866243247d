"""`afa export-checkpoint`: write the ensemble or student of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.console import say


def export_checkpoint(
    run: Annotated[Path, typer.Argument(help="Folder of a training, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option(help="New folder.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="Step of the checkpoint; by default the newest.")
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="The lowest validation loss up to that step (early_stopping keeps it)."
        ),
    ] = False,
) -> None:
    """Write the ensemble or student of a checkpoint, also while the training is running.

    The folder is as `afa train` or `afa distill` writes it at the end. No expert of an ensemble is
    loaded.

    [bold]Example[/bold]: afa export-checkpoint runs/first --step 3000 --output first-3000
    """
    from afa.distilling.exported import export_student
    from afa.errors import AfaError
    from afa.files import read_json
    from afa.machine.quiet import quieten_loading
    from afa.training.checkpoints import step_in_name
    from afa.training.continuing import RECIPE
    from afa.training.exported import export_checkpoint as export_ensemble

    if run.suffix == ".safetensors":
        own = step_in_name(run)
        if own is None or step not in (None, own):
            raise AfaError(
                "AFA-CLI-046",
                f"'{run}' is not the checkpoint of {'a step' if step is None else f'step {step}'}. "
                "Pass the folder of the run, and --step.",
            )
        run, step = run.parent.parent, own
    recipe = run / RECIPE
    if recipe.is_file() and "teacher" in read_json(recipe):
        quieten_loading()
        found = export_student(run, output, step=step, best=best)
        what = f"Best student up to step {found}" if best else f"Student of step {found}"
        say(f"{what} in {output}; see README.md there")
        return
    found = export_ensemble(run, output, step=step, best=best)
    what = f"Best ensemble up to step {found}" if best else f"Ensemble of step {found}"
    say(f"{what} in {output}. Try: afa generate {output} 'a prompt' --output pictures")
