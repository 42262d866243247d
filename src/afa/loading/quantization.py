"""Experts whose linear layers have weights of 8 bits, by torchao, as diffusers has it done.

Convolutions, norms and embeddings stay, and so do the aggregators. A layer multiplies with what its
weights round to: pictures change a little, memory nearly halves where a model is bfloat16 and made
of linear layers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import nn

#: how weights are kept: integers, or floating-point numbers, of 8 bits with a scale for every row
Weights = Literal["int8", "float8"]


def require_quantizer(weights: str, place: str) -> None:
    """See whether experts can be quantised.

    Raises:
        AfaError: no such kind of weights, no torchao, or layers that are kept in a file.
    """
    if weights not in get_args(Weights):
        kinds = ", ".join(get_args(Weights))
        raise AfaError(
            "AFA-LOAD-058", f"quantize must be one of {kinds} or left out, came '{weights}'."
        )
    if find_spec("torchao") is None:
        raise AfaError(
            "AFA-LOAD-059",
            "To quantise experts there must be torchao, and there is none. Install it: "
            "pip install 'afa[quantize]'.",
        )
    if place == "stream":
        raise AfaError(
            "AFA-LOAD-060",
            "Quantised experts must be in memory; layers in a file are kept as they are. Leave one "
            "of the two out.",
        )


def quantize_linear(model: nn.Module, weights: Weights) -> None:
    """Give the linear layers of a model quantised weights, in place.

    Args:
        model: in any floating-point type, which stays that of what it computes.
        weights: kind of the weights.
    """
    from torchao import quantization

    configs: dict[str, Any] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }
    quantization.quantize_(model, configs[weights]())
    model.requires_grad_(False)
