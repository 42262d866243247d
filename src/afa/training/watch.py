"""Monitoring of a training: metrics, validation, unused experts and preview pictures."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from PIL import Image

from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.denoisers.schedulers import sampled_with, scheduler_for
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.weighted_prompts import of_equal_length, prompt_call
from afa.files import write_png
from afa.loading.task import native_resolution
from afa.machine.devices import widest_float
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.training.cache import CacheProgress
from afa.training.curves import Curves
from afa.training.encoding import Recorded
from afa.training.objective import denoising_loss, prediction_loss
from afa.training.record import EARLY, Recorder, entries_of, routing_figures
from afa.training.routing import CollapseWatch, Routing, tapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.training.changing import History
    from afa.training.examples import Broken, Examples
    from afa.training.loop import TrainStep
    from afa.training.recipe import PreviewRecipe, TrainingRecipe, ValidationRecipe
    from afa.training.trainer import Trainer

PREVIEWS = "previews"


class Watched(Protocol):
    """A recipe of a training."""

    @property
    def training(self) -> TrainingRecipe:
        """Its settings."""

    @property
    def validation(self) -> ValidationRecipe | None:
        """The validation; None for none."""

    @property
    def previews(self) -> PreviewRecipe | None:
        """The preview pictures; None for none."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return all of it as JSON."""


