"""Draw in a separate thread that reports progress and can be stopped at any site."""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of
from afa.denoisers.schedulers import name_of
from afa.drawing.contenders import ENSEMBLE, Contenders, Student
from afa.drawing.pictures import drafts_of, draw, on_every_call
from afa.ensemble.recording import WeightRecord, observed, record_weights
from afa.ensemble.steering import steer

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from diffusers import DiffusionPipeline
    from PIL import Image

    from afa.drawing.recorded import PictureRecipe


class Stopped(Exception):
    """The work was cancelled."""


@dataclass(frozen=True)
class Progress:
    """The number of finished steps of a picture."""

    recipe: PictureRecipe
    step: int


@dataclass(frozen=True)
class Drawn:
    """A finished picture, its duration, and the fusion weights if the ensemble drew it.

    `scheduler` is the name of the model's own, see `afa.denoisers.schedulers.name_of`.
    """

    recipe: PictureRecipe
    picture: Image.Image
    seconds: float
    record: WeightRecord | None
    scheduler: str


class Studio:
    """Draws pictures with an ensemble, its experts and their merge, one at a time.

    Args:
        pipeline: the pipeline of the ensemble.
        student: its student; None for none.
    """

    def __init__(self, pipeline: DiffusionPipeline, student: Student | None = None) -> None:
        self.pipeline = pipeline
        self.contenders = Contenders(pipeline, student)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="afa-drawing")

    def drafted(self, recipe: PictureRecipe) -> PictureRecipe:
        """A recipe with the drafts that the ensemble uses for its prompt; others have none."""
        is_ensemble = recipe.drawn_by == ENSEMBLE
        return recipe.model_copy(
            update=drafts_of(self.pipeline, recipe.words) if is_ensemble else {}
        )

    def draw(
        self, recipes: Sequence[PictureRecipe], stop: threading.Event
    ) -> Iterator[Progress | Drawn]:
        """Draw pictures one after another.

        A thread does the work. Closing the iterator early stops it at the next site.

        Args:
            recipes: the recipes of the pictures.
            stop: event that cancels the work.

        Yields:
            The progress at each step, and each finished picture.

        Raises:
            Stopped: if `stop` was set.
        """
        events: queue.Queue[Progress | Drawn | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                for recipe in recipes:
                    events.put(self._drawn(recipe, stop, events))
            except BaseException as error:
                events.put(error)
            else:
                events.put(None)

        done = self._worker.submit(work)
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()
            wait([done])

    def _drawn(
        self, recipe: PictureRecipe, stop: threading.Event, events: queue.Queue[Any]
    ) -> Drawn:
        _raise_if_stopped(stop)
        pipeline = self.contenders.pipeline(recipe.drawn_by, recipe.acceleration)
        denoiser = denoiser_of(self.pipeline)
        is_ensemble = recipe.drawn_by == ENSEMBLE
        if is_ensemble:
            steer(self.pipeline, recipe.bias)

        def at_step(step: int) -> None:
            _raise_if_stopped(stop)
            events.put(Progress(recipe, min(step * recipe.steps // recipe.num_calls, recipe.steps)))

        started = time.perf_counter()
        with (
            record_weights(denoiser) as record,
            observed(denoiser, lambda *_: _raise_if_stopped(stop), immediately=True),
            on_every_call(pipeline, at_step, lambda: _raise_if_stopped(stop)),
        ):
            picture = draw(pipeline, recipe)
        seconds = time.perf_counter() - started
        own, weights = name_of(pipeline.scheduler), record.last() if is_ensemble else None
        return Drawn(recipe, picture, seconds, weights, own)


def _raise_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped
