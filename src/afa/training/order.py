"""The order of samples in a training, and their random numbers.

The samples of all steps are numbered; these numbers are called places. The sample and the random
numbers of a place depend only on the seed and the place: not on the batch size, the number of
processes, or the step at which a run was resumed.
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
    """The division of a step's places into batches and processes.

    Attributes:
        batch_size: samples in one batch of one process.
        num_accumulated: batches of each process in one step.
        num_processes: number of processes.
        rank: of this process, from 0.
    """

    batch_size: int
    num_accumulated: int = 1
    num_processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """The number of samples in one optimizer step, of all processes."""
        return self.batch_size * self.num_accumulated * self.num_processes

    def batches(self, first_step: int, num_steps: int) -> Iterator[range]:
        """Yield the places of this process's batches, from one step up to another."""
        for step in range(first_step, num_steps):
            for n in range(self.num_accumulated):
                start = step * self.total
                start += (n * self.num_processes + self.rank) * self.batch_size
                yield range(start, start + self.batch_size)


def rows_of(count: int, size: int) -> list[range]:
    """Divide the first places into rows of at most `size`."""
    return [range(n, min(n + size, count)) for n in range(0, count, size)]


def sample_at(place: int, num_samples: int, seed: int, *key: int) -> int:
    """Return the sample at a place: epochs of all samples, each in its own random order.

    Orders with different keys, which are positive numbers, are independent.
    """
    epoch, position = divmod(place, num_samples)
    return int(_epoch_order(num_samples, seed, epoch, *key)[position])


def successors(position: int, samples: Sequence[int]) -> Iterator[int]:
    """Yield every sample once, from a position to the last, then from the first."""
    for n in itertools.chain(range(position, len(samples)), range(position)):
        yield samples[n]


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int, epoch: int, *key: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, *key]).permutation(num_samples)


class Purpose(IntEnum):
    """The purpose of random numbers; each has its own independent ones."""

    TRAINING = 1
    VALIDATION = 2
    TRANSFORM = 3


@dataclass(frozen=True)
class Draw:
    """The random numbers of one place.

    Attributes:
        variant: selects crop and flip, from 0 to 1.
        caption: from 0 to 1; the caption is dropped if it is below the dropout.
        time: selects the timestep, from 0 to 1.
        posterior: noise [C, H, W] for sampling from the autoencoder's posterior.
        noise: noise [C, H, W] to add to the latent.
        seed: of further random numbers.
        text: selects one of several captions, from 0 to 1.
    """

    variant: float
    caption: float
    time: float
    posterior: Tensor
    noise: Tensor
    seed: int
    text: float

    def one_of(self, captions: Sequence[str]) -> str:
        """The caption that is used, of those of a picture."""
        return captions[int(self.text * len(captions))]


def draw_at(
    place: int, shape: Sequence[int], seed: int, purpose: Purpose = Purpose.TRAINING
) -> Draw:
    """Return the random numbers of a place, for latents of this shape [C, H, W]."""
    generator = generator_of(seed, purpose, place)
    variant, caption, time = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    posterior = torch.randn(tuple(shape), generator=generator)
    noise = torch.randn(tuple(shape), generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    # drawn last, so that the others are those of earlier releases
    text = float(torch.rand((), generator=generator, dtype=torch.float64))
    return Draw(variant, caption, time, posterior, noise, seed, text)


def generator_of(seed: int, purpose: Purpose, *place: int) -> torch.Generator:
    """Return a generator for a purpose and a place, independent of all others."""
    state = np.random.SeedSequence([seed, purpose, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