class Watch:
    """Logs metrics, validates and draws previews at the intervals of the recipe.

    Only the main process writes; all processes validate. Used as a context, which closes the
    trackers at its end.

    Args:
        recipe: the recipe.
        output: the run's folder.
        trainer: the training.
        validation: held-out samples; None without validation.
        history: the recipes of the run.

    Raises:
        AfaError: if the prompts of previews cannot be read or weighted.
    """

    def __init__(
        self,
        recipe: Watched,
        output: Path,
        trainer: Trainer,
        validation: Examples | None,
        history: History,
    ) -> None:
        self._recipe, self._output, self._trainer = recipe, output, trainer
        self._validation, self._history = validation, history
        self._last = trainer.first  # step
        if (previews := recipe.previews) is not None:  # before the first step
            of_equal_length(trainer.pipeline, previews.prompts, "", previews.prompt_syntax)
        denoiser = denoiser_of(trainer.pipeline)
        #: the ensemble whose routing is logged; None for another model
        self._ensemble = denoiser if isinstance(denoiser, EnsembleDenoiser) else None
        names = [] if self._ensemble is None else self._ensemble.provenance.names
        self._names = _distinct(names)
        self._collapse = CollapseWatch(self._names)
        self._routings: list[Routing] = []
        if recipe.previews is not None and recipe.previews.scheduler is not None:
            scheduler_for(trainer.pipeline, recipe.previews.scheduler)  # refused before a step
        self._recorder = self._curves = None
        self._notes: list[str] = []  # for the next step
        if trainer.engine.is_main:
            settings = recipe.model_dump(mode="json")
            trackers = recipe.training.trackers
            self._recorder = Recorder(output, trackers, settings, trainer.first)
            self._notes += self._recorder.notes
            if history.has_changed_here:
                self._notes.append(history.lines[-1])
            losses, starts = self._recorder.losses, self._recorder.starts
            self._curves = Curves(output, losses, starts, history, recipe.training.num_steps)

    def __enter__(self) -> Self:
        self._catch_up()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # not while the process is asked to end at once
        if self._curves is not None and (kind is None or issubclass(kind, Exception)):
            self._curves.draw(is_last=True)
        if self._recorder is not None:
            self._recorder.close()

    def skipped(self, broken: Broken) -> None:
        """Log the pictures that were found to be broken before the first step."""
        if self._recorder is not None and broken.found:
            self._recorder.write(self._trainer.first, {"skipped": list(broken.found.values())})

    def steps(
        self, examples: Examples, should_stop: Callable[[], bool] | None
    ) -> Iterator[TrainStep | CacheProgress]:
        """Run the remaining steps of the training, and end it early if its recipe says so."""
        early, num_steps = self._trainer.early, self._trainer.settings.num_steps
        notes: list[str] = []
        if early is None or not early.is_over:
            with closing(self._trainer.steps(examples, should_stop)) as steps:
                for step in steps:
                    yield self.see(step)
                    if early is not None and early.is_over:
                        notes = examples.notes(is_last=True)
                        break
        if early is not None:
            notes = [early.line(self._last, num_steps), *notes]
            yield CacheProgress("early stopping", self._last, num_steps, tuple(notes))

    @property
    def summary(self) -> list[str]:
        """What the model card says about the training; empty if nothing is unusual."""
        early, num_steps = self._trainer.early, self._trainer.settings.num_steps
        return [
            *self._history.lines,
            *([] if early is None else [early.line(self._last, num_steps)]),
        ]

    def see(self, step: TrainStep) -> TrainStep:
        """Process a step; returns it with additional notes."""
        self._last = step.step
        notes = [*self._notes, *step.notes]
        self._notes = []
        if step.routing is not None:
            self._routings.append(step.routing)
        if self._recorder is not None:
            self._recorder.step(step)
            if notes:
                self._recorder.write(step.step, {"notes": notes})
        if self._is_due(step, self._recipe.training.log_every):
            notes += self._log(step.step)
        validation, previews = self._recipe.validation, self._recipe.previews
        if self._validation is not None and validation and self._is_due(step, validation.every):
            loss = self._validate(step.step)
            notes.append(f"validation loss {loss:.4f}")
            self._judge(step.step, loss)
            self._end_early(step.step)
        if previews is not None and self._is_due(step, previews.every):
            self._preview(step.step, previews)
        if self._curves is not None and self._is_due(step, self._trainer.settings.checkpoint_every):
            notes += self._curves.draw(is_last=step.step == step.num_steps)
        return replace(step, notes=tuple(notes))

    def _catch_up(self) -> None:
        """Do what is due at the checkpoint of a run that was killed before it could do it."""
        first, settings = self._trainer.first, self._trainer.settings
        last = first == settings.num_steps
        validation, previews = self._recipe.validation, self._recipe.previews
        if not first:
            return
        if self._validation is not None and validation and (first % validation.every == 0 or last):
            entries = entries_of(self._output, "validation_loss")
            known = {entry["step"]: entry["validation_loss"] for entry in entries}
            loss = known[first] if first in known else self._validate(first)
            self._judge(first, loss)
        if self._trainer.early is not None and self._history.has_changed_here:
            self._trainer.early.restart()
        self._end_early(first)
        is_drawn = self._sheet(first).exists()
        if previews is not None and (first % previews.every == 0 or last) and not is_drawn:
            self._preview(first, previews)

    def _judge(self, step: int, loss: float) -> None:
        """Let early stopping see a validation loss."""
        if self._trainer.early is not None:
            # the sum over processes may differ in its last bit between them
            self._trainer.validated(step, self._trainer.engine.gather([loss])[0])

    def _end_early(self, step: int) -> None:
        """Save and record the end of the training, if it ends after this step."""
        early = self._trainer.early
        if early is None or not early.is_over:
            return
        self._trainer.save(step)  # with the decision, also where no checkpoint was due
        if self._recorder is not None and not any(
            entry["step"] == step for entry in entries_of(self._output, EARLY)
        ):
            found = {"best_step": early.state.best_step, "best_loss": early.state.best_loss}
            self._recorder.write(step, {EARLY: found})

    @staticmethod
    def _is_due(step: TrainStep, every: int) -> bool:
        return step.step % every == 0 or step.step == step.num_steps

    def _sheet(self, step: int) -> Path:
        return self._output / PREVIEWS / f"step-{step:08d}.png"

    def _set_training(self, mode: bool) -> None:
        for module in self._trainer.trained.modules:
            module.train(mode)

    def _log(self, step: int) -> list[str]:
        """Write the metrics since the last call; returns warnings."""
        if self._recorder is not None:
            self._recorder.flush(step)
        if not self._routings:
            return []
        own, self._routings, engine = Routing.mean(self._routings), [], self._trainer.engine
        routing = Routing(own.sites, engine.mean(own.shares), engine.mean(own.entropy))
        if self._recorder is None:
            return []
        warnings = self._collapse.see(routing, step)
        figures: dict[str, Any] = routing_figures(routing, self._names)
        self._recorder.write(step, figures | ({"warnings": warnings} if warnings else {}))
        return warnings

    def _validate(self, step: int) -> float:
        """The loss of the held-out samples, with fixed timesteps and noise."""
        trainer, validation = self._trainer, self._validation
        assert validation is not None, "called only with validation samples"
        engine, settings = trainer.engine, trainer.settings
        assert self._recipe.validation is not None
        count, size = self._recipe.validation.num_samples, settings.batch_size
        places = validation.rows(count, size)
        mine = places[engine.rank :: engine.num_processes]
        # sharded experts need all processes in a forward pass: some repeat a batch uncounted
        num_rounds = math.ceil(len(places) / engine.num_processes)
        counts = [True] * len(mine) + [False] * (num_rounds - len(mine))
        mine = [*mine, *places[: num_rounds - len(mine)]]
        process = forward_process(trainer.pipeline.scheduler)
        predict = conditioning_of(trainer.pipeline).predict
        wide = widest_float(engine.device)
        losses = torch.zeros(1, dtype=wide, device=engine.device)
        routings: list[Routing] = []
        denoiser, ensemble = denoiser_of(trainer.pipeline), self._ensemble
        tapping = nullcontext() if ensemble is None else tapped(ensemble)
        self._set_training(False)
        with torch.no_grad(), trainer.averaged(), tapping as tap:
            for row, batch, is_mine in zip(mine, validation.batches(mine), counts, strict=True):
                # one timestep per sample, evenly spaced over all samples
                time = torch.tensor([(place + 0.5) / count for place in row], dtype=wide)
                of = partial(predict, trainer.pipeline, denoiser, conditions=batch.conditions)
                if isinstance(batch, Recorded):
                    loss = prediction_loss(of, batch.noisy, batch.timestep, batch.target)
                else:
                    loss = denoising_loss(
                        of, process, batch.clean, noise=batch.noise, time=time.to(engine.device)
                    )
                if is_mine:
                    losses += loss.to(wide).sum()
                    if tap is not None:
                        routings.append(tap.routing())
        self._set_training(True)
        total = float(engine.total(losses)) / count
        if self._recorder is not None:
            figures: dict[str, Any] = {"validation_loss": total}
            if routings and engine.num_processes == 1:
                seen = routing_figures(Routing.mean(routings), self._names)
                figures |= {f"validation/{key}": value for key, value in seen.items()}
            self._recorder.write(step, figures)
        return total

    def _preview(self, step: int, previews: PreviewRecipe) -> None:
        """Draw the preview prompts from fixed noise."""
        engine = self._trainer.engine
        if self._recorder is None and not engine.is_sharding:
            return
        pipeline = self._trainer.pipeline
        self._set_training(False)
        pipeline.set_progress_bar_config(disable=True)
        # with offloaded or sharded experts these parts are on the CPU
        parts = [
            part
            for name, part in pipeline.components.items()
            if part is not None and name.startswith(("vae", "text_encoder"))
        ]
        places = [part.device for part in parts]
        for part in parts:
            part.to(engine.device)
        what = f"Previews of {len(previews.prompts)} prompts at once"
        remedy = smaller_batch(
            len(previews.prompts), "no more previews.prompts than", None, "Or remove previews."
        )
        sampled = sampled_with(pipeline, previews.scheduler)
        with torch.no_grad(), self._trainer.averaged(), saying_what_fits(what, remedy), sampled:
            pictures = _drawn(pipeline, previews)
        for part, place in zip(parts, places, strict=True):
            part.to(place)
        self._set_training(True)
        if self._recorder is None:
            return
        self._sheet(step).parent.mkdir(exist_ok=True)
        write_png(self._sheet(step), _grid(pictures))
        self._recorder.pictures(step, pictures)


