"""`afa prune`: plan which experts to skip at which site and noise level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from afa.cli.console import console, say, say_warnings
from afa.cli.progress import Progress
from afa.errors import AfaError
from afa.machine.quiet import quieten_loading


def prune(
    ensemble: Annotated[str, typer.Argument(help="Ensemble folder, or zoo:ensemble.")],
    output: Annotated[Path, typer.Option(help="New JSON file for the plan.")],
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum fraction of the fusion weights to keep.")
    ] = 0.98,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt per line; optional for zoo:ensemble."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    ranges: Annotated[int, typer.Option(min=1, help="Number of noise ranges.")] = 4,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance scale.")] = 7.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Measure fusion weights, and plan to skip experts where their weights are small.

    The plan lists the experts that run at each site and noise level. Use it with
    afa generate --plan.

    [bold]Example[/bold]: afa prune runs/first --keep 0.98 --prompts prompts.txt --output plan.json
    """
    if output.exists():
        raise AfaError(
            "AFA-CLI-014", f"The plan file '{output}' exists. Pass a new file as --output."
        )
    if keep == 0:
        raise AfaError("AFA-CLI-015", "--keep must be greater than 0; got 0.")
    from afa.evaluation.prompts import PromptsRecipe, ZooPrompts, load_prompts

    if prompts is not None:
        recipe = PromptsRecipe(text=prompts)
    elif ensemble.startswith("zoo:"):
        recipe = PromptsRecipe(zoo=ZooPrompts(kinds={"mixed": 32}, held_out=False, seed=2_000_000))
    else:
        raise AfaError(
            "AFA-CLI-016",
            f"No prompts are bundled for '{ensemble}'. Pass a text file of typical prompts as "
            "--prompts.",
        )
    listed = [prompt.text for prompt in load_prompts(recipe)]

    from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
    from afa.ensemble.caching.plan import save_plan
    from afa.ensemble.calibrate import calibrate
    from afa.loading.ensemble_folder import load_ensemble
    from afa.loading.task import check_text_to_image
    from afa.loading.truncation import warnings_for
    from afa.training.engine import pick_device

    quieten_loading()
    pipeline = load_ensemble(ensemble, device=pick_device(device))
    check_text_to_image(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    say_warnings(warnings_for(pipeline, listed))
    drawing = calibrate(
        pipeline,
        listed,
        num_steps=steps,
        num_ranges=ranges,
        **kind_of_pipeline(pipeline).guidance(guidance),
    )
    with Progress() as progress:
        while True:
            try:
                progress.update("calibrate", next(drawing), len(listed), unit="pictures")
            except StopIteration as stop:
                shares = stop.value
                break
    plan = shares.plan(keep)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_plan(plan, output)
    names = denoiser_of(pipeline).provenance.names
    table = Table("site", *(f"{number + 1}/{ranges}" for number in range(ranges)), box=None)
    for site in plan.sites:
        cells = []
        for noise_range in plan.ranges:
            kept = noise_range.experts.get(site, range(plan.num_experts))
            cells.append(
                "all" if len(kept) == plan.num_experts else ", ".join(names[n] for n in kept)
            )
        table.add_row(site, *cells)
    say("Experts that run, by site and noise range:")
    console.print(table)
    say(
        f"{plan.share_left:.0%} of the expert evaluations remain. Plan in {output}. "
        f"Try: afa generate {ensemble} PROMPT --output pictures --plan {output}"
    )
