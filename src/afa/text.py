"""The experts' text encoders as one drop-in `text_encoder`."""

from __future__ import annotations

import copy
import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence


class EnsembleTextEncoder(PreTrainedModel):
    """N text encoders of one tokenizer; their embeddings travel concatenated on the last axis.

    Encoders with identical weights are found by hash and run once. Where all are identical, the
    output is a single embedding [B, L, D], which `EnsembleDenoiser` takes for all experts.

    Args:
        encoders: one per expert, of one width.

    Raises:
        AfaError: none, or encoders of different widths or layer counts.
    """

    config_class = CLIPTextConfig
    main_input_name = "input_ids"
    # whatever the encoders do: the composite has no attention of its own
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoders: Sequence[PreTrainedModel]) -> None:
        if not encoders:
            raise AfaError("A text encoder must have at least one expert's, came none.")
        super().__init__(copy.deepcopy(encoders[0].config))
        shapes = [(e.config.hidden_size, e.config.num_hidden_layers) for e in encoders]
        if len(set(shapes)) > 1:
            raise AfaError(
                "The experts' text encoders must have one width and depth; came "
                f"{', '.join(f'{width} x {depth}' for width, depth in shapes)}. "
                "Ensemble checkpoints of one family."
            )
        hashes = [hash_weights(encoder) for encoder in encoders]
        distinct = list(dict.fromkeys(hashes))
        #: which of the distinct encoders each expert uses
        self.encoder_of: list[int] = [distinct.index(h) for h in hashes]
        self.encoders: Any = nn.ModuleList(encoders[hashes.index(h)] for h in distinct)
        self.encoders.requires_grad_(False)
        # where stock pipelines look for the last norm when they skip layers (`clip_skip`)
        self.text_model = SimpleNamespace(final_layer_norm=self._final_layer_norm)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode token ids [B, L] with every distinct encoder.

        Returns: `last_hidden_state` and each of `hidden_states` [B, L, N * D], or [B, L, D] where
            all experts share one encoder; `pooler_output` likewise [B, N * D] or [B, D].
        """
        outputs = [
            encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **kwargs,
            )
            for encoder in self.encoders
        ]
        hidden_states = None
        if output_hidden_states:
            hidden_states = tuple(
                self._join(layer)
                for layer in zip(*(output.hidden_states for output in outputs), strict=True)
            )
        joined = BaseModelOutputWithPooling(
            last_hidden_state=self._join([output.last_hidden_state for output in outputs]),
            pooler_output=self._join([output.pooler_output for output in outputs]),
            hidden_states=hidden_states,
        )
        return joined.to_tuple() if return_dict is False else joined

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate on the last axis, one part per expert."""
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([tensors[n] for n in self.encoder_of], dim=-1)

    def _final_layer_norm(self, hidden: Tensor) -> Tensor:
        """Every encoder's own last norm on its own part of [B, L, N * D] or [B, L, D]."""
        if len(self.encoders) == 1:
            return _last_norm(self.encoders[0])(hidden)
        parts = hidden.chunk(len(self.encoder_of), dim=-1)
        normed = [
            _last_norm(self.encoders[n])(part)
            for n, part in zip(self.encoder_of, parts, strict=True)
        ]
        return torch.cat(normed, dim=-1)


def _last_norm(encoder: Any) -> nn.Module:
    # transformers 5 has the norm on the model itself, the variant with projection one deeper
    return getattr(encoder, "text_model", encoder).final_layer_norm


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def attach_controlnet(controlnet: Any, num_experts: int, expert: int = 0) -> None:
    """Let a ControlNet read one expert's part of the concatenated text embedding.

    A ControlNet was trained with one text encoder; an ensemble's pipeline hands it all of them,
    [B, L, N * D]. After this call it sees [B, L, D]. The class stays stock.

    Args:
        controlnet: any ControlNet whose config has `cross_attention_dim`.
        num_experts: N.
        expert: whose embedding it sees, from 0.

    Raises:
        AfaError: there is no such expert.
    """
    if not 0 <= expert < num_experts:
        raise AfaError(f"expert must be 0 to {num_experts - 1}, came {expert}.")
    width = controlnet.config.cross_attention_dim

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text = kwargs.get("encoder_hidden_states")
        if text is not None and text.shape[-1] == width * num_experts:
            kwargs["encoder_hidden_states"] = text[..., expert * width : (expert + 1) * width]
        return args, kwargs

    controlnet.register_forward_pre_hook(narrow, with_kwargs=True)
