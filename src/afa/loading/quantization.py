"""Quantise the experts' linear layers to 8-bit weights with torchao, as diffusers does.

Convolutions, norms, embeddings and the aggregators are not quantised. Pictures change a little,
because weights are rounded. For a bfloat16 model of linear layers, memory is almost halved.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from afa.loading.manifest import ExpertManifest

#: storage of weights: 8-bit integers or floating-point numbers, with one scale per row
Weights = Literal["int8", "float8"]


def require_quantizer(weights: str, place: str, experts: Sequence[ExpertManifest]) -> None:
    """Check that experts can be quantised.

    Raises:
        AfaError: if the kind of weights is unknown, torchao is missing, `place` is `stream`, or an
            expert's file has quantised weights, which cannot be quantised again.
    """
    if weights not in get_args(Weights):
        kinds = ", ".join(get_args(Weights))
        raise AfaError(
            "AFA-LOAD-058", f"quantize must be one of {kinds} or omitted; got '{weights}'."
        )
    for expert in experts:
        if expert.is_quantised:
            raise AfaError(
                "AFA-LOAD-115",
                f"quantize cannot be combined with '{expert.source.source}', whose weights are "
                "quantised in the file and stay so in memory. Omit quantize, or use the float16 or "
                "bfloat16 version of the model.",
            )
    if find_spec("torchao") is None:
        raise AfaError(
            "AFA-LOAD-059",
            "torchao is not installed; quantize requires it. Install it with "
            "pip install 'afa[quantize]'.",
        )
    if place == "stream":
        raise AfaError(
            "AFA-LOAD-060",
            "quantize and place = stream cannot be combined; quantised experts must be in memory. "
            "Remove one of the two.",
        )


def quantize_linear(model: nn.Module, weights: Weights) -> None:
    """Quantise the weights of a model's linear layers in place.

    Args:
        model: in any floating-point type, in which it continues to compute.
    """
    from torchao import quantization

    configs: dict[str, Any] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }
    quantization.quantize_(model, configs[weights]())
    model.requires_grad_(False)
