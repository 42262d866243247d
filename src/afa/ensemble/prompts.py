"""Prompts for experts with different text encoders, in a stock pipeline.

A pipeline passes token ids from its tokenizer to its text encoder. Other experts need the prompt
itself. `PromptTokenizer` appends it to the ids, byte by byte. `PromptEncoder` takes it off again,
and encodes it with the text encoders of all experts; see `afa.denoisers.packing`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from afa.ensemble.text import last_norm
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.denoisers.packing import Packing

#: added to a byte, so that it is no id of a token; the one after the largest ends a prompt
_FIRST = 1 << 24
_END = _FIRST + 256


class PromptTokenizer:
    """A tokenizer that appends the prompts to the token ids.

    Args:
        tokenizer: the first expert's tokenizer; everything else is its own.
        others: the tokenizers of the other experts, which tokenize the prompts again.
    """

    def __init__(self, tokenizer: Any, others: Sequence[Any]) -> None:
        self._tokenizer, self._others = tokenizer, others

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers of all experts."""
        return [self._tokenizer, *self._others]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while a copy is made, which has no tokenizer yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Tokenize; with `return_tensors="pt"`, the ids are [B, L + K] with K more for the text."""
        encoded = self._tokenizer(text, *args, **kwargs)
        if kwargs.get("return_tensors") == "pt":
            prompts = [text] if isinstance(text, str) else text
            encoded["input_ids"] = torch.cat([encoded["input_ids"], _as_ids(prompts)], 1)
        return encoded

    def batch_decode(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Decode the tokens, without the appended prompts."""
        own = [[token for token in row if token < _FIRST] for row in torch.as_tensor(ids).tolist()]
        return self._tokenizer.batch_decode(own, *args, **kwargs)


def _as_ids(prompts: Sequence[str]) -> Tensor:
    """The bytes of prompts as ids [B, K]."""
    rows = [torch.tensor([*prompt.encode(), 256], dtype=torch.long) + _FIRST for prompt in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_END)


def _separate(ids: Tensor) -> tuple[Tensor, list[str] | None]:
    """Take the prompts off token ids; None if there are none."""
    appended = (ids >= _FIRST).any(0)
    if not appended.any():
        return ids, None
    length = int((~appended).sum())
    rows = ids[:, length:].tolist()
    text = [bytes(i - _FIRST for i in row if i != _END).decode() for row in rows]
    return ids[:, :length], text


class PromptEncoder(PreTrainedModel):
    """The first expert's text encoder, whose embedding also holds the other experts' conditions.

    Args:
        encoder: the first expert's text encoder.
        packing: of the conditions of the others.
        others: the text encoders of the others, so that they are moved together.
        described: the options of the others' pipelines, which also determine their conditions.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        encoder: Any,
        packing: Packing,
        others: Sequence[nn.Module],
        described: Sequence[dict[str, Any]],
    ) -> None:
        super().__init__(encoder.config)
        self.encoder, self.packing, self.described = encoder, packing, described
        self.others = nn.ModuleList(others)
        self.requires_grad_(False)
        if last_norm(encoder) is not None:
            # with `clip_skip`, stock pipelines apply this norm to an earlier layer's output
            self.text_model = SimpleNamespace(final_layer_norm=self._final_layer_norm)
        self.eval()

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encode ids of `PromptTokenizer` [B, L + K].

        Returns: the encoder's output; its embeddings of tokens are [B, L, D + D'].

        Raises:
            AfaError: if the ids have no prompts.
        """
        own, prompts = _separate(input_ids)
        if prompts is None:
            raise AfaError(
                "AFA-ENSEMBLE-066",
                "The text encoder got tokens without their prompt, which the experts with other "
                "text encoders need. Use the tokenizer of the ensemble's pipeline.",
            )
        given = {key: value for key, value in kwargs.items() if key != "return_dict"}
        output = self.encoder(own, *args, **given, return_dict=True)
        packed = self.packing.pack(prompts, output[0])
        found = type(output)(**{key: _with(output[key], packed) for key in output})
        return found.to_tuple() if kwargs.get("return_dict") is False else found

    @property
    def encoders(self) -> list[Any]:
        """The text encoders of all experts."""
        return [self.encoder, *self.others]

    def get_input_embeddings(self) -> NoReturn:
        """Refuse new tokens, which the other experts do not have.

        Raises:
            AfaError: always.
        """
        raise AfaError(
            "AFA-ENSEMBLE-067",
            "A textual inversion belongs to one text encoder, and these experts have different "
            "ones. Do not load it, or use experts of one architecture.",
        )

    def _final_layer_norm(self, hidden: Tensor) -> Tensor:
        width = self.encoder.config.hidden_size
        return torch.cat([last_norm(self.encoder)(hidden[..., :width]), hidden[..., width:]], -1)


def _with(value: Any, packed: Tensor) -> Any:
    """Append packed conditions to every embedding of tokens in an output."""
    if isinstance(value, tuple):
        return tuple(_with(each, packed) for each in value)
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == packed.shape[:2]:
        return torch.cat([value, packed.to(value)], -1)
    return value
