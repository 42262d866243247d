"""Recorded predictions of a teacher: shards of safetensors, and training batches from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from afa.training.cache.files import Shards, read_header, shard_name, write_shard
from afa.training.encoding import Recorded, encode_captions
from afa.training.examples import Broken
from afa.training.order import Purpose, draw_at, rows_of, sample_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Predictions of one batch of pictures; n is the number of noisy latents.

    Attributes:
        items: number of the picture of each latent [n].
        captions: the prompt of each picture, by its number.
        without_prompt: the prompt of predictions without prompt, which is usually empty.
        noisy: noisy latents [n, C, H, W].
        timestep: in those of the scheduler [n], float32.
        conditional: predictions with prompt [n, C, H, W].
        unconditional: predictions without prompt [n, C, H, W]; None if there are none.
        sizes: see `afa.training.transform.Transform.sizes` [n, 6].
        guidance: guidance scale that the teacher got as an input [n]; None if it takes none.
        features: features [n, C, H, W] at sites, by `features.SITE` for predictions with prompt
            and `features_without.SITE` for those without.
    """

    items: Tensor
    captions: dict[int, str]
    without_prompt: str
    noisy: Tensor
    timestep: Tensor
    conditional: Tensor
    unconditional: Tensor | None
    sizes: Tensor
    guidance: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def write(self, place: Path, dtype: torch.dtype) -> None:
        """Write a shard atomically, with latents and predictions in `dtype`."""
        optional: dict[str, Tensor | None] = {
            "unconditional": self.unconditional,
            "guidance": self.guidance,
            **self.features,
        }
        tensors = {
            "timestep": self.timestep.float(),
            "sizes": self.sizes.float(),
            "noisy": self.noisy.to(dtype),
            "conditional": self.conditional.to(dtype),
        }
        for name, tensor in optional.items():
            if tensor is not None:
                tensors[name] = tensor.to(dtype)
        header = {
            "captions": {str(item): text for item, text in sorted(self.captions.items())},
            "without_prompt": self.without_prompt,
            "items": self.items.tolist(),
        }
        write_shard(place, {k: t.contiguous() for k, t in tensors.items()}, header)


class Rows:
    """The recorded predictions of the first `num_items` pictures in a folder.

    Args:
        folder: of complete shards.
        num_shards: their number.
        num_items: number of pictures to use.

    Raises:
        AfaError: if a shard is damaged.
    """

    def __init__(self, folder: Path, num_shards: int, num_items: int) -> None:
        self._places = [folder / shard_name(n) for n in range(num_shards)]
        self._shards = Shards()
        self._captions: dict[int, str] = {}
        self.without_prompt = ""
        found: list[tuple[int, int, int]] = []
        for number, place in enumerate(self._places):
            header = read_header(place)
            self._captions |= {int(item): text for item, text in header["captions"].items()}
            self.without_prompt = header["without_prompt"]
            items = enumerate(header["items"])
            found += [(number, row, item) for row, item in items if item < num_items]
        #: shard, row in it, and picture of each prediction
        self._index = np.array(found, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._index)

    def captions(self) -> list[str]:
        """Return all distinct prompts, and that of predictions without prompt."""
        used = {self._captions[item] for item in sorted(set(self._index[:, 2].tolist()))}
        return sorted(used | {self.without_prompt})

    def of_items(self, items: range) -> np.ndarray:
        """Return the numbers of the predictions of these pictures."""
        picture = self._index[:, 2]
        return np.flatnonzero((picture >= items.start) & (picture < items.stop))

    def row(self, number: int) -> tuple[dict[str, Tensor], str]:
        """Return the tensors of a prediction by name, and its prompt."""
        shard, row, item = self._index[number].tolist()
        return self._shards.row(self._places[shard], row), self._captions[item]


class Texts(Protocol):
    """A source of the conditions of captions."""

    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditions, as `encode_captions` computes them."""


class LiveTexts:
    """Encodes captions on demand, with gradients for text encoders that are trained."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline

    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Texts`."""
        return encode_captions(self._pipeline, captions)


@dataclass(frozen=True)
class Source:
    """Recorded predictions and the numbers of those that are used."""

    rows: Rows
    used: np.ndarray


class RecordedExamples:
    """Batches of recorded predictions; see `afa.training.examples.Examples`.

    Args:
        sources: recorded predictions; the first is used for a place if its random number is not
            below the share of the second.
        texts: conditions of all prompts.
        share: fraction of samples from the second source.
        caption_dropout: fraction of predictions without prompt.
        bake_in: guidance scale of the target; None targets the predictions themselves.
        feature_loss: a function of target features by site; None for no such loss.
        seed: seed of the order and of all random draws.
        device: of the batches.
        purpose: training, or validation, which takes the first source in order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        texts: Texts,
        *,
        share: float = 0.0,
        caption_dropout: float = 0.0,
        bake_in: float | None = None,
        feature_loss: Callable[[dict[str, Tensor]], Tensor] | None = None,
        seed: int,
        device: torch.device,
        purpose: Purpose = Purpose.TRAINING,
    ) -> None:
        self._sources, self._texts, self._share = sources, texts, share
        self._dropout, self._bake_in = caption_dropout, bake_in
        self._feature_loss = feature_loss
        self._seed, self._device, self._purpose = seed, device, purpose
        self.broken = Broken(None, 0.0)

    def notes(self, *, is_last: bool) -> list[str]:
        """No messages."""
        del is_last
        return []

    def rows(self, count: int, size: int) -> Sequence[Sequence[int]]:
        """See `Examples.rows`."""
        return rows_of(count, size)

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Recorded]:
        """See `Examples.batches`."""
        for row in places:
            yield self._batch([self._read(place) for place in row])

    def _read(self, place: int) -> tuple[dict[str, Tensor], str]:
        """Return the tensors of a sample, with its target, and its prompt."""
        draw = draw_at(place, (0,), self._seed, self._purpose)
        source = self._sources[-1 if draw.variant < self._share else 0]
        position = place
        if self._purpose is not Purpose.VALIDATION:
            position = sample_at(place, len(source.used), self._seed)
        tensors, caption = source.rows.row(int(source.used[position]))
        conditional, unconditional = tensors["conditional"], tensors.get("unconditional")
        target, of = conditional.float(), "features."
        if unconditional is not None and self._bake_in is not None:
            target = unconditional.float() + self._bake_in * (target - unconditional.float())
        elif unconditional is not None and draw.caption < self._dropout:
            target, caption = unconditional.float(), source.rows.without_prompt
            of = "features_without."
        chosen = {
            f"target {name.removeprefix(of)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(of)
        }
        return {**tensors, **chosen, "target": target}, caption

    def _batch(self, samples: Sequence[tuple[dict[str, Tensor], str]]) -> Recorded:
        def stacked(name: str) -> Tensor:
            return torch.stack([tensors[name] for tensors, _ in samples]).to(self._device)

        conditions = self._texts.conditions([caption for _, caption in samples])
        conditions = {name: tensor.to(self._device) for name, tensor in conditions.items()}
        conditions["sizes"] = stacked("sizes")
        if "guidance" in samples[0][0]:
            conditions["guidance"] = stacked("guidance").float()
        regulariser = None
        if self._feature_loss is not None:
            sites = [name for name in samples[0][0] if name.startswith("target ")]
            targets = {name.removeprefix("target "): stacked(name) for name in sites}
            regulariser = partial(self._feature_loss, targets)
        return Recorded(
            stacked("noisy").float(),
            stacked("timestep"),
            stacked("target"),
            conditions,
            regulariser,
        )
