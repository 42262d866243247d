"""The folder of pictures that `afa generate` writes, and can go on with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from afa.cli.console import require_new_folder
from afa.cli.progress import Progress
from afa.errors import AfaError
from afa.files import slug

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.cli.wanted import Wanted
    from afa.drawing.recorded import PictureRecipe


def stems_of(wanted: Sequence[Wanted], num_images: int) -> list[str]:
    """The stems of the pictures' file names."""
    return [
        f"{number:02d}-{slug(each.prompt)}-seed{seed}"
        for number, each in enumerate(wanted)
        for seed in range(each.seed, each.seed + num_images)
    ]


def require_same_pictures(output: Path, stems: Sequence[str]) -> None:
    """Require that an output folder is new, or contains only pictures of this command.

    Raises:
        AfaError: if it contains another file.
    """
    if not output.is_dir():
        require_new_folder(output)
        return
    names = {f"{stem}{end}.png" for stem in stems for end in ("", "-weights")}
    for file in output.iterdir():
        if file.name not in names and not file.name.startswith("."):
            raise AfaError(
                "AFA-CLI-010",
                f"The output folder '{output}' contains '{file.name}', which this command did not "
                "write. Pass a new folder as --output, or repeat the earlier command to resume it.",
            )


def draw_into(
    pipeline: DiffusionPipeline,
    planned: Sequence[tuple[str, PictureRecipe]],
    output: Path,
    weights: bool,
    visible: bool,
) -> str:
    """Draw and write pictures; return the hash of the last one's pixels."""
    from afa.denoisers.kinds import denoiser_of
    from afa.denoisers.schedulers import name_of
    from afa.drawing import pictures, recorded
    from afa.drawing.plots import filmstrip
    from afa.ensemble.protocol import expert_names
    from afa.ensemble.recording import record_weights

    output.mkdir(parents=True, exist_ok=True)
    hashed, denoiser = "", denoiser_of(pipeline)
    num_steps = sum(recipe.steps for _, recipe in planned)
    with Progress(visible=visible) as progress:
        for number, (stem, recipe) in enumerate(planned):
            done = _done(output / f"{stem}.png", recipe)
            done_steps = sum(each.steps for _, each in planned[:number])
            if done is not None and (not weights or (output / f"{stem}-weights.png").exists()):
                hashed = done
                continue

            note = f"picture {number + 1} of {len(planned)}"

            def show(
                step: int,
                note: str = note,
                done_steps: int = done_steps,
                recipe: PictureRecipe = recipe,
            ) -> None:
                # some schedulers call the denoiser more often than there are steps
                calls = recipe.num_calls
                drawn = done_steps + min(step, calls) * recipe.steps // calls
                progress.update("generate", drawn, num_steps, note, "steps")

            recording = record_weights(denoiser) if weights else nullcontext()
            with recording as record, pictures.on_every_call(pipeline, show):
                picture = pictures.draw(pipeline, recipe)
            own = name_of(pipeline.scheduler)
            recorded.save_picture(picture, output / f"{stem}.png", recipe, denoiser.device, own)
            hashed = recorded.hash_pixels(picture)
            if record is not None:
                names = expert_names(denoiser)
                filmstrip(record, [picture], output / f"{stem}-weights.png", experts=names)
            show(recipe.num_calls)
    return hashed


def _done(path: Path, recipe: PictureRecipe) -> str | None:
    """The hash of a picture that an earlier run has drawn; None if it does not exist.

    Raises:
        AfaError: if it was made with other settings.
    """
    from afa.drawing import recorded

    if not path.exists():
        return None
    found = recorded.read_picture(path)
    if found.recipe != recipe:
        raise AfaError(
            "AFA-CLI-011",
            f"'{path}' was made with other settings. Pass a new folder as --output, or repeat the "
            "earlier command to resume.",
        )
    return found.pixels
