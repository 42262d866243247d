"""The page: what happens when something is clicked; `layout` is what there is to be clicked."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator  # gradio reads the handlers' annotations
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from afa.app import views
from afa.app.drawing import Drawn, Stopped
from afa.app.layout import MAX_PIXELS, MAX_STEPS, Layout, Slot, Usual
from afa.app.views import Entry
from afa.denoisers.kinds import denoiser_of
from afa.drawing.contenders import ENSEMBLE
from afa.drawing.pictures import identity_of, picture_recipe, save_picture
from afa.ensemble.caching.settings import PRESETS, acceleration_of
from afa.ensemble.protocol import expert_names
from afa.ensemble.steering import STAGES
from afa.errors import AfaError
from afa.files import slug
from afa.loading.pipeline import native_resolution, size_multiple
from afa.loading.truncation import warnings_for
from afa.reading import read_picture
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from afa.app.drawing import Studio
    from afa.drawing.pictures import PictureRecipe
    from afa.ensemble.recording import WeightRecord

#: so many pictures of a session keep their fusion weights, which are large
_MAX_RECORDS = 8
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
        self._dtype = str(denoiser.dtype).removeprefix("torch.")
        self._stops: dict[str, threading.Event] = {}
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        pipeline, experts = self._studio.pipeline, self._experts
        prompt, steps, guidance = _ZOO if self._ensemble.startswith("zoo:") else _OTHER
        size = native_resolution(pipeline)
        usual = Usual(prompt, steps, guidance, *size, size_multiple(pipeline))
        with gr.Blocks(title="afa", analytics_enabled=False) as blocks:
            self._history, self._shown, self._picked = gr.State([]), gr.State(None), gr.State(None)
            self._on = Layout(usual, experts, self._studio.contenders.names)
            self._connect()
            blocks.unload(self._leave)
        return blocks

    def _connect(self) -> None:
        controls, who, steering = self._on.controls, self._on.who, self._on.steering
        history, sampling = self._on.history, self._on.controls.sampling
        states = [self._history, self._shown]
        changed = [controls.status, controls.go, steering.go, controls.cancel, history.gallery]
        # one at a time, whoever asks; the others see their place in the queue
        drawing: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "draw",
            "show_progress_on": controls.status,
        }
        gr.on(
            [controls.go.click, controls.prompt.submit],
            self._draw_all,
            [self._history, controls.who, *sampling, *steering.biases],
            [*changed, *states, *_parts(self._on.compare.values())],
            **drawing,
        )
        steering.go.click(
            self._draw_both,
            [self._history, *sampling, *steering.biases],
            [*changed, *states, *_parts([steering.without, steering.steered])],
            **drawing,
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        controls.cancel.click(self._stop, None, controls.status, **quick)
        controls.dice.click(lambda: secrets.randbelow(MAX_SEED), None, controls.seed, **quick)
        zeros = [0] * len(steering.biases)
        steering.level.click(lambda: zeros, None, steering.biases, **quick)
        place = [self._history, self._shown, who.step, who.site]
        turned = [who.title, who.step, who.site, who.shares, *who.seen]
        self._shown.change(self._turn_to, states, turned, **quick)
        who.step.change(self._see, place, who.seen, **quick, trigger_mode="always_last")
        who.site.change(self._see, place, who.seen, **quick)
        who.site.change(self._see_shares, place, who.shares, **quick)
        who.map.select(self._point, place, who.numbers, **quick)
        picked = [self._picked, history.details, history.download, history.use, history.look]
        history.gallery.select(self._pick, self._history, picked, **quick)
        used = [*sampling, *steering.biases]
        history.use.click(self._use_again, [self._history, self._picked], used, **quick)
        history.look.click(
            lambda picked: (picked, gr.update(selected="who")),
            self._picked,
            [self._shown, self._on.tabs],
            **quick,
        )

    # -- drawing ------------------------------------------------------------------------------

    def _draw_all(
        self, request: gr.Request, history: list[Entry], who: list[str], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with everybody who is ticked, the ensemble with its bias."""
        fields, bias = self._read(values)
        places = self._on.compare
        yield {part: value for slot in places.values() for part, value in _cleared(slot).items()}

        def wanted() -> list[tuple[Slot, PictureRecipe]]:
            names = [name for name in places if name in who]
            if not names:
                raise AfaError(
                    "AFA-APP-001", "Somebody must draw: tick at least one under 'Drawn by'."
                )
            own = {ENSEMBLE: bias}
            return [(places[n], self._recipe(fields, n, own.get(n, {}))) for n in names]

        yield from self._draw(request, history, wanted)

    def _draw_both(
        self, request: gr.Request, history: list[Entry], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with the ensemble, without its bias and with it."""
        fields, bias = self._read(values)
        pairs: list[tuple[Slot, Any]] = [
            (self._on.steering.without, {}),
            (self._on.steering.steered, bias),
        ]
        yield {part: value for slot, _ in pairs for part, value in _cleared(slot).items()}

        def wanted() -> list[tuple[Slot, PictureRecipe]]:
            return [(slot, self._recipe(fields, ENSEMBLE, own)) for slot, own in pairs]

        yield from self._draw(request, history, wanted)

    def _draw(
        self,
        request: gr.Request,
        history: list[Entry],
        wanted: Callable[[], list[tuple[Slot, PictureRecipe]]],
    ) -> Iterator[dict[Any, Any]]:
        """Draw pictures, show each as soon as it is finished, and say what goes wrong."""
        session, stop, done = str(request.session_hash), threading.Event(), 0
        self._stops[session] = stop
        history, status = list(history), self._on.controls.status
        yield {status: views.note("Starting"), **self._buttons(is_busy=True)}
        try:
            asked = wanted()
            warnings = self._warnings(asked[0][1])
            if warnings:
                yield {status: views.warned("Starting", warnings)}
            for event in self._studio.draw([recipe for _, recipe in asked], stop):
                slot, recipe = asked[done]
                if not isinstance(event, Drawn):
                    yield {
                        status: views.progress(
                            slot.name, done, len(asked), event.step, recipe.steps
                        )
                    }
                    continue
                done += 1
                entry = self._keep_entry(event, session, len(history))
                history = _without_old_records([*history, entry])
                update: dict[Any, Any] = {
                    slot.image: str(entry.file),
                    slot.caption: views.caption(slot.name, entry),
                    self._history: history,
                    self._on.history.gallery: [(str(e.file), views.short(e)) for e in history],
                }
                if entry.record is not None:
                    update[self._shown] = len(history) - 1
                yield update
            seconds = sum(entry.seconds for entry in history[len(history) - done :])
            drawn = f"{done} {'picture' if done == 1 else 'pictures'}, {seconds:.1f} s"
            said = views.warned(drawn, warnings)
        except Stopped:
            said = views.note(f"Stopped; {done} of the pictures were finished.")
        except AfaError as error:
            said = views.complaint(f"{error} ({error.code})")
        except Exception as error:
            _log.exception("drawing failed")
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            said = views.complaint(f"Drawing failed. {what} The whole message is in the terminal.")
        finally:
            self._stops.pop(session, None)
        yield {status: said, **self._buttons(is_busy=False)}

    def _warnings(self, recipe: PictureRecipe) -> list[str]:
        """What the text encoders do not read; equal for all who draw the same prompt."""
        return warnings_for(
            self._studio.pipeline, [recipe.prompt], recipe.negative_prompt, recipe.guidance
        )

    def _read(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """What the controls say: fields of a recipe, and the bias."""
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance")
        *sampling, speed, height, width = values[: -len(self._on.steering.biases)]
        fields = dict(zip(names, sampling, strict=True))
        fields |= {"height": height, "width": width, "speed": speed}
        count, given = len(self._experts), values[-len(self._on.steering.biases) :]
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
        for key, most in {"steps": MAX_STEPS, "height": MAX_PIXELS, "width": MAX_PIXELS}.items():
            if not isinstance(fields[key], (int, float)) or fields[key] > most:
                raise AfaError("AFA-APP-002", f"{key} must be a number, {most} at the most.")
        multiple = size_multiple(self._studio.pipeline)
        for key in ("height", "width"):
            if fields[key] % multiple:
                raise AfaError("AFA-APP-003", f"{key} must be a multiple of {multiple} pixels.")
        return picture_recipe(
            **fields,
            ensemble=self._ensemble,
            identity=self._identity,
            drawn_by=name,
            bias=bias,
            acceleration=acceleration,
            dtype=self._dtype,
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
            self._on.controls.go: gr.update(interactive=not is_busy),
            self._on.steering.go: gr.update(interactive=not is_busy),
            self._on.controls.cancel: gr.update(interactive=is_busy),
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
            return [text, *[gr.skip()] * (3 + len(self._on.who.seen))]
        sites = [views.ALL_SITES, *record.places]
        caption = views.caption(history[shown].recipe.prompt)
        return [
            caption,
            gr.update(maximum=len(record.steps), value=0),
            gr.update(choices=sites, value=views.ALL_SITES),
            self._see_shares(history, shown, 0, views.ALL_SITES),
            *self._see(history, shown, 0, views.ALL_SITES),
        ]

    def _see(self, history: list[Entry], shown: int | None, step: int, site: str) -> list[Any]:
        record = _record(history, shown)
        if record is None or shown is None or site not in (views.ALL_SITES, *record.places):
            return [gr.skip()] * len(self._on.who.seen)
        weights = views.weights_at(record, step, site)
        overlay = views.overlay(read_picture(history[shown].file), weights)
        alone: list[Any] = []
        for expert, own in zip(self._experts, weights, strict=True):
            alone += [views.alone(own), views.caption(f"{expert} {own.float().mean():.0%}")]
        return [overlay, views.legend(self._experts, weights), "", *alone]

    def _see_shares(self, history: list[Entry], shown: int | None, _: int, site: str) -> Any:
        record = _record(history, shown)
        if record is None or site not in (views.ALL_SITES, *record.places):
            return gr.skip()
        return views.shares_over_steps(self._experts, record, site)

    def _point(
        self, history: list[Entry], shown: int | None, step: int, site: str, event: gr.SelectData
    ) -> str:
        record = _record(history, shown)
        if record is None or shown is None:
            return ""
        weights = views.weights_at(record, step, site)
        size = views.overlay(read_picture(history[shown].file), weights).size
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
            return [gr.skip()] * (8 + len(self._on.steering.biases))
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


def _parts(slots: Iterable[Slot]) -> list[Any]:
    return [part for slot in slots for part in (slot.image, slot.caption)]


def _cleared(slot: Slot) -> dict[Any, Any]:
    return {slot.image: None, slot.caption: views.caption(slot.name)}


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
