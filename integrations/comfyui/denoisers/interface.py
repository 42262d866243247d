"""How ComfyUI's denoisers are described, copied without data, and called.

They are plain modules without a configuration, so an architecture is described by the shapes of its
tensors, in the layout of the original code. ComfyUI's forward passes add residuals of ControlNets
and results of patches in place, and all experts of an ensemble continue with the same tensor; so
the coroutines copy a feature before anything may write to it.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.interface import Interface

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class ComfyInterface(Interface):
    """The interface of ComfyUI's denoisers.

    Args:
        call: a function with the arguments of an ensemble's call.
        packed: the side of the squares of latents that diffusers' pipelines pack into one token.
    """

    def __init__(self, call: Callable[..., Any], packed: int = 1) -> None:
        self._call, self._packed = call, packed

    def height(self, latent: Tensor) -> int:
        """The height of the latent that diffusers' denoiser gets, so that sites are the same."""
        return super().height(latent) // self._packed

    def config(self, model: Any) -> Mapping[str, Any]:
        """The shapes of all parameters, by name."""
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def defaults(self, model: Any) -> None:
        """No class has defaults of these shapes."""
        del model

    def without_data(self, model: Any, model_class: Any) -> Any:
        """Copy a model, but not the data of its tensors."""
        del model_class
        tensors = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {
            id(tensor): torch.nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
            if isinstance(tensor, torch.nn.Parameter)
            else tensor.to("meta")
            for tensor in tensors
        }
        for module in model.modules():  # patches of weights; the copy is not used to compute
            for name in ("weight_function", "bias_function"):
                if name in vars(module):
                    memo[id(vars(module)[name])] = []
        return copy.deepcopy(model, memo)

    def signature(self, model_class: Any) -> inspect.Signature:
        """The signature of an ensemble's call."""
        del model_class
        return inspect.signature(self._call)


def shape_of_attention(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any
) -> Tensor:
    """An empty result of ComfyUI's attention, which asks the device for its free memory.

    Takes the place of the attention in models without data, by ComfyUI's own
    `optimized_attention_override`.
    """
    del function, k, heads
    if options.get("skip_reshape"):  # [B, heads, T, C]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * v.shape[-1])
    return v.new_empty(*q.shape[:2], *v.shape[2:]).flatten(2)  # [B, T, C] or [B, T, heads, C]


#: options of a call of a model without data
WITHOUT_DATA = {"optimized_attention_override": shape_of_attention}


def own_control(control: Mapping[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """A copy of a ControlNet's residuals; forward passes remove those that they have used."""
    return None if control is None else {name: list(given) for name, given in control.items()}


def own_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `transformer_options`, in which a forward pass notes where it is."""
    return dict(options or {})


def by_expert(options: Any, count: int) -> list[dict[str, Any]]:
    """The `transformer_options` of each expert: one for all, or a list with one for each."""
    listed = options if isinstance(options, (list, tuple)) else [options] * count
    return [own_options(each) for each in listed]
