"""Which tensors of a single file are quantised, and by which scales they are multiplied.

GGUF files hold blocks with their own scales. In safetensors files, float8 weights may have scales
in other tensors, in two layouts of ComfyUI (its QUANTIZATION.md describes the second):

- `layer.scale_weight`, with a tensor `scaled_fp8` that marks the part;
- `layer.weight_scale`, with a description of each layer in `layer.comfy_quant` (JSON as bytes), or
  of all layers in the metadata `_quantization_metadata`.

A weight is its float8 value times its scale. `scale_input` and `input_scale` are for products of
float8 activations, which afa does not compute. Every scale is applied, or the file is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from afa.denoisers.packed import FLOAT8
from afa.errors import AfaError
from afa.loading.single_file.canonical_names import DENOISER
from afa.loading.single_file.layout import kind_name, layouts
from afa.loading.trust.gguf import PLAIN, is_gguf
from afa.loading.weights import check_weights, is_quantised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from afa.loading.trust.headers import Header
    from afa.loading.weights import Shapes

_SCALES = ("scale_weight", "weight_scale")
#: tensors without effect, by the last part of the name
_UNUSED = {
    "scale_input": "scale of float8 activations, which stay in the compute type",
    "input_scale": "scale of float8 activations, which stay in the compute type",
    "scaled_fp8": "marker of scaled float8 weights",
    "comfy_quant": "description of a quantised layer",
}
#: names of float8 formats in ComfyUI's descriptions
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
#: settings of a layer; the second only selects how ComfyUI multiplies
_SETTINGS = ("format", "full_precision_matrix_mult")
_METADATA = "_quantization_metadata"
_MAX_DESCRIPTION = 10_000
#: prefixes of parts; a part has scales for all of its layers, or for none
_PARTS = (
    *(DENOISER, "diffusion_model.", "text_encoders.clip_l.", "text_encoders.clip_g."),
    *("text_encoders.t5xxl.", "conditioner.", "cond_stage_model.", "first_stage_model.", "vae."),
)
#: tables of embeddings, which are no layers and may lack a scale in a scaled part
_TABLES = re.compile(r"(.*\.)?(\w*embed\w*|shared|relative_attention_bias)\.weight")


@dataclass(frozen=True)
class Layout:
    """The quantised tensors of a file.

    Attributes:
        quantised: weight -> its type, `F8_E4M3`, `F8_E5M2` or a type of GGUF with blocks.
        scales: weight -> the tensor with its scale.
        unused: tensors without effect -> why.
        is_gguf: whether the file is a GGUF file.
    """

    quantised: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    is_gguf: bool = False


def model_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a single file's tensors by name, without those of the quantisation.

    Raises:
        AfaError: see `layout_of`.
    """
    layout = layout_of(file)
    others = {*layout.scales.values(), *layout.unused}
    tensors = check_weights(file).tensors.items()
    return {name: tuple(entry["shape"]) for name, entry in tensors if name not in others}


def layout_of(file: Path) -> Layout:
    """Find the quantised tensors of a single file and their scales.

    Raises:
        AfaError: if the file is damaged; if a quantisation is unknown; or if a scale is missing,
            belongs to no float8 weight, or has another shape than a number or a number per row.
    """
    header = check_weights(file)
    if is_gguf(file):
        blocks = {n: e["dtype"] for n, e in header.tensors.items() if e["dtype"] not in PLAIN}
        return Layout(blocks, is_gguf=True)
    scales: dict[str, str] = {}
    unused: dict[str, str] = {}
    quantised: dict[str, str] = {}
    for name, entry in header.tensors.items():
        layer, _, last = name.rpartition(".")
        weight = f"{layer}.weight"
        if last in _SCALES:
            if weight in scales:
                raise _misfit(file, name, f"is a second scale beside '{scales[weight]}'")
            scales[weight] = name
        elif last in _UNUSED:
            unused[name] = _UNUSED[last]
        elif entry["dtype"] in FLOAT8:
            quantised[name] = entry["dtype"]
        elif is_quantised(name, is_float=entry["dtype"] in _FLOATS):
            raise AfaError(
                "AFA-LOAD-104",
                f"'{name}' in '{file}' is quantised ({entry['dtype']}) in a way that afa cannot "
                "read. Weights must be float32, float16, bfloat16, float8 with or without scales "
                "of ComfyUI, or GGUF. Use one of these.",
            )
    described = dict(_descriptions(file, header))
    for weight, scale in scales.items():
        _check_scale(file, header, weight, scale)
    _check_descriptions(file, quantised, described)
    _require_scales(file, header, scales, described)
    return Layout(quantised, scales, unused)


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def _misfit(file: Path, name: str, why: str) -> AfaError:
    return AfaError(
        "AFA-LOAD-110",
        f"'{name}' in '{file}' {why}. A scale must be one number, or one per row, for one float8 "
        "weight. Download the file again, or use the float16 or bfloat16 version.",
    )


