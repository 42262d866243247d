"""The prompts of experts with different text encoders, in the text embedding of the first one.

A stock pipeline passes one text embedding [B, L, D] through guidance, repetition and batches. If
experts have different text encoders, the conditions of all others travel in it: as D' more
features, which the ensemble takes out again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    #: the conditions of some captions, by name, each [B, ...]; an empty caption means no prompt
    Encode = Callable[[list[str]], dict[str, Tensor]]


class Packing:
    """Packs conditions into features of a text embedding, and unpacks them.

    Args:
        encoders: of each expert but the first, its own encoding of captions. Its conditions must
            have equal shapes for all captions.
    """

    def __init__(self, encoders: Sequence[Encode]) -> None:
        self._encoders = list(encoders)
        with torch.no_grad():
            #: the conditions of no prompt
            self._empty = [encode([""]) for encode in self._encoders]

    def num_features(self, length: int) -> int:
        """The number D' of features for a text of this many tokens; the first one marks them."""
        count = sum(each.numel() for own in self._empty for each in own.values())
        return 1 + math.ceil(count / length)

    def pack(self, captions: list[str], like: Tensor) -> Tensor:
        """Encode captions with all encoders.

        Args:
            captions: B captions.
            like: a text embedding [B, L, D], whose data type and device the result has.

        Returns: features [B, L, D'].

        Raises:
            AfaError: if an encoder gives conditions of another shape than without prompt.
        """
        parts: list[Tensor] = []
        for encode, empty in zip(self._encoders, self._empty, strict=True):
            found = encode(captions)
            for name, known in empty.items():
                if found[name].shape[1:] != known.shape[1:]:
                    raise AfaError(
                        "AFA-MODEL-060",
                        f"The condition '{name}' of an expert has the shape "
                        f"{tuple(found[name].shape[1:])} for these prompts and "
                        f"{tuple(known.shape[1:])} without prompt; they must be equal. Experts "
                        "with other text encoders must pad their prompts to one length.",
                    )
                parts.append(found[name].flatten(1).to(like))
        flat, length = torch.cat(parts, 1), like.shape[1]
        padding = (self.num_features(length) - 1) * length - flat.shape[1]
        features = torch.nn.functional.pad(flat, (0, padding)).unflatten(1, (length, -1))
        return torch.cat([torch.ones_like(features[..., :1]), features], -1)

    def unpack(self, features: Tensor) -> list[dict[str, Tensor]]:
        """Take the conditions of each expert but the first out of features [B, L, D'].

        Pipelines may replace the embedding of an empty prompt by zeros, as those of Stable
        Diffusion XL do. The other experts then get their own conditions of no prompt.

        Raises:
            AfaError: if the embedding was changed otherwise, for instance by weights of words.
        """
        marks = features[..., 0]
        is_given = (marks == 1).all(1)
        if not (is_given | (marks == 0).all(1)).all():
            raise AfaError(
                "AFA-MODEL-064",
                "The text embedding was changed after the prompt was encoded, for instance by "
                "weights of words. It also holds the other experts' prompts, which this damages. "
                "Pass the prompt.",
            )
        flat, start = features[..., 1:].flatten(1), 0
        found: list[dict[str, Tensor]] = []
        for empty in self._empty:
            own: dict[str, Tensor] = {}
            for name, known in empty.items():
                # the ensemble may have been cast since
                dtype = flat.dtype if known.is_floating_point() else known.dtype
                known = known.to(flat.device, dtype)
                values = flat[:, start : start + known.numel()]
                start += known.numel()
                given = values.unflatten(1, known.shape[1:]).to(dtype)
                chosen = is_given.view(-1, *[1] * (known.ndim - 1))
                own[name] = torch.where(chosen, given, known)
            found.append(own)
        return found
