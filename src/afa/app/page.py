"""The page: its layout, and what happens when something is clicked."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator  # gradio reads the handlers' annotations
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from afa.acceleration.settings import PRESETS, acceleration_of
from afa.app import views
from afa.app.drawing import Drawn, Stopped
from afa.app.views import Entry
from afa.contenders import ENSEMBLE
from afa.errors import AfaError
from afa.files import slug
from afa.kinds import denoiser_of
from afa.pictures import identity_of, picture_recipe, save_picture
from afa.pipeline import native_resolution, size_multiple
from afa.recipe import MAX_SEED
from afa.steering import STAGES, expert_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.app.drawing import Studio
    from afa.maps import WeightRecord
    from afa.pictures import PictureRecipe

CSS = """
.afa-legend {list-style: none; display: flex; flex-wrap: wrap; gap: 1em; margin: 0; padding: 0}
.afa-legend span {display: inline-block; width: 1em; height: 1em; margin-right: .4em;
  border: 1px solid; vertical-align: -.15em}
.afa-error {border-left: 4px solid #D55E00; padding-left: .6em; font-weight: 600}
.afa-status progress {width: 12em; max-width: 50%}
.afa-pictures img {image-rendering: pixelated}
"""
#: so many pictures of a session keep their fusion weights, which are large
_MAX_RECORDS = 8
_MAX_STEPS, _MAX_PIXELS, _MAX_BIAS = 150, 2048, 4.0
_ZOO = ("a fox on the left and a pizza on the right, blue background", 20, 3.0)
_OTHER = ("a fox in the snow", 30, 7.5)
_log = logging.getLogger(__name__)


class Page:
    """The page of one ensemble; `blocks` is what is served.

    Args:
        studio: that draws.
        ensemble: its folder, or `zoo:ensemble`.
        folder: for the pictures of all sessions, which is gone when the page is.
        keep: where every picture is written to besides; None keeps none.
    """

    def __init__(
        self, studio: Studio, ensemble: str, folder: Path, keep: Path | None = None
    ) -> None:
        self._studio, self._ensemble = studio, ensemble
        self._folder, self._keep = folder, keep
        denoiser = denoiser_of(studio.pipeline)
        self._identity = identity_of(denoiser)
        self._experts = expert_names(denoiser)
        #: what a bias calls them: by number where a name is not one's own
        self._keys = [
            name if self._experts.count(name) == 1 else str(n)
            for n, name in enumerate(self._experts)
        ]
        self._device = denoiser.device
        self._stops: dict[str, threading.Event] = {}
        self.blocks = self._build()

    # -- layout -------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="afa", analytics_enabled=False) as blocks:
            self._history = gr.State([])
            self._shown = gr.State(None)
            self._picked = gr.State(None)
            gr.Markdown("# afa: several experts, one picture")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._controls()
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Compare"):
                        self._compare_tab()
                    with gr.Tab("Who did what"):
                        self._who_tab()
                    with gr.Tab("Steer"):
                        self._steer_tab()
                    with gr.Tab("History"):
                        self._history_tab()
            self._connect()
            blocks.unload(self._leave)
        return blocks

    def _controls(self) -> None:
        prompt, steps, guidance = _ZOO if self._ensemble.startswith("zoo:") else _OTHER
        height, width = native_resolution(self._studio.pipeline)
        multiple = size_multiple(self._studio.pipeline)
        self._prompt = gr.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt")
        names = self._studio.contenders.names
        self._who = gr.CheckboxGroup(names, value=names, label="Drawn by")
        with gr.Row():
            self._seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            self._dice = gr.Button("Another seed", size="sm")
        self._steps = gr.Slider(1, _MAX_STEPS, steps, step=1, label="Steps")
        self._guidance = gr.Slider(0, 20, guidance, step=0.1, label="Guidance")
        with gr.Accordion("More", open=False):
            self._negative = gr.Textbox("", label="What to stay away from")
            self._speed = gr.Radio(list(PRESETS), value="exact", label="Speed")
            size = {"step": multiple, "minimum": multiple, "maximum": _MAX_PIXELS}
            self._height = gr.Slider(value=height, label="Height", **size)
            self._width = gr.Slider(value=width, label="Width", **size)
        with gr.Row():
            self._go = gr.Button("Draw", variant="primary", elem_id="draw")
            self._cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False)
        self._status = gr.HTML(elem_id="status", elem_classes="afa-status")

    def _compare_tab(self) -> None:
        with gr.Row(elem_classes="afa-pictures"):
            self._pictures = {name: _picture(name) for name in self._studio.contenders.names}

    def _who_tab(self) -> None:
        self._caption = gr.HTML("<p>Draw a picture first.</p>", elem_id="caption")
        with gr.Row():
            with gr.Column(min_width=280):
                self._map = gr.Image(
                    label="Who did what: click a place for its numbers",
                    type="pil",
                    interactive=False,
                    elem_id="map",
                    buttons=["fullscreen", "download"],
                )
                self._numbers = gr.HTML(elem_id="numbers")
                self._legend = gr.HTML(elem_id="legend")
            with gr.Column(min_width=280):
                self._step = gr.Slider(
                    *(0, 1, 0), step=1, label="Step (0: the mean of all)", elem_id="step"
                )
                self._site = gr.Dropdown(
                    [views.ALL_SITES], value=views.ALL_SITES, label="Site", elem_id="site"
                )
                colours = dict(
                    zip(self._experts, views.hex_colours(len(self._experts)), strict=True)
                )
                self._shares = gr.LinePlot(
                    x="step",
                    y="share",
                    color="expert",
                    color_map=colours,
                    y_lim=[0, 1],
                    title="Mean share of the picture, by step",
                    height=220,
                )
        with gr.Row(elem_classes="afa-pictures"):
            self._alone = [_picture(name) for name in self._experts]

    def _steer_tab(self) -> None:
        gr.Markdown(
            "Lean on an expert, or away from it, and draw: the ensemble decides where, you how "
            "much. +1 makes its odds 2.7 times what they are; 0 changes nothing."
        )

        def slider(label: str) -> gr.Slider:
            return gr.Slider(-_MAX_BIAS, _MAX_BIAS, 0, step=0.1, label=label)

        with gr.Row():
            everywhere = [slider(name) for name in self._experts]
        with gr.Accordion("By stage of the network, beside that", open=False):
            by_stage = []
            for name in self._experts:
                with gr.Row():
                    by_stage += [slider(f"{name}: {stage}") for stage in STAGES]
        self._biases = [*everywhere, *by_stage]
        with gr.Row():
            self._steer = gr.Button("Draw with and without", variant="primary", elem_id="steer")
            self._level = gr.Button("Back to 0")
        with gr.Row(elem_classes="afa-pictures"):
            self._without, self._with = _picture("without"), _picture("with")

    def _history_tab(self) -> None:
        self._gallery = gr.Gallery(
            label="What was drawn in this session",
            columns=6,
            elem_id="gallery",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        with gr.Row():
            self._download = gr.DownloadButton(
                "Download, with its recipe inside", elem_id="download", interactive=False
            )
            self._use = gr.Button("Use these settings", interactive=False, elem_id="use")
            self._look = gr.Button("Who did what", interactive=False)
        self._details = gr.Code(label="All it was made from", language="json", interactive=False)

    def _connect(self) -> None:
        sampling = [self._prompt, self._negative, self._seed, self._steps, self._guidance]
        sampling += [self._speed, self._height, self._width]
        states = [self._history, self._shown]
        changed = [self._status, self._go, self._steer, self._cancel, self._gallery, *states]
        # one at a time, whoever asks; the others see their place in the queue
        drawing: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "draw",
            "show_progress_on": self._status,
        }
        gr.on(
            [self._go.click, self._prompt.submit],
            self._draw_all,
            [self._history, self._who, *sampling, *self._biases],
            [*changed, *self._pictures.values()],
            **drawing,
        )
        self._steer.click(
            self._draw_both,
            [self._history, *sampling, *self._biases],
            [*changed, self._without, self._with],
            **drawing,
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        self._cancel.click(self._stop, None, self._status, **quick)
        self._dice.click(lambda: secrets.randbelow(MAX_SEED), None, self._seed, **quick)
        self._level.click(lambda: [0] * len(self._biases), None, self._biases, **quick)
        seen = [self._map, self._legend, self._numbers, *self._alone]
        place = [self._history, self._shown, self._step, self._site]
        self._shown.change(
            self._turn_to,
            states,
            [self._caption, self._step, self._site, self._shares, *seen],
            **quick,
        )
        self._step.change(self._see, place, seen, **quick, trigger_mode="always_last")
        self._site.change(self._see, place, seen, **quick)
        self._site.change(self._see_shares, place, self._shares, **quick)
        self._map.select(self._point, place, self._numbers, **quick)
        picked = [self._picked, self._details, self._download, self._use, self._look]
        self._gallery.select(self._pick, self._history, picked, **quick)
        self._use.click(
            self._use_again,
            [self._history, self._picked],
            [*sampling, *self._biases],
            **quick,
        )
        self._look.click(lambda picked: picked, self._picked, self._shown, **quick)

    # -- drawing ------------------------------------------------------------------------------

    def _draw_all(
        self, request: gr.Request, history: list[Entry], who: list[str], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with everybody who is ticked, the ensemble with its bias."""
        fields, bias = self._read(values)
        names = [name for name in self._pictures if name in who]
        yield {image: gr.update(value=None, label=name) for name, image in self._pictures.items()}

        def wanted() -> list[tuple[Any, str, PictureRecipe]]:
            if not names:
                raise AfaError("Somebody must draw: tick at least one under 'Drawn by'.")
            return [
                (
                    self._pictures[name],
                    f"{name}, steered" if name == ENSEMBLE and bias else name,
                    self._recipe(fields, name, bias if name == ENSEMBLE else {}),
                )
                for name in names
            ]

        yield from self._draw(history, wanted, request)

    def _draw_both(
        self, request: gr.Request, history: list[Entry], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with the ensemble, without its bias and with it."""
        fields, bias = self._read(values)
        pairs = ((self._without, "without", {}), (self._with, "with", bias))
        yield {image: gr.update(value=None, label=name) for image, name, _ in pairs}
        yield from self._draw(
            history,
            lambda: [
                (image, name, self._recipe(fields, ENSEMBLE, own)) for image, name, own in pairs
            ],
            request,
        )

    def _draw(
        self, history: list[Entry], wanted: Any, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """Draw pictures, show each as soon as it is finished, and say what goes wrong."""
        session, stop, done = str(request.session_hash), threading.Event(), 0
        self._stops[session] = stop
        history = list(history)
        yield {self._status: views.note("Starting"), **self._buttons(is_busy=True)}
        try:
            asked = wanted()
            for event in self._studio.draw([recipe for _, _, recipe in asked], stop):
                image, name, recipe = asked[done]
                if not isinstance(event, Drawn):
                    text = views.progress_text(name, done, len(asked), event.step, recipe.steps)
                    yield {self._status: text}
                    continue
                done += 1
                entry = self._keep_entry(event, session, len(history))
                history = _without_old_records([*history, entry])
                label = f"{name}, {entry.seconds:.1f} s"
                update = {image: gr.update(value=str(entry.file), label=label)}
                if entry.record is not None:
                    update[self._shown] = len(history) - 1
                yield {
                    **update,
                    self._history: history,
                    self._gallery: [(str(e.file), _short(e)) for e in history],
                }
            seconds = sum(entry.seconds for entry in history[len(history) - done :])
            said = views.note(f"{done} {'picture' if done == 1 else 'pictures'}, {seconds:.1f} s")
        except Stopped:
            said = views.note(f"Stopped; {done} of the pictures were finished.")
        except AfaError as error:
            said = views.complaint(str(error))
        except Exception as error:
            _log.exception("drawing failed")
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            said = views.complaint(f"Drawing failed. {what} The whole message is in the terminal.")
        finally:
            self._stops.pop(session, None)
        yield {self._status: said, **self._buttons(is_busy=False)}

    def _read(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """What the controls say: fields of a recipe, and the bias."""
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance")
        *sampling, speed, height, width = values[: -len(self._biases)]
        fields = dict(zip(names, sampling, strict=True))
        fields |= {"height": height, "width": width, "speed": speed}
        count, given = len(self._experts), values[-len(self._biases) :]
        bias = {}
        for n, key in enumerate(self._keys):
            own = given[count + n * len(STAGES) : count + (n + 1) * len(STAGES)]
            parts = {
                stage: round(float(given[n]) + float(value), 6)
                for stage, value in zip(STAGES, own, strict=True)
            }
            if any(parts.values()):
                bias[key] = parts
        return fields, bias

    def _recipe(self, fields: dict[str, Any], name: str, bias: Any) -> PictureRecipe:
        fields = dict(fields)
        acceleration = acceleration_of(fields.pop("speed")).describe()
        for key, most in {"steps": _MAX_STEPS, "height": _MAX_PIXELS, "width": _MAX_PIXELS}.items():
            if not isinstance(fields[key], (int, float)) or fields[key] > most:
                raise AfaError(f"{key} must be a number, {most} at the most.")
        multiple = size_multiple(self._studio.pipeline)
        for key in ("height", "width"):
            if fields[key] % multiple:
                raise AfaError(f"{key} must be a multiple of {multiple} pixels.")
        return picture_recipe(
            **fields,
            ensemble=self._ensemble,
            identity=self._identity,
            drawn_by=name,
            bias=bias,
            acceleration=acceleration,
        )

    def _keep_entry(self, drawn: Drawn, session: str, number: int) -> Entry:
        """Write a picture where the page can show it, and where the user keeps them."""
        recipe = drawn.recipe
        name = f"{number:03d}-{slug(recipe.prompt)}-{slug(recipe.drawn_by)}.png"
        place = self._folder / slug(session) / name
        place.parent.mkdir(exist_ok=True)
        save_picture(drawn.picture, place, recipe, self._device)
        if self._keep is not None:
            stem = f"{slug(session)[:8]}-{name}"
            save_picture(drawn.picture, self._keep / stem, recipe, self._device)
        return Entry(recipe, place, drawn.seconds, drawn.record)

    def _buttons(self, *, is_busy: bool) -> dict[Any, Any]:
        return {
            self._go: gr.update(interactive=not is_busy),
            self._steer: gr.update(interactive=not is_busy),
            self._cancel: gr.update(interactive=is_busy),
        }

    def _stop(self, request: gr.Request) -> str:
        stop = self._stops.get(str(request.session_hash))
        if stop is None:
            return views.note("Nothing is being drawn.")
        stop.set()
        return views.note("Stopping")

    def _leave(self, request: gr.Request) -> None:
        """A browser has gone: nobody waits for what it has asked for."""
        with suppress(KeyError):
            self._stops[str(request.session_hash)].set()

    # -- who did what -------------------------------------------------------------------------

    def _turn_to(self, history: list[Entry], shown: int | None) -> list[Any]:
        record = _record(history, shown)
        if record is None or shown is None:
            text = "<p>Of this picture there are no weights any more; draw it again.</p>"
            return [text, *[gr.skip()] * (6 + len(self._alone))]
        sites = [views.ALL_SITES, *record.places]
        caption = f"<p>{views.html.escape(history[shown].recipe.prompt)}</p>"
        return [
            caption,
            gr.update(maximum=len(record.steps), value=0),
            gr.update(choices=sites, value=views.ALL_SITES),
            *self._see_shares(history, shown, 0, views.ALL_SITES),
            *self._see(history, shown, 0, views.ALL_SITES),
        ]

    def _see(self, history: list[Entry], shown: int | None, step: int, site: str) -> list[Any]:
        from PIL import Image

        record = _record(history, shown)
        if record is None or shown is None or site not in (views.ALL_SITES, *record.places):
            return [gr.skip()] * (3 + len(self._alone))
        weights = views.weights_at(record, step, site)
        with Image.open(history[shown].file) as picture:
            overlay = views.overlay(picture, weights)
        alone = [views.alone(weights[n]) for n in range(len(self._experts))]
        return [overlay, views.legend(self._experts, weights), "", *alone]

    def _see_shares(self, history: list[Entry], shown: int | None, _: int, site: str) -> list[Any]:
        record = _record(history, shown)
        if record is None or site not in (views.ALL_SITES, *record.places):
            return [gr.skip()]
        return [views.shares_over_steps(self._experts, record, site)]

    def _point(
        self, history: list[Entry], shown: int | None, step: int, site: str, event: gr.SelectData
    ) -> str:
        from PIL import Image

        record = _record(history, shown)
        if record is None or shown is None:
            return ""
        weights = views.weights_at(record, step, site)
        with Image.open(history[shown].file) as picture:
            size = views.overlay(picture, weights).size
        return views.numbers_at(self._experts, weights, (event.index[0], event.index[1]), size)

    # -- history ------------------------------------------------------------------------------

    def _pick(self, history: list[Entry], event: gr.SelectData) -> list[Any]:
        entry = history[event.index]
        return [
            event.index,
            entry.recipe.model_dump_json(indent=2, exclude_defaults=True),
            gr.update(value=str(entry.file), interactive=True),
            gr.update(interactive=True),
            gr.update(interactive=entry.record is not None),
        ]

    def _use_again(self, history: list[Entry], picked: int | None) -> list[Any]:
        if picked is None:
            return [gr.skip()] * (8 + len(self._biases))
        recipe = history[picked].recipe
        speed = next(
            name for name, preset in PRESETS.items() if preset.describe() == recipe.acceleration
        )
        by_stage = [
            recipe.bias.get(key, {}).get(stage, 0.0) for key in self._keys for stage in STAGES
        ]
        return [
            *(recipe.prompt, recipe.negative_prompt, recipe.seed, recipe.steps, recipe.guidance),
            *(speed, recipe.height, recipe.width),
            *[0] * len(self._keys),
            *by_stage,
        ]


def _picture(label: str) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        format="png",
        interactive=False,
        min_width=150,
        buttons=["download", "fullscreen"],
    )


def _record(history: Sequence[Entry], shown: int | None) -> WeightRecord | None:
    return None if shown is None or shown >= len(history) else history[shown].record


def _without_old_records(history: Sequence[Entry]) -> list[Entry]:
    """The same with the fusion weights of the last pictures alone."""
    with_record = [n for n, entry in enumerate(history) if entry.record is not None]
    old = set(with_record[:-_MAX_RECORDS])
    return [
        Entry(entry.recipe, entry.file, entry.seconds, None) if n in old else entry
        for n, entry in enumerate(history)
    ]


def _short(entry: Entry) -> str:
    """A picture's caption."""
    steered = ", steered" if entry.recipe.bias else ""
    return f"{entry.recipe.drawn_by}{steered}, seed {entry.recipe.seed}, {entry.seconds:.1f} s"
