"""The training loop of all models of the zoo: seeded by step, resumable, with an EMA."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError
from afa.files import write_atomic
from afa.machine.damaged import Unreadable, loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True)
class FitStep:
    """Progress of one optimizer step."""

    name: str
    step: int
    num_steps: int
    loss: float
    seconds: float


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    num_steps: int,
    checkpoint: Path,
    learning_rate: float = 1e-3,
    num_warmup_steps: int = 100,
    ema_decay: float = 0.998,
    checkpoint_every: int = 250,
    made_from: str = "",
) -> Iterator[FitStep]:
    """Train `model` with AdamW on a cosine schedule; it ends with the averaged weights.

    Each step uses a generator seeded by its number, so a resumed run takes the same steps as an
    uninterrupted one.

    Args:
        name: name shown in the progress.
        model: the model; all parameters that require gradients are trained.
        loss_of: computes the scalar loss of a batch that it draws with the given generator.
        num_steps: total number of optimizer steps, including those before a resume.
        checkpoint: file with weights, average and optimizer state; resumed if it exists.
        learning_rate: peak learning rate after the warm-up.
        num_warmup_steps: steps of linear warm-up.
        ema_decay: decay of the exponential moving average of the weights.
        checkpoint_every: steps between two checkpoints.
        made_from: a hash of all other inputs of the loss, such as the data.

    Yields:
        The progress of each step.

    Raises:
        AfaError: if the checkpoint is damaged, or was made from other inputs.
    """
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.01)
    average = {k: p.detach().clone() for k, p in parameters.items()}
    first = 0
    if checkpoint.exists():
        with loading(f"'{checkpoint}' must be a checkpoint of this command", "Delete it."):
            state = torch.load(checkpoint, weights_only=True)
            if not isinstance(state, dict) or not {"step", "model", "average"} <= state.keys():
                raise Unreadable("it lacks step, model or average")
            first = state["step"]
            if first < num_steps and "optimizer" not in state:
                raise Unreadable(f"it finished at step {first}, before {num_steps}")
            model.load_state_dict(state["model"])
            average = state["average"]
            if state.get("made_from", "") != made_from:
                raise AfaError(
                    "AFA-STUDY-007",
                    f"'{checkpoint}' was trained from other inputs: an earlier stage, the sprites "
                    "or the data has changed since. Delete it to train it again.",
                )
            if first < num_steps:
                optimizer.load_state_dict(state["optimizer"])

    def save(step: int) -> None:
        state = {
            "step": step,
            "model": model.state_dict(),
            "average": average,
            "made_from": made_from,
        }
        if step < num_steps:  # a finished stage is never resumed
            state["optimizer"] = optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(checkpoint, buffer.getvalue())

    model.train()
    for step in range(first, num_steps):
        started = time.perf_counter()
        warmup = min(1.0, (step + 1) / num_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        loss = loss_of(torch.Generator().manual_seed(1_000_003 * step + 17))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        for key, parameter in parameters.items():
            average[key].lerp_(parameter.detach(), 1 - decay)
        if (step + 1) % checkpoint_every == 0 or step + 1 == num_steps:
            save(step + 1)
        yield FitStep(name, step + 1, num_steps, loss.item(), time.perf_counter() - started)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(average[key])
    model.eval()
