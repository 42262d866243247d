"""Compute what depends only on the prompt once for all steps: split embeddings, keys and values.

A pipeline passes the same tensor of text embeddings to the denoiser at every step. Values computed
from it are cached for as long as the tensor lives. Nothing is cached while gradients are on.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from afa.denoisers.packed import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from diffusers.models.attention_processor import Attention

T = TypeVar("T")

# by text tensor: its version, and the values computed from it
_kept: Any = WeakIdKeyDictionary()


def once_per_prompt(text: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """Return the value of `compute`, cached until the text tensor changes or is freed.

    Args:
        text: a tensor that stays the same object while the prompt does.
        key: identifies the value.
        compute: computes the value. It must not return the text or a view of it, which would then
            never be freed.
    """
    if torch.is_grad_enabled() or text.is_inference() or torch.compiler.is_compiling():
        return compute()
    version, values = _kept.get(text, (None, None))
    if values is None or version != text._version:
        values = {}
        _kept[text] = (text._version, values)
    if key not in values:
        values[key] = compute()
    return values[key]


def forget(text: Tensor) -> None:
    """Discard everything that was cached for this text."""
    _kept.pop(text, None)


def versions(*modules: nn.Module) -> list[int]:
    """The version counters of the modules' parameters, for use in a cache key."""
    return [
        0 if parameter.is_inference() else parameter._version
        for module in modules
        for parameter in module.parameters()
    ]


class PromptAttention(AttnProcessor2_0):
    """Diffusers' `AttnProcessor2_0` with cached keys and values of the prompt.

    The result is equal bit for bit. Cross attention with plain linear projections is cached;
    everything else runs diffusers' own code.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from hidden states [B, T, C] to a text [B, L, D]; see `AttnProcessor2_0`."""
        if encoder_hidden_states is None or args or kwargs or not _is_plain(attn):
            return super().__call__(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                temb,
                *args,
                **kwargs,
            )
        text, batch = encoder_hidden_states, len(hidden_states)
        key, value = _keys_and_values(attn, text)
        query = _by_head(attn, attn.to_q(hidden_states))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(query.dtype))
        return attn.to_out[1](out) / attn.rescale_output_factor


@torch.compiler.disable  # a compiled graph would compute them at every step
def _keys_and_values(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of the prompt, each [B, heads, L, C / heads]."""
    return once_per_prompt(
        text,
        (attn, *versions(attn.to_k, attn.to_v)),
        lambda: (_by_head(attn, attn.to_k(text)), _by_head(attn, attn.to_v(text))),
    )


def _by_head(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _is_plain(attn: Attention) -> bool:
    """Whether the attention has only linear projections and the attention product."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return (
        not any(extras)
        and not attn.residual_connection
        and type(attn.to_k) in (nn.Linear, PackedLinear)
        and type(attn.to_v) in (nn.Linear, PackedLinear)
    )


def cross_attentions(model: nn.Module) -> list[Attention]:
    """The cross-attention layers of a model, in order."""
    return [
        block.attn2
        for block in model.modules()
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None
    ]


@contextmanager
def prompts_attended_once(attentions: Iterable[Attention]) -> Iterator[None]:
    """Cache the keys and values of prompts in these attention layers while the `with` block runs.

    Layers with a processor other than diffusers' default, such as an IP-Adapter's, do not change.
    """
    swapped = [(a, a.processor) for a in attentions if type(a.processor) is AttnProcessor2_0]
    try:
        for attention, _ in swapped:
            attention.processor = _PROMPT_ATTENTION
        yield
    finally:
        for attention, processor in swapped:
            attention.processor = processor


_PROMPT_ATTENTION = PromptAttention()


def mean_text(
    owner: object,
    arguments: Mapping[str, Any],
    per_expert: Sequence[dict[str, Any]],
    experts: Sequence[int],
) -> Tensor:
    """Average the text embeddings [B, L, D] of some experts (AFA, section 3.2).

    It also replaces every expert's text in `per_expert` by a cached tensor, so that it is the same
    object at every step.

    Args:
        owner: the ensemble, used in the cache key.
        arguments: the arguments of the ensemble's call.
        per_expert: the arguments of each expert's call; changed in place.
        experts: the numbers of the experts to average.
    """
    key = "encoder_hidden_states"
    joined, texts = arguments[key], [own[key] for own in per_expert]
    if any(_share_memory(text, joined) for text in texts):
        return mean_of([texts[n] for n in experts])  # one text for all experts
    texts = once_per_prompt(joined, owner, lambda: texts)
    for own, text in zip(per_expert, texts, strict=True):
        own[key] = text
    chosen = [texts[n] for n in experts]
    if len(chosen) == 1:
        return chosen[0]
    return once_per_prompt(joined, (owner, *experts), lambda: mean_of(chosen))


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of N tensors; if all are the same object, that object."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return average(tensors)


def average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of N tensors in their data type; in float16 the sum may overflow, the mean not."""
    mean = sum(tensors[1:], start=tensors[0]) / len(tensors)
    if mean.dtype != torch.float16:
        return mean
    # no branch on values, which would make the CPU wait for the GPU
    rest = (tensor.float() for tensor in tensors[1:])
    exact = sum(rest, start=tensors[0].float()) / len(tensors)
    return torch.where(mean.isfinite(), mean, exact.to(mean.dtype))


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
