"""Detect quantised weights, which cannot be averaged without their scales."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.loading.single_file.canonical_names import MARKERS
from afa.loading.weights import is_quantised

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from afa.loading.tensor_files import StoredTensor

# names of ComfyUI, bitsandbytes, optimum-quanto, torchao, GPTQ and AWQ, Nunchaku, and their common
# suffixes of a weight's name (`to_q.weight.absmax`, `to_q.weight_scale`, `to_q.weight._data`)
_SCALE = re.compile(
    r".*weight[._:]_?(q|scale|zero|absmax|nested|data|shift|int|format|lut|codebook).*"
    r"|(.*\.)?(scaled_fp8|scale_weight|scale_input|input_scale|weight_format|comfy_quant|SCB)"
    r"|.*\.(qweight|qzeros|scales|g_idx|wscales|wzeros|smooth_factor\w*)"
    r"|.*[._](absmax|quant_map|quant_state\.\S+|zero_?point)"
)
_SCALE_WORDS = re.compile(r"scale|absmax|zero|quant")
#: integer tensors of models that are not quantised: positions, counters, a tokenizer as bytes
_INTEGERS = re.compile(
    r"(.*\.)?(position_ids|num_batches_tracked|num_updates|global_step|relative_position_index"
    r"|spiece_model|tekken_model|attn_mask)"
)


def refuse_quantised(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], source: object
) -> None:
    """Check that a checkpoint has no quantised weights and no unknown integer tensors.

    Plain float8 weights without a scale are accepted.

    Args:
        tensors: name -> tensor of one file or folder.
        metadata: metadata of a file.
        source: name of the checkpoint in errors.

    Raises:
        AfaError: if it has, with the name of the first such tensor.
    """
    siblings = _scales_by_layer(tensors)
    for name, tensor in tensors.items():
        is_float = tensor.dtype.is_floating_point
        is_narrow = tensor.dtype.itemsize == 1 or not is_float
        layer = name.rpartition(".")[0]
        is_scaled = is_narrow and bool(siblings.get(layer, set()) - {name})
        if is_quantised(name, is_float=is_float) or _SCALE.fullmatch(name) or is_scaled:
            raise AfaError(
                "AFA-MERGE-032",
                f"'{name}' in '{tensor.file}' is quantised ({tensor.dtype}). Use the float16 or "
                "float32 version of the checkpoint.",
            )
        is_known = _INTEGERS.fullmatch(name) or name in MARKERS or 0 in tensor.shape
        if not is_float and not is_known:
            raise AfaError(
                "AFA-MERGE-033",
                f"'{name}' in '{tensor.file}' is an unknown tensor of type {tensor.dtype}, which "
                "cannot be averaged. Use a float16 or float32 version without it.",
            )
    if key := next((key for key in metadata if "quantization" in key), None):
        raise AfaError(
            "AFA-MERGE-034",
            f"'{source}' has quantised weights according to its metadata ('{key}'). Use the "
            "float16 or float32 version of the checkpoint.",
        )


def _scales_by_layer(names: Iterable[str]) -> dict[str, set[str]]:
    """Layer -> its tensors whose names mark scales or other quantisation data."""
    scales: dict[str, set[str]] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        if _SCALE_WORDS.search(last):
            scales.setdefault(layer, set()).add(name)
    return scales
