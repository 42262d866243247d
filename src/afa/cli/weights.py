"""`afa weights`: draw the fusion weights of pictures or of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.console import require_new_folder, say, say_warnings
from afa.cli.drafts import NoDrafts, drafts_for, say_own
from afa.cli.progress import Progress
from afa.errors import AfaError
from afa.files import slug
from afa.machine.quiet import quieten_loading
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from afa.drafting import DraftsRecipe
    from afa.ensemble.recording import WeightRecord

FORMATS = ("png", "svg")


def weights(
    sources: Annotated[
        list[str], typer.Argument(help="PNGs of afa, or one ensemble folder or zoo:ensemble.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for the figures.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="For an ensemble: prompt to draw; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="For an ensemble: denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(min=0, help="For an ensemble: guidance scale.")] = 7.5,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="For an ensemble: seed of all pictures.")
    ] = 0,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="png or svg; repeatable; default: png.")
    ] = None,
    no_drafts: NoDrafts = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Draw the experts' fusion weights: by site and step, over the picture, and over the steps.

    Pictures of afa generate are drawn again from their recorded settings. For an ensemble, the
    prompts are drawn by each expert, by their uniform merge and by the ensemble, side by side.

    [bold]Example[/bold]: afa weights zoo:ensemble --prompt "a fox on the left and a pizza on the
    right, blue background" --steps 20 --guidance 3 --output figures --format svg
    """
    require_new_folder(output)
    suffixes = list(dict.fromkeys(formats or ["png"]))
    unknown = [suffix for suffix in suffixes if suffix not in FORMATS]
    if unknown:
        raise AfaError(
            "AFA-CLI-018", f"--format must be {' or '.join(FORMATS)}; got '{unknown[0]}'."
        )
    pictures = [Path(source) for source in sources if source.lower().endswith(".png")]
    if len(pictures) not in (0, len(sources)) or (not pictures and len(sources) > 1):
        raise AfaError(
            "AFA-CLI-019",
            f"afa weights requires .png files or one ensemble; got {sources}. Pass prompts with "
            "--prompt.",
        )
    for option, is_given in (("--prompt", bool(prompt)), ("--no-drafts", no_drafts)):
        if pictures and is_given:
            raise AfaError(
                "AFA-CLI-020", f"{option} only applies to an ensemble; got pictures. Remove it."
            )
    if not pictures and not prompt:
        raise AfaError("AFA-CLI-021", f"No prompt to draw with '{sources[0]}'. Pass --prompt TEXT.")

    from afa.training.engine import pick_device

    quieten_loading()
    figures = _Figures(output, suffixes)
    with Progress() as progress:
        chosen = pick_device(device)
        if pictures:
            for done, path in enumerate(pictures):
                progress.update("weights", done, len(pictures), unit="pictures")
                _redraw(path, figures, chosen)
            progress.update("weights", len(pictures), len(pictures), unit="pictures")
        else:
            options = {"steps": steps, "guidance": guidance, "seed": seed}
            drafts = drafts_for(sources[0], None, prompt, without=no_drafts)
            if drafts is not None:
                say_own(drafts, sources[0], prompt or [])
            drawn = _compared(sources[0], prompt or [], drafts, options, figures, chosen)
            for done, total in drawn:
                progress.update("weights", done, total, unit="pictures")
    say(f"{figures.count} figures in {output}")


class _Figures:
    """Names the files of the figures, one per format."""

    def __init__(self, output: Path, suffixes: Sequence[str]) -> None:
        self._output, self._suffixes, self.count = output, suffixes, 0

    def paths(self, stem: str) -> list[Path]:
        self._output.mkdir(parents=True, exist_ok=True)
        self.count += len(self._suffixes)
        return [self._output / f"{stem}.{suffix}" for suffix in self._suffixes]

    def of_picture(
        self,
        stem: str,
        picture: Image.Image,
        record: WeightRecord,
        experts: Sequence[str],
        title: str,
    ) -> None:
        """Draw all figures of one picture and its fusion weights."""
        from afa.drawing.plots import filmstrip, heat_map, overlay

        sites = list(record.steps[0].weights)
        for path in self.paths(f"{stem}-sites"):
            heat_map(record.last().mean_share(), path, experts=experts, sites=sites, title=title)
        for path in self.paths(f"{stem}-places"):
            overlay(picture, record.mean_map(None, 64)[-1], path, experts=experts, title=title)
        for path in self.paths(f"{stem}-steps"):
            filmstrip(record, [picture], path, experts=experts)