def _check_scale(file: Path, header: Header, weight: str, scale: str) -> None:
    if weight not in header.tensors:
        raise _misfit(file, scale, f"is a scale without its weight '{weight}'")
    of, own = header.tensors[weight], header.tensors[scale]
    if of["dtype"] not in FLOAT8:
        raise _misfit(file, scale, f"is a scale of '{weight}', which has the type {of['dtype']}")
    rows = of["shape"][:1]
    if own["dtype"] not in _FLOATS or (prod(own["shape"]) != 1 and own["shape"] != [*rows, 1]):
        what = f"{own['dtype']} of shape {tuple(own['shape'])}"
        raise _misfit(file, scale, f"is a scale of {what} for {rows[0] if rows else 0} rows")


def _descriptions(file: Path, header: Header) -> Iterator[tuple[str, str]]:
    """Yield the weights that a file describes as quantised, and the names of their formats."""
    for name, entry in header.tensors.items():
        if name.rpartition(".")[2] == "comfy_quant":
            start, end = entry["data_offsets"]
            with file.open("rb") as stream:
                stream.seek(header.start + start)
                content = stream.read(min(end - start, _MAX_DESCRIPTION))
            yield f"{name.removesuffix('comfy_quant')}weight", _format(file, name, content)
    text = header.metadata.get(_METADATA)
    if text is None:
        return
    layers = _parsed(file, _METADATA, text)
    layers = layers.get("layers") if isinstance(layers, dict) else None
    if not isinstance(layers, dict):
        raise _undescribed(file, _METADATA, "has no 'layers'")
    for layer, own in layers.items():
        names = [f"{prefix}{layer}.weight" for prefix in ("", DENOISER, "diffusion_model.")]
        found = next((name for name in names if name in header.tensors), names[0])
        yield found, _named(file, layer, own)


def _parsed(file: Path, name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _undescribed(file, name, "is not JSON") from None


def _format(file: Path, name: str, content: bytes) -> str:
    return _named(file, name, _parsed(file, name, content))


def _named(file: Path, name: str, described: Any) -> str:
    """Return the name of a format, from `{"format": NAME}` or from the name alone."""
    settings = described if isinstance(described, dict) else {"format": described}
    found = settings.get("format")
    if not isinstance(found, str):
        raise _undescribed(file, name, "names no format")
    # a rotation, for example, would change the weights
    unknown = next((key for key, own in settings.items() if own and key not in _SETTINGS), None)
    if unknown is not None:
        raise _undescribed(file, name, f"has the unknown setting '{str(unknown)[:60]}'")
    return found


def _undescribed(file: Path, name: str, why: str) -> AfaError:
    return AfaError(
        "AFA-LOAD-111",
        f"The description '{name}' of quantised layers in '{file}' {why}; it must be JSON that "
        "names their format, as ComfyUI writes it. Download the file again, or use the float16 or "
        "bfloat16 version.",
    )


def _check_descriptions(
    file: Path, quantised: Mapping[str, str], described: Mapping[str, str]
) -> None:
    for weight, name in described.items():
        if name not in _FORMATS:
            raise AfaError(
                "AFA-LOAD-112",
                f"'{weight}' in '{file}' has the format '{name[:60]}'; supported are "
                f"{', '.join(_FORMATS)}. Use the file of the same model in float8, float16 or "
                "bfloat16.",
            )
        if quantised.get(weight) != _FORMATS[name]:
            found = quantised.get(weight, "missing or of another type")
            raise AfaError(
                "AFA-LOAD-113",
                f"'{file}' describes '{weight}' as {name}, but it is {found}. Description and "
                "tensors must agree. Download the file again.",
            )


def _require_scales(
    file: Path, header: Header, scales: Mapping[str, str], described: Mapping[str, str]
) -> None:
    """Check that no layer of a part with scales lacks its own."""
    marked = tuple(
        name.removesuffix("scaled_fp8")
        for name in header.tensors
        if name.rpartition(".")[2] == "scaled_fp8"
    )
    scaled = {_part(weight) for weight in scales}
    for name, entry in header.tensors.items():
        if entry["dtype"] not in FLOAT8 or name in scales or not name.endswith(".weight"):
            continue
        is_layer = len(entry["shape"]) > 1 and _TABLES.fullmatch(name) is None
        is_scaled = name.startswith(marked) or _part(name) in scaled
        if name in described or (is_layer and is_scaled):
            layer = name.removesuffix("weight")
            raise AfaError(
                "AFA-LOAD-120",
                f"'{name}' in '{file}' has no scale; in a file of scaled float8 weights, every "
                f"layer must have one ('{layer}scale_weight' or '{layer}weight_scale'). Download "
                "the file again.",
            )


def _part(name: str) -> str:
    return next((start for start in _PARTS if name.startswith(start)), "")


def require_family(file: Path, shapes: Shapes) -> None:
    """Check that the family that a GGUF file names is the one of its tensors.

    Raises:
        AfaError: if not, or if that family is not supported.
    """
    if not is_gguf(file):
        return
    stated = check_weights(file).metadata.get("general.architecture")
    known = {files.gguf: kind.name for kind, files in layouts().items() if files.gguf}
    found = kind_name(shapes)
    if stated is not None and (found is None or known.get(stated) != found):
        raise AfaError(
            "AFA-LOAD-118",
            f"'{file}' has the general.architecture '{stated[:60]}' and the tensors of "
            f"{found or 'an unknown model'}. A GGUF expert must be one of "
            f"{', '.join(map(str, known))}, with its denoiser's tensors under their original names "
            "or those of diffusers. Use the GGUF or safetensors file of a supported denoiser.",
        )
