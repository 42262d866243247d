"""The page and its event handlers; `layout` defines the controls."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator  # gradio evaluates the annotations of handlers
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from afa.app import views
from afa.app.api import Endpoint
from afa.app.drawing import Drawn, Stopped
from afa.app.layout import MAX_PIXELS, MAX_STEPS, OWN, Defaults, Layout, Slot, parts
from afa.app.views import Entry
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.schedulers import scheduler_names_for
from afa.drawing.contenders import ENSEMBLE
from afa.drawing.pictures import identity_of
from afa.drawing.recorded import picture_recipe, save_picture
from afa.drawing.sampling_warnings import sampling_warnings
from afa.ensemble.caching.settings import PRESETS, acceleration_of
from afa.ensemble.protocol import expert_names
from afa.ensemble.steering import STAGES
from afa.errors import AfaError
from afa.files import slug
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.task import native_resolution, size_multiple
from afa.loading.truncation import warnings_for
from afa.loading.vocabulary import word_warnings
from afa.reading import counted, read_picture
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from afa.app.drawing import Studio
    from afa.drawing.recorded import PictureRecipe

_ZOO = ("a fox on the left and a pizza on the right, blue background", 20, 3.0)
_OTHER = ("a fox in the snow", 30, 7.5)
_log = logging.getLogger(__name__)


class Page:
    """The page of one ensemble; `blocks` is the gradio app.

    Args:
        studio: draws the pictures.
        ensemble: folder of the ensemble, or `zoo:ensemble`.
        folder: temporary folder for the pictures of all sessions.
        keep: additional folder for all pictures; None keeps none.
    """

    def __init__(
        self, studio: Studio, ensemble: str, folder: Path, keep: Path | None = None
    ) -> None:
        self._studio, self._ensemble = studio, ensemble
        self._folder, self._keep = folder, keep
        denoiser = denoiser_of(studio.pipeline)
        self._identity = identity_of(denoiser)
        self._experts = expert_names(denoiser)
        #: names of the experts in a bias; a number if the name is not unique
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
        fit = (size_multiple(pipeline), scheduler_names_for(pipeline))
        defaults = Defaults(prompt, steps, guidance, *size, *fit)
        with gr.Blocks(title="afa", analytics_enabled=False) as blocks:
            self._history, self._shown, self._picked = gr.State([]), gr.State(None), gr.State(None)
            self._on = Layout(defaults, experts, self._studio.contenders.names)
            self._connect()
            blocks.unload(self._leave)
            places = (self._folder, self._keep, self._device)
            Endpoint(self._studio, self._keys, defaults, *places, self._recipe)
        return blocks

    def _connect(self) -> None:
        controls, weights, steering = self._on.controls, self._on.weights, self._on.steering
        history, sampling = self._on.history, self._on.controls.sampling
        states = [self._history, self._shown]
        changed = [controls.status, controls.go, steering.go, controls.cancel, history.gallery]
        # one drawing at a time over all sessions; the others see their position in the queue
        drawing: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "draw",
            "show_progress_on": controls.status,
            "api_visibility": "private",
        }
        gr.on(
            [controls.go.click, controls.prompt.submit],
            self._draw_all,
            [self._history, controls.contenders, *sampling, *steering.biases],
            [*changed, *states, *parts(self._on.compare.values())],
            **drawing,
        )
        steering.go.click(
            self._draw_both,
            [self._history, *sampling, *steering.biases],
            [*changed, *states, *parts([steering.without, steering.steered])],
            **drawing,
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        quick["api_visibility"] = "private"  # programs use the endpoint of `api`
        controls.cancel.click(self._stop, None, controls.status, **quick)
        controls.dice.click(lambda: secrets.randbelow(MAX_SEED), None, controls.seed, **quick)
        zeros = [0] * len(steering.biases)
        steering.reset.click(lambda: zeros, None, steering.biases, **quick)
        selected = [self._history, self._shown, weights.step, weights.site]
        opened = [weights.title, weights.step, weights.site, weights.shares, *weights.seen]
        self._shown.change(self._show_weights, states, opened, **quick)
        weights.step.change(
            self._update_maps, selected, weights.seen, **quick, trigger_mode="always_last"
        )
        weights.site.change(self._update_maps, selected, weights.seen, **quick)
        weights.site.change(self._update_shares, selected, weights.shares, **quick)
        # by default, a click is lost while the answer to an earlier one is under way
        last = {**quick, "trigger_mode": "always_last"}
        weights.map.select(self._numbers_at, selected, weights.numbers, **last)
        picked = [self._picked, history.details, history.download, history.use, history.look]
        history.gallery.select(self._pick, self._history, picked, **last)
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
        self, request: gr.Request, history: list[Entry], chosen: list[str], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with all selected contenders; the bias applies to the ensemble."""
        slots = self._on.compare
        wanted = [(slots[name], name, name == ENSEMBLE) for name in slots if name in chosen]
        yield from self._draw(request, history, values, slots.values(), wanted)

    def _draw_both(
        self, request: gr.Request, history: list[Entry], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw with the ensemble, without and with the bias."""
        slots = [self._on.steering.without, self._on.steering.steered]
        wanted = [(slot, ENSEMBLE, slot is slots[1]) for slot in slots]
        yield from self._draw(request, history, values, slots, wanted)

    def _draw(
        self,
        request: gr.Request,
        history: list[Entry],
        values: Sequence[Any],
        slots: Iterable[Slot],
        wanted: Sequence[tuple[Slot, str, bool]],
    ) -> Iterator[dict[Any, Any]]:
        """Draw pictures, show each one when it is finished, and show errors.

        Args:
            request: names the session.
            history: the pictures of the session.
            values: see `_read`.
            slots: are cleared first.
            wanted: where to show each picture, its contender, and whether it is biased.
        """
        fields, bias = self._read(values)
        yield {part: value for slot in slots for part, value in slot.cleared().items()}
        session, stop, done = str(request.session_hash), threading.Event(), 0
        self._stops[session] = stop
        history, status = list(history), self._on.controls.status
        yield {status: views.note("Starting"), **self._buttons(is_busy=True)}
        try:
            if not wanted:
                raise AfaError("AFA-APP-001", "Nothing to draw. Select at least one 'Drawn by'.")
            planned = [
                (slot, self._recipe(fields, name, bias if is_biased else {}))
                for slot, name, is_biased in wanted
            ]
            recipes = [recipe for _, recipe in planned]
            fused = [recipe for recipe in recipes if recipe.drawn_by == ENSEMBLE]
            warnings = self._warnings((fused or recipes)[0])
            if warnings:
                yield {status: views.warned("Starting", warnings)}
            for event in self._studio.draw([recipe for _, recipe in planned], stop):
                slot, recipe = planned[done]
                if not isinstance(event, Drawn):
                    yield {
                        status: views.progress(
                            slot.name, done, len(planned), event.step, recipe.steps
                        )
                    }
                    continue
                done += 1
                entry = self._keep_entry(event, session, len(history))
                history = views.without_old_records([*history, entry])
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
            drawn = f"{counted(done, 'picture')}, {seconds:.1f} s"
            result = views.warned(drawn, warnings)
        except Stopped:
            result = views.note(f"Stopped after {done} of {len(planned)} pictures.")
        except AfaError as error:
            result = views.complaint(f"{error} ({error.code})")
        except Exception as error:
            _log.exception("drawing failed")
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            result = views.complaint(f"Drawing failed: {what} See the terminal for details.")
        finally:
            self._stops.pop(session, None)
        yield {status: result, **self._buttons(is_busy=False)}

    def _warnings(self, recipe: PictureRecipe) -> list[str]:
        """Warnings of truncated prompts, unknown words, the scheduler and the size."""
        asked = (recipe.negative_prompt, recipe.guidance, recipe.prompt_syntax)
        pipeline = self._studio.pipeline
        warnings = warnings_for(pipeline, [recipe.prompt], *asked)
        warnings += sampling_warnings(pipeline, [recipe], size_advice="Set another size.")
        fused = recipe.drawn_by == ENSEMBLE and recipe.drafts is None
        prompts = [recipe.words] if fused else []
        return warnings + word_warnings(ensemble_folder(self._ensemble), prompts)

    def _read(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """Convert the values of the controls to fields of a recipe and a bias."""
        names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "prompt_syntax")
        *sampling, speed, scheduler, height, width = values[: -len(self._on.steering.biases)]
        fields = dict(zip(names, sampling, strict=True))
        chosen = None if scheduler == OWN else scheduler
        fields |= {"height": height, "width": width, "speed": speed, "scheduler": chosen}
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
        for key, maximum in {"steps": MAX_STEPS, "height": MAX_PIXELS, "width": MAX_PIXELS}.items():
            if not isinstance(fields[key], (int, float)) or fields[key] > maximum:
                raise AfaError(
                    "AFA-APP-002",
                    f"{key} must be a number of at most {maximum}; got {str(fields[key])[:80]}.",
                )
        multiple = size_multiple(self._studio.pipeline)
        for key in ("height", "width"):
            if fields[key] % multiple:
                raise AfaError(
                    "AFA-APP-003",
                    f"{key} must be a multiple of {multiple} pixels; got {fields[key]}.",
                )
        recipe = picture_recipe(
            **{**fields, **self._studio.contenders.fields(name)},
            ensemble=self._ensemble,
            identity=self._identity,
            drawn_by=name,
            bias=bias,
            acceleration=acceleration,
            dtype=self._dtype,
        )
        return self._studio.drafted(recipe)

    def _keep_entry(self, drawn: Drawn, session: str, number: int) -> Entry:
        """Write a picture to the temporary folder and to the folder to keep."""
        recipe = drawn.recipe
        name = f"{number:03d}-{slug(recipe.prompt)}-{slug(recipe.drawn_by)}.png"
        path = self._folder / slug(session) / name
        path.parent.mkdir(exist_ok=True)
        kept = [self._keep / f"{slug(session)[:8]}-{name}"] if self._keep else []
        for place in (path, *kept):
            save_picture(drawn.picture, place, recipe, self._device, drawn.scheduler)
        return Entry(recipe, path, drawn.seconds, drawn.record)

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
        """Cancel the drawing of a session whose browser has left."""
        with suppress(KeyError):
            self._stops[str(request.session_hash)].set()

    # -- fusion weights -----------------------------------------------------------------------

    def _show_weights(self, history: list[Entry], shown: int | None) -> list[Any]:
        record = views.record_of(history, shown)
        if record is None or shown is None:
            text = "<p>The weights of this picture were discarded. Draw it again.</p>"
            return [text, *[gr.skip()] * (3 + len(self._on.weights.seen))]
        sites = [views.ALL_SITES, *record.places]
        caption = views.caption(history[shown].recipe.prompt)
        return [
            caption,
            gr.update(maximum=len(record.steps), value=0),
            gr.update(choices=sites, value=views.ALL_SITES),
            self._update_shares(history, shown, 0, views.ALL_SITES),
            *self._update_maps(history, shown, 0, views.ALL_SITES),
        ]

    def _update_maps(
        self, history: list[Entry], shown: int | None, step: int, site: str
    ) -> list[Any]:
        record = views.record_of(history, shown)
        if record is None or shown is None or site not in (views.ALL_SITES, *record.places):
            return [gr.skip()] * len(self._on.weights.seen)
        weights = views.weights_at(record, step, site)
        overlay = views.overlay(read_picture(history[shown].file), weights)
        maps: list[Any] = []
        for expert, own in zip(self._experts, weights, strict=True):
            maps += [views.weight_map(own), views.caption(f"{expert} {own.float().mean():.0%}")]
        return [overlay, views.legend(self._experts, weights), "", *maps]

    def _update_shares(self, history: list[Entry], shown: int | None, _: int, site: str) -> Any:
        record = views.record_of(history, shown)
        if record is None or site not in (views.ALL_SITES, *record.places):
            return gr.skip()
        return views.shares_over_steps(self._experts, record, site)

    def _numbers_at(
        self, history: list[Entry], shown: int | None, step: int, site: str, event: gr.SelectData
    ) -> str:
        record = views.record_of(history, shown)
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
            return [gr.skip()] * (len(self._on.controls.sampling) + len(self._on.steering.biases))
        recipe = history[picked].recipe
        speed = next(
            name for name, preset in PRESETS.items() if preset.describe() == recipe.acceleration
        )
        by_stage = [
            recipe.bias.get(key, {}).get(stage, 0.0) for key in self._keys for stage in STAGES
        ]
        return [
            *(recipe.prompt, recipe.negative_prompt, recipe.seed, recipe.steps, recipe.guidance),
            *(recipe.prompt_syntax, speed, recipe.scheduler or OWN, recipe.height, recipe.width),
            *(*[0] * len(self._keys), *by_stage),
        ]
