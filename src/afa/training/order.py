"""Which sample comes when, and all that is drawn for it.

A training is a long row of places, so many to a step. What happens at a place depends on the seed
and the place alone: not on the batch size, the number of processes or where a run was stopped.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """How the places of a step are shared out.

    Attributes:
        batch_size: samples at a time, in each process.
        num_accumulated: batches of each process that make one step.
        num_processes: how many there are.
        rank: which one this is, from 0.
    """

    batch_size: int
    num_accumulated: int = 1
    num_processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """The samples of one optimizer step, of all processes together."""
        return self.batch_size * self.num_accumulated * self.num_processes

    def batches(self, first_step: int, num_steps: int) -> Iterator[range]:
        """The places of this process's batches, from one step up to another."""
        for step in range(first_step, num_steps):
            for n in range(self.num_accumulated):
                start = step * self.total
                start += (n * self.num_processes + self.rank) * self.batch_size
                yield range(start, start + self.batch_size)


def sample_at(place: int, num_samples: int, seed: int) -> int:
    """The sample at a place: epochs of all samples, each in its own random order."""
    epoch, position = divmod(place, num_samples)
    return int(_epoch_order(num_samples, seed, epoch)[position])


def successors(position: int, samples: Sequence[int]) -> Iterator[int]:
    """The samples from a position on, and from the first after the last, each once."""
    for n in itertools.chain(range(position, len(samples)), range(position)):
        yield samples[n]


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class Purpose(IntEnum):
    """What something is drawn for; none sees the numbers of another."""

    TRAINING = 1
    VALIDATION = 2
    TRANSFORM = 3


@dataclass(frozen=True)
class Draw:
    """All that is random about one place.

    Attributes:
        variant: which crop and flip, a number from 0 to 1.
        caption: below the dropout the caption is dropped, a number from 0 to 1.
        time: where on the way from picture to noise, a number from 0 to 1.
        posterior: noise [C, H, W] for sampling from the autoencoder's posterior.
        noise: noise [C, H, W] that the denoiser shall predict.
    """

    variant: float
    caption: float
    time: float
    posterior: Tensor
    noise: Tensor


def draw_at(
    place: int, shape: Sequence[int], seed: int, purpose: Purpose = Purpose.TRAINING
) -> Draw:
    """What is drawn at a place, for latents of this shape [C, H, W]."""
    generator = generator_of(seed, purpose, place)
    variant, caption, time = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    posterior = torch.randn(tuple(shape), generator=generator)
    return Draw(variant, caption, time, posterior, torch.randn(tuple(shape), generator=generator))


def generator_of(seed: int, purpose: Purpose, *place: int) -> torch.Generator:
    """A generator of its own for every purpose and place."""
    state = np.random.SeedSequence([seed, purpose, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
