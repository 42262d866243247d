"""Linear layers whose weights stay quantised in memory and are dequantised at every call.

Two kinds of formats are supported: 8-bit floating-point numbers with a scale per row or none, as in
files of ComfyUI, and the block formats of GGUF, which diffusers dequantises
(`diffusers.quantizers.gguf`). Both are dequantised in float32 and rounded once, to the type in
which the layer computes, so a call gives what the same layer with dequantised weights gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterable

#: safetensors' names of the formats without blocks
FLOAT8: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

#: dequantises bytes to values of a shape, with the bits of the row scales or None; the values are
#: float32, or float8 if there are no scales
Unpack = Callable[[Tensor, Tensor | None, tuple[int, ...]], Tensor]


def unpacker(quantisation: str) -> Unpack:
    """Return the function that dequantises a format.

    Args:
        quantisation: a key of `FLOAT8`, or the name of a GGUF type such as `Q4_K`.

    Raises:
        ImportError: if the type is one of GGUF's, and the package `gguf` is missing.
        KeyError: if diffusers cannot dequantise the type.
    """
    if quantisation in FLOAT8:
        return _Float8(FLOAT8[quantisation])
    return _Blocks(quantisation)


class _Float8:
    """Dequantise float8 values: value times scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, data: Tensor, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        values = data.view(self._dtype).reshape(shape)
        if scale is None:
            return values  # every other floating-point type has these values
        rows = scale.view(torch.float32)
        return values.float().mul_(rows.reshape(-1, *(1 for _ in shape[1:])))


class _Blocks:
    """Dequantise the blocks of a GGUF type with diffusers' function for it."""

    def __init__(self, name: str) -> None:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions

        kind = gguf.GGMLQuantizationType[name]
        self._function: Any = dequantize_functions[kind]
        self._block, self._size = gguf.GGML_QUANT_SIZES[kind]

    def __call__(self, data: Tensor, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        del scale  # the blocks contain their scales
        blocks = data.reshape(-1, self._size)
        # diffusers' own layers compute in float16 here, which rounds a second time
        values: Tensor = self._function(blocks, self._block, self._size, torch.float32)
        return values.reshape(shape)


class PackedLinear(nn.Module):
    """A frozen linear layer with a quantised weight.

    It has no parameter `weight`, so that nothing can change the weight without effect. Its integer
    tensors keep their values if the model is cast, and can be offloaded and streamed like others.

    Args:
        data: the quantised weight as bytes, uint8 of any shape.
        scale: for float8, a scale per row, float32 [out, 1]; None without scales.
        bias: [out], or None.
        quantisation: see `unpacker`.
        shape: (out, in) of the weight.
        dtype: in which the layer computes; `to` changes it.

    Raises:
        ImportError: see `unpacker`.
    """

    bias: nn.Parameter | None
    packed: nn.Parameter
    scale: Tensor | None
    like: Tensor

    def __init__(
        self,
        data: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        quantisation: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.quantisation = quantisation
        self._unpack = unpacker(quantisation)
        self.packed = nn.Parameter(data, requires_grad=False)
        # as integers, because a cast of the model must not round the scales
        bits = None if scale is None else scale.float().contiguous().view(torch.int32)
        self.register_buffer("scale", bits)
        # has no values: it follows casts of the model
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=data.device))
        own = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", own)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight."""
        return self.out_features, self.in_features

    @property
    def has_blocks(self) -> bool:
        """Whether the format is one of GGUF's."""
        return self.quantisation not in FLOAT8

    @property
    def weight(self) -> Tensor:
        """A dequantised copy of the weight [out, in], in the type in which the layer computes."""
        return self._unpack(self.packed, self.scale, self.shape).to(self.like.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply inputs [..., in] by the dequantised weight, and add the bias."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            product: Tensor = _Product.apply(inputs, self.packed, self.scale, self)
            return product
        return functional.linear(inputs, self.weight, self.bias)

    def dense(self) -> nn.Linear:
        """Return the same layer with a dequantised weight."""
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"{self.in_features}, {self.out_features}, {self.quantisation}"


class _Product(torch.autograd.Function):
    """A layer's output; the backward pass dequantises again instead of storing the weight.

    The tensors are arguments, because offloading replaces a layer's own only during its call.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, packed: Tensor, scale: Tensor | None, layer: PackedLinear
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.layer = layer
        return functional.linear(inputs, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        (gradient,) = gradients
        weight = ctx.layer._unpack(packed, scale, ctx.layer.shape).to(gradient.dtype)
        return gradient @ weight, None, None, None


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the layers of a model whose weights are quantised, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def unpack_layers(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Replace layers of a model by layers with dequantised weights, in place.

    Args:
        names: of the layers; others than packed ones are ignored. None replaces all.
    """
    layers = packed_layers(model)
    for name in layers if names is None else set(names) & layers.keys():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layers[name].dense())
