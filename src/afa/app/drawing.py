"""Drawing in a thread of its own, that tells how far it is and can be stopped at any site."""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of
from afa.drawing.contenders import ENSEMBLE, Contenders
from afa.drawing.pictures import draw, on_every_call
from afa.ensemble.recording import WeightRecord, observed, record_weights
from afa.ensemble.steering import steer

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from diffusers import DiffusionPipeline
    from PIL import Image

    from afa.drawing.pictures import PictureRecipe


class Stopped(Exception):
    """Somebody has asked for the work to end."""


@dataclass(frozen=True)
class Progress:
    """How far a picture is: so many of its steps are done."""

    recipe: PictureRecipe
    step: int


@dataclass(frozen=True)
class Drawn:
    """A picture that is finished, what it took, and, of the ensemble, the fusion weights."""

    recipe: PictureRecipe
    picture: Image.Image
    seconds: float
    record: WeightRecord | None


class Studio:
    """Draws pictures with an ensemble and its parts, one at a time.

    Args:
        pipeline: with the ensemble.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.contenders = Contenders(pipeline)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="afa-drawing")

    def draw(
        self, recipes: Sequence[PictureRecipe], stop: threading.Event
    ) -> Iterator[Progress | Drawn]:
        """Draw pictures one after another.

        The work is done in a thread; where the iterator is closed before its end, that ends at the
        next site.

        Args:
            recipes: of the pictures.
            stop: set by whoever wants the work to end.

        Yields: progress at every step, and every picture as soon as it is finished.

        Raises:
            Stopped: `stop` was set.
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
        _require_going_on(stop)
        pipeline = self.contenders.pipeline(recipe.drawn_by, recipe.acceleration)
        denoiser = denoiser_of(self.pipeline)
        is_ensemble = recipe.drawn_by == ENSEMBLE
        if is_ensemble:
            steer(self.pipeline, recipe.bias)

        def at_step(step: int) -> None:
            _require_going_on(stop)
            events.put(Progress(recipe, min(step, recipe.steps)))

        started = time.perf_counter()
        with (
            record_weights(denoiser) as record,
            observed(denoiser, lambda *_: _require_going_on(stop), immediately=True),
            on_every_call(pipeline, at_step),
        ):
            picture = draw(pipeline, recipe)
        seconds = time.perf_counter() - started
        return Drawn(recipe, picture, seconds, record.last() if is_ensemble else None)


def _require_going_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped
