"""What depends on the prompt alone is computed once for all steps: split texts, keys, values.

A pipeline hands the same tensor of text embeddings to the denoiser at every step. What was computed
of it is kept with it, and goes when it goes. Nothing is kept where gradients are recorded.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from diffusers.models.attention_processor import Attention

T = TypeVar("T")

# for each living tensor: its version, and what was computed of it
_kept: Any = WeakIdKeyDictionary()


def once_per_prompt(text: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """What `compute` makes of a text, computed again only if the text has changed.

    Args:
        text: any tensor that stays the same object as long as the prompt does.
        key: of what is computed.
        compute: must not give the text itself or a view of it, which would then live for ever.
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
    """Compute anew whatever is asked of this text next."""
    _kept.pop(text, None)


def versions(*modules: nn.Module) -> list[int]:
    """How often the parameters of modules have been changed in place; for a key."""
    return [
        0 if parameter.is_inference() else parameter._version
        for module in modules
        for parameter in module.parameters()
    ]


class PromptAttention(AttnProcessor2_0):
    """The library's attention, with keys and values of the prompt computed once.

    Bit for bit what `AttnProcessor2_0` gives. For cross attention whose projections are plain
    linear layers; of all else the library's own takes care.
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
        """Attend from hidden states [B, T, C] to a text [B, L, D]; see the library's."""
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


@torch.compiler.disable  # a graph would compute them at every step
def _keys_and_values(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
    """Of the prompt, [B, heads, L, C / heads] each."""
    return once_per_prompt(
        text,
        (attn, *versions(attn.to_k, attn.to_v)),
        lambda: (_by_head(attn, attn.to_k(text)), _by_head(attn, attn.to_v(text))),
    )


def _by_head(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _is_plain(attn: Attention) -> bool:
    """Whether this is nothing but projections and a product."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return (
        not any(extras)
        and not attn.residual_connection
        and type(attn.to_k) is nn.Linear
        and type(attn.to_v) is nn.Linear
    )


def cross_attentions(model: nn.Module) -> list[Attention]:
    """The attention layers of a model that look at the prompt, in order."""
    return [
        block.attn2
        for block in model.modules()
        if isinstance(block, BasicTransformerBlock) and block.attn2 is not None
    ]


@contextmanager
def prompts_attended_once(attentions: Iterable[Attention]) -> Iterator[None]:
    """Within, layers with the library's default attention compute keys and values once a prompt.

    Layers with other processors, such as an IP-Adapter's, keep them.
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
    heard: Sequence[int],
) -> Tensor:
    """The mean of some experts' texts [B, L, D].

    Every expert's own, in its arguments, comes to be the same object at every step.

    Args:
        owner: the ensemble, for which it is kept.
        arguments: of its call.
        per_expert: those of every expert's call.
        heard: the experts whose texts count, by number.
    """
    key = "encoder_hidden_states"
    joined, texts = arguments[key], [own[key] for own in per_expert]
    if any(_share_memory(text, joined) for text in texts):
        return mean_of([texts[n] for n in heard])  # one for all, as it came
    texts = once_per_prompt(joined, owner, lambda: texts)
    for own, text in zip(per_expert, texts, strict=True):
        own[key] = text
    chosen = [texts[n] for n in heard]
    if len(chosen) == 1:
        return chosen[0]
    return once_per_prompt(joined, (owner, *heard), lambda: mean_of(chosen))


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of N tensors; of one tensor named N times, that tensor."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return average(tensors)


def average(tensors: Sequence[Tensor]) -> Tensor:
    """Mean of N tensors, in their type; in float16 also where their sum overflows."""
    mean = sum(tensors[1:], start=tensors[0]) / len(tensors)
    if mean.dtype != torch.float16:
        return mean
    # without a branch on values: a GPU would have to be waited for
    rest = (tensor.float() for tensor in tensors[1:])
    exact = sum(rest, start=tensors[0].float()) / len(tensors)
    return torch.where(mean.isfinite(), mean, exact.to(mean.dtype))


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