def _drawn(pipeline: DiffusionPipeline, previews: PreviewRecipe) -> list[Image.Image]:
    """A preview of each prompt, in as few batches as their lengths allow."""
    kind, (height, width) = kind_of_pipeline(pipeline), native_resolution(pipeline)
    prompts, syntax = previews.prompts, previews.prompt_syntax
    found: dict[int, Image.Image] = {}
    for batch in of_equal_length(pipeline, prompts, "", syntax):
        chosen = [prompts[n] for n in batch]
        pictures = pipeline(
            height=height,
            width=width,
            num_inference_steps=previews.num_steps,
            generator=[torch.Generator().manual_seed(previews.seed + n) for n in batch],
            **prompt_call(pipeline, chosen, "", previews.guidance, syntax),
            **kind.call,
        ).images
        found |= dict(zip(batch, pictures, strict=True))
    return [found[n] for n in range(len(prompts))]


def _distinct(names: list[str]) -> list[str]:
    """Names without file suffix, and with numbers for duplicates."""
    names = [name.removesuffix(".safetensors").removesuffix(".gguf") for name in names]
    return [
        f"{name} {names[:n].count(name) + 1}" if names.count(name) > 1 else name
        for n, name in enumerate(names)
    ]


def _grid(pictures: list[Image.Image]) -> Image.Image:
    """All pictures in one, in a grid that is about square."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (n % columns * width, n // columns * height))
    return sheet
