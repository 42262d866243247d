"""The training loop, as a generator of steps."""

from __future__ import annotations

import itertools
import math
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import GradScaler

from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError
from afa.machine.devices import widest_float
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.training.encoding import Encoded, Recorded
from afa.training.examples import readers_alive
from afa.training.noise import noise_on_prompt
from afa.training.objective import denoising_loss, prediction_loss
from afa.training.routing import Routing, tapped
from afa.training.stopping import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from afa.denoisers.forward_process import ForwardProcess
    from afa.training.encoding import Batch
    from afa.training.engine import Engine
    from afa.training.examples import Examples
    from afa.training.recipe import TrainingRecipe
    from afa.training.routing import WeightTap


class NotFinite(AfaError):
    """The loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class TrainStep:
    """The results of one optimizer step.

    Attributes:
        step: number of steps done, including this one.
        num_steps: total number of steps.
        loss: mean over the samples of all processes, without regularisers.
        seconds: duration.
        learning_rate: learning rate of this step.
        grad_norm: norm of all gradients before clipping.
        routing: fusion weights by expert and site; None without aggregators.
        notes: messages for the user, one line each.
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
    """Train aggregators or a single model, with the denoising objective or a teacher's predictions.

    The batch of a step depends only on the seed and the step, so trainings with equal settings use
    the same data, timesteps and noise.

    Args:
        pipeline: diffusers pipeline with the denoiser.
        examples: source of batches.
        settings: steps, batch size, learning rate and so on.
        optimizer: optimizer of the trained parameters.
        engine: the processes.
        modules: modules that are in training mode meanwhile.
        save: called with the number of steps done, every `checkpoint_every` steps, at the end,
            before a stop and before an error of the data is raised.
        first: number of steps that were done before.
        scaler: scales the loss, for experts in float16.
        after_step: called after the parameters have changed and before they are saved.
        should_stop: called after each step.

    Raises:
        AfaError: if a picture cannot be read, or the loss or a gradient is not finite.
        Stopped: if `should_stop` returned True; the state is saved.
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
        "Or set gradient_checkpointing: true, or expert_dtype: bfloat16.",
    )

    def gradients(step: int, last: bool, tap: WeightTap | None) -> tuple[Tensor, Routing | None]:
        """Accumulate the gradients of one batch; returns its loss and routing."""
        batch = next(batches)
        with engine.without_sync(model, when=not last):
            with _noise(denoiser, batch, settings):
                loss = _loss(pipeline, model, process, batch, settings)
                if not engine.is_sharding and not torch.isfinite(loss):
                    _name_expert(step + 1, loss, pipeline, model, process, batch, settings)
            total = loss
            if tap is not None and (settings.entropy_weight or settings.balance_weight):
                total = loss + tap.penalty(settings.entropy_weight, settings.balance_weight)
            if isinstance(batch, Recorded) and batch.regulariser is not None:
                total = total + batch.regulariser()
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
            except NotFinite:  # not saved, since earlier steps may be the cause
                raise
            except AfaError:
                if done > first:
                    save(done)  # keep the steps before the error
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
                scaler.step(optimizer)  # skips infinite gradients; update() then halves the scale
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
                    *(f"Skipped: {note}" for note in notes),
                    *examples.notes(is_last=done == settings.num_steps or wants_stop),
                ),
            )
            if wants_stop and done < settings.num_steps:
                raise Stopped(done, settings.num_steps)


def _loss(
    pipeline: DiffusionPipeline,
    model: Callable[..., tuple[Tensor]],
    process: ForwardProcess,
    batch: Batch,
    settings: TrainingRecipe,
) -> Tensor:
    predict = partial(
        conditioning_of(pipeline).predict, pipeline, model, conditions=batch.conditions
    )
    if isinstance(batch, Recorded):
        return prediction_loss(predict, batch.noisy, batch.timestep, batch.target).mean()
    return denoising_loss(
        predict,
        process,
        batch.clean,
        noise=batch.noise,
        time=batch.time,
        min_snr_gamma=settings.min_snr_gamma,
        velocity_loss=settings.velocity_loss,
    ).mean()


def _noise(
    denoiser: nn.Module, batch: Batch, settings: TrainingRecipe
) -> AbstractContextManager[None]:
    """Return a context in which the aggregators see the prompt with noise."""
    if not settings.prompt_noise or not isinstance(denoiser, EnsembleDenoiser):
        return nullcontext()
    assert isinstance(batch, Encoded), "aggregators are trained on pictures"
    return noise_on_prompt(denoiser, settings.prompt_noise, batch.seeds)


def _name_expert(step: int, loss: Tensor, *arguments: Any) -> None:
    """Repeat the forward pass without gradients, where an ensemble checks every feature.

    Raises:
        NotFinite: names the expert and the site of the first non-finite value.
    """
    try:
        with torch.no_grad():
            _loss(*arguments)
    except AfaError as error:
        message = f"The loss is {loss.item()} at step {step}; it must be finite. {error}"
        raise NotFinite("AFA-TRAIN-036", message) from error


def _agree(
    engine: Engine, loss: Tensor, num_broken: int, wants_stop: bool
) -> tuple[float, int, bool]:
    """Over all processes: the mean loss, the number of broken pictures, and whether any stops."""
    wide = loss.to(widest_float(loss.device))
    own = torch.stack([wide, *wide.new_tensor([num_broken, wants_stop])])
    total, broken, stop = (engine.total(own) if engine.num_processes > 1 else own).tolist()
    return total / engine.num_processes, round(broken), stop > 0


def _require_finite(step: int, loss: float, grad_norm: float, scaler: GradScaler | None) -> None:
    """Check the loss and the gradients before they change the parameters.

    Raises:
        NotFinite: if one is NaN or infinite, except gradients that a smaller loss scale can fix.
    """
    remedy = (
        "Lower training.learning_rate and add --continue-with, or set training.expert_dtype to "
        "float32 in a new folder."
    )
    if not math.isfinite(loss):
        raise NotFinite(
            "AFA-TRAIN-037", f"The loss is {loss} at step {step}; it must be finite. {remedy}"
        )
    if not math.isfinite(grad_norm) and (scaler is None or scaler.get_scale() < 1):
        raise NotFinite(
            "AFA-TRAIN-038",
            f"The norm of the gradients is {grad_norm} at step {step}; it must be finite. {remedy}",
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
    """The learning rate of a step, counted from 0: linear warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / max(1, settings.num_warmup_steps))
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate * warmup
    return (
        settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
