"""The steps of a training, as a generator: whoever runs it owns the bar, the log and the stop."""

from __future__ import annotations

import itertools
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import GradScaler

from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.training.examples import readers_alive
from afa.training.objective import denoising_loss, forward_process
from afa.training.routing import Routing, tapped
from afa.training.stopping import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from afa.training.encoding import Encoded
    from afa.training.engine import Engine
    from afa.training.examples import Examples
    from afa.training.objective import ForwardProcess
    from afa.training.recipe import TrainingRecipe
    from afa.training.routing import WeightTap


class NotFinite(AfaError):
    """A loss or a gradient that would spoil the aggregators."""


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step, seen from outside.

    Attributes:
        step: how many are done, this one included.
        num_steps: how many are asked for.
        loss: the mean over the samples of all processes, without regularisers.
        seconds: that it took.
        learning_rate: of this step.
        grad_norm: of all gradients, before they were clipped.
        routing: how the weights are spread over the experts; None without aggregators.
        notes: what a user should read, one line each.
    """

    step: int
    num_steps: int
    loss: float
    seconds: float
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    routing: Routing | None = None
    notes: tuple[str, ...] = ()


def optimizer_steps(
    pipeline: DiffusionPipeline,
    examples: Examples,
    settings: TrainingRecipe,
    optimizer: torch.optim.Optimizer,
    *,
    engine: Engine,
    modules: Sequence[nn.Module],
    save: Callable[[int], None],
    first: int = 0,
    scaler: GradScaler | None = None,
    after_step: Callable[[], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[TrainStep]:
    """The steps of any training with the experts' objective: of aggregators, or of one model.

    What a step sees depends on the seed and the step alone, so two trainings with the same settings
    see the very same data, timesteps and noise.

    Args:
        pipeline: stock parts around the denoiser that is called.
        examples: where batches come from.
        settings: steps, batch size, learning rate and so on.
        optimizer: of the parameters that are trained.
        engine: the processes.
        modules: what is in training mode meanwhile.
        save: called with the number of steps done, every so often, before a bad picture's error and
            before a stop.
        first: the number of steps that were done before.
        scaler: of the loss, for experts in float16.
        after_step: called when the parameters have changed, before anything is saved.
        should_stop: asked after each step.

    Raises:
        AfaError: a picture that cannot be had, or a loss or gradient that is no longer finite.
        Stopped: it was asked to stop; all is saved.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    process = forward_process(pipeline.scheduler)
    denoiser = denoiser_of(pipeline)
    is_ensemble = isinstance(denoiser, EnsembleDenoiser)
    model = engine.prepare(denoiser, denoiser.frozen_names() if is_ensemble else [])
    batches = examples.batches(engine.shares(settings).batches(first, settings.num_steps))
    num_known = len(examples.broken.found)
    done = first
    too_large = smaller_batch(
        settings.batch_size,
        "training.batch_size",
        settings.gradient_accumulation_steps,
        "Or take gradient_checkpointing: true, or expert_dtype: bfloat16.",
    )

    def gradients(step: int, last: bool, tap: WeightTap | None) -> tuple[Tensor, Routing | None]:
        """Add one batch's gradients; returns its loss."""
        batch = next(batches)
        with engine.without_sync(model, when=not last):
            loss = _loss(pipeline, model, process, batch, settings)
            if not engine.is_sharding and not torch.isfinite(loss):
                _name_who(step + 1, loss, pipeline, model, process, batch, settings)
            total = loss
            if tap is not None and (settings.entropy_weight or settings.balance_weight):
                total = loss + tap.penalty(settings.entropy_weight, settings.balance_weight)
            total = total / settings.gradient_accumulation_steps
            (total if scaler is None else scaler.scale(total)).backward()
        return loss.detach(), None if tap is None else tap.take()

    with _training(modules), tapped(denoiser) if is_ensemble else nullcontext() as tap:
        for step in range(first, settings.num_steps):
            started = time.perf_counter()
            learning_rate = learning_rate_at(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            count = settings.gradient_accumulation_steps
            try:
                what = f"A batch of {settings.batch_size} samples"
                with readers_alive(), saying_what_fits(what, too_large):
                    parts = [gradients(step, n == count - 1, tap) for n in range(count)]
            except NotFinite:  # the steps before it may have led there
                raise
            except AfaError:
                if done > first:
                    save(done)  # bad data shall not cost the steps before it
                raise
            new_broken = list(itertools.islice(examples.broken.found.values(), num_known, None))
            num_known += len(new_broken)
            loss, num_broken, wants_stop = _agree(
                engine,
                torch.stack([loss for loss, _ in parts]).mean(),
                len(new_broken),
                should_stop is not None and should_stop(),
            )
            if scaler is not None:
                scaler.unscale_(optimizer)
            grad_norm = float(
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
            )
            _require_finite(step + 1, loss, grad_norm, scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)  # not where gradients are infinite; the scale is halved then
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step()
            done = step + 1
            if done % settings.checkpoint_every == 0 or done == settings.num_steps or wants_stop:
                save(done)
            notes = engine.gather(new_broken) if num_broken else []
            routings = [routing for _, routing in parts if routing is not None]
            yield TrainStep(
                done,
                settings.num_steps,
                loss,
                time.perf_counter() - started,
                learning_rate,
                grad_norm,
                Routing.mean(routings) if routings else None,
                (
                    *(f"Skipped: {said}" for said in notes),
                    *examples.notes(is_last=done == settings.num_steps or wants_stop),
                ),
            )
            if wants_stop and done < settings.num_steps:
                raise Stopped(done, settings.num_steps)


def _loss(
    pipeline: DiffusionPipeline,
    model: Callable[..., tuple[Tensor]],
    process: ForwardProcess,
    batch: Encoded,
    settings: TrainingRecipe,
) -> Tensor:
    return denoising_loss(
        partial(conditioning_of(pipeline).predict, pipeline, model, conditions=batch.conditions),
        process,
        batch.clean,
        noise=batch.noise,
        time=batch.time,
        min_snr_gamma=settings.min_snr_gamma,
    ).mean()


def _name_who(step: int, loss: Tensor, *again: Any) -> None:
    """The step once more without gradients: an ensemble looks at every feature then.

    Raises:
        NotFinite: names the expert and the site where the first such number was.
    """
    try:
        with torch.no_grad():
            _loss(*again)
    except AfaError as error:
        found = f"The loss must be finite, at step {step} it is {loss.item()}."
        raise NotFinite("AFA-TRAIN-036", f"{found} {error}") from error


def _agree(
    engine: Engine, loss: Tensor, num_broken: int, wants_stop: bool
) -> tuple[float, int, bool]:
    """What all processes together have: mean loss, broken pictures, whether any is to stop."""
    told = torch.stack([loss.double(), *loss.new_tensor([num_broken, wants_stop]).double()])
    mean, broken, stop = (engine.total(told) if engine.num_processes > 1 else told).tolist()
    return mean / engine.num_processes, round(broken), stop > 0


def _require_finite(step: int, loss: float, grad_norm: float, scaler: GradScaler | None) -> None:
    """Refuse to go on from numbers that would spoil the aggregators.

    Raises:
        NotFinite: says what came and what helps.
    """
    remedy = "Lower the learning rate, or keep the experts in float32."
    if not math.isfinite(loss):
        raise NotFinite(
            "AFA-TRAIN-037", f"The loss must be finite, at step {step} it is {loss}. {remedy}"
        )
    if math.isfinite(grad_norm):
        return
    if scaler is None or scaler.get_scale() < 1:
        raise NotFinite(
            "AFA-TRAIN-038", f"The gradients must be finite, at step {step} they are not. {remedy}"
        )


@contextmanager
def _training(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def learning_rate_at(step: int, settings: TrainingRecipe) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then constant or a cosine."""
    warmup = min(1.0, (step + 1) / max(1, settings.num_warmup_steps))
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate * warmup
    return (
        settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is drawn inside, such as fresh aggregators, depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
