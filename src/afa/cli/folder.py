"""The folder of pictures that `afa generate` writes, and can go on with."""

from __future__ import annotations

import itertools
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

    from afa.drawing.recorded import PictureRecipe


def stems_of(prompts: Sequence[str], first: int, num_images: int) -> list[str]:
    """The stems of the pictures' file names."""
    numbered = itertools.product(enumerate(prompts), range(first, first + num_images))
    return [f"{number:02d}-{slug(prompt)}-seed{seed}" for (number, prompt), seed in numbered]


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
    from afa.drawing import pictures, recorded
    from afa.drawing.plots import filmstrip
    from afa.ensemble.protocol import expert_names
    from afa.ensemble.recording import record_weights

    output.mkdir(parents=True, exist_ok=True)
    hashed, denoiser = "", denoiser_of(pipeline)
    with Progress(visible=visible) as progress:
        for number, (stem, recipe) in enumerate(planned):
            done = _done(output / f"{stem}.png", recipe)
            if done is not None and (not weights or (output / f"{stem}-weights.png").exists()):
                hashed = done
                continue

            def show(step: int, number: int = number, steps: int = recipe.steps) -> None:
                # some schedulers call the denoiser more often than there are steps
                calls = len(getattr(pipeline.scheduler, "timesteps", ())) or steps
                drawn = number * steps + min(step, calls) * steps // calls
                note = f"picture {number + 1} of {len(planned)}"
                progress.update("generate", drawn, len(planned) * steps, note, "steps")

            recording = record_weights(denoiser) if weights else nullcontext()
            with recording as record, pictures.on_every_call(pipeline, show):
                picture = pictures.draw(pipeline, recipe)
            recorded.save_picture(picture, output / f"{stem}.png", recipe, denoiser.device)
            hashed = recorded.hash_pixels(picture)
            if record is not None:
                names = expert_names(denoiser)
                filmstrip(record, [picture], output / f"{stem}-weights.png", experts=names)
            show(len(pipeline.scheduler.timesteps))
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