def _redraw(path: Path, figures: _Figures, device: object) -> None:
    """Draw a picture again, and record and draw its fusion weights."""
    from afa.denoisers.kinds import denoiser_of
    from afa.drawing.contenders import ENSEMBLE
    from afa.drawing.pictures import draw, prepare_again
    from afa.drawing.recorded import read_picture
    from afa.ensemble.protocol import expert_names
    from afa.ensemble.recording import record_weights
    from afa.loading.truncation import warnings_for

    recipe = read_picture(path).recipe
    if recipe.drawn_by != ENSEMBLE:
        raise AfaError(
            "AFA-CLI-022",
            f"'{path}' has no fusion weights: {recipe.drawn_by} drew it. Pass a picture that an "
            "ensemble drew.",
        )
    pipeline = prepare_again(recipe, device=device)
    asked = (recipe.negative_prompt, recipe.guidance, recipe.prompt_syntax)
    say_warnings(warnings_for(pipeline, [recipe.prompt], *asked))
    denoiser = denoiser_of(pipeline)
    with record_weights(denoiser) as record:
        picture = draw(pipeline, recipe)
    figures.of_picture(path.stem, picture, record, expert_names(denoiser), recipe.prompt)


def _compared(
    ensemble: str,
    prompts: Sequence[str],
    drafts: DraftsRecipe | None,
    options: dict[str, float],
    figures: _Figures,
    device: object,
) -> Iterator[tuple[int, int]]:
    """Draw prompts with every contender, and their fusion weights; yield (done, total)."""
    from afa.denoisers.kinds import denoiser_of
    from afa.drawing.contenders import ENSEMBLE, Contenders
    from afa.drawing.pictures import drafts_of, draw, identity_of, prepare
    from afa.drawing.plots import comparison
    from afa.drawing.recorded import picture_recipe
    from afa.ensemble.protocol import expert_names
    from afa.ensemble.recording import record_weights
    from afa.loading.ensemble_folder import ensemble_folder
    from afa.loading.task import native_resolution
    from afa.loading.truncation import warnings_for
    from afa.loading.vocabulary import word_warnings

    pipeline = prepare(ensemble, drafts=drafts, device=device)
    denoiser = denoiser_of(pipeline)
    height, width = native_resolution(pipeline)
    fused = [prompt for prompt in prompts if not drafts_of(pipeline, prompt)]
    say_warnings(warnings_for(pipeline, prompts) + word_warnings(ensemble_folder(ensemble), fused))
    contenders, experts = Contenders(pipeline), expert_names(denoiser)
    fields = {**options, "ensemble": ensemble, "identity": identity_of(denoiser)}
    rows: dict[str, list[Image.Image]] = {name: [] for name in contenders.names}
    total = len(rows) * len(prompts)
    for number, prompt in enumerate(prompts):
        recipe = picture_recipe(prompt=prompt, height=height, width=width, **fields)
        for name, pictures in rows.items():
            with record_weights(denoiser) as record:
                pictures.append(draw(contenders.pipeline(name), recipe))
            if name == ENSEMBLE:
                stem = f"{number:02d}-{slug(prompt)}"
                figures.of_picture(stem, pictures[-1], record, experts, prompt)
            yield sum(map(len, rows.values())), total
    for path in figures.paths("comparison"):
        comparison(rows, prompts, path, bold=[ENSEMBLE])
