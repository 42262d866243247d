"""Read a LoRA file: its tensors, its metadata, PEFT's configuration, and its hash."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open

from afa.errors import AfaError
from afa.files import read_json
from afa.loading.trust.pickles import PICKLES, as_safetensors
from afa.loading.weights import check_safetensors, hash_files
from afa.lora.header import LoraFile
from afa.lora.names import RAW_PEFT
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

K = TypeVar("K")

#: parts of tensor names by which methods other than LoRA are detected
_OTHER_METHODS = {
    "oft_": "OFT",
    "boft_": "BOFT",
    ".ia3_": "IA3",
    ".vera_": "VeRA",
    "lora_embedding_": "LoRA for embeddings",
    "lora_controlnet": "a Control-LoRA",
    "bundle_emb.": "a textual inversion",
}
_CONFIG = "adapter_config.json"
#: maximum size in bytes; published ones have 2 kB
_MAX_CONFIG = 1_000_000
_METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA's header, and PEFT's configuration if there is one.

    Args:
        path: a safetensors file, or a pickle if pickles are allowed.

    Raises:
        AfaError: if the file is missing, a forbidden pickle, damaged, of another method than LoRA,
            or in PEFT's own layout without its configuration.
    """
    path = path.expanduser()
    if path.suffix.lower() in PICKLES:
        path = as_safetensors(path)
    if not path.is_file():
        raise AfaError(
            "AFA-LOAD-033",
            f"The LoRA '{path}' does not exist; it must be a local file. Download it first.",
        )
    header = check_safetensors(path)
    for mark, method in _OTHER_METHODS.items():
        found = next((name for name in header.tensors if mark in name), None)
        if found is not None:
            raise AfaError(
                "AFA-LOAD-034",
                f"'{path}' has '{found}', a tensor of {method}, which is not supported. A LoRA "
                "must add low-rank products to weights. Merge it into a checkpoint with the tool "
                "that made it, and use that as the expert.",
            )
    adapter = None
    if any(name.startswith(RAW_PEFT) for name in header.tensors):
        adapter = _read_config(path)
    metadata = header.metadata
    return LoraFile(path, header.tensors, metadata, adapter, _by_part(path, metadata))


def hash_lora(path: Path) -> str:
    """SHA-256 of a LoRA's file, or of the file and its `adapter_config.json` (PEFT).

    Two files are hashed like those of a folder, see `afa.loading.weights.hash_files`.

    Raises:
        AfaError: see `open_lora`.
    """
    lora = open_lora(path)
    if lora.adapter is None:
        return hash_file(lora.path)
    folder = lora.path.parent
    return hash_files(folder, [lora.path, folder / _CONFIG])


def read_tensors(lora: LoraFile, entries: Iterable[Mapping[K, str]]) -> Iterator[dict[K, Tensor]]:
    """Yield the tensors of each entry in float32, one entry at a time.

    Args:
        entries: names of tensors, by any key.

    Raises:
        AfaError: if a tensor has non-finite values (NaN or infinity).
    """
    with safe_open(lora.path, framework="pt") as file:
        for entry in entries:
            tensors = {key: file.get_tensor(name).float() for key, name in entry.items()}
            for key, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise AfaError(
                        "AFA-LOAD-035",
                        f"'{entry[key]}' of the LoRA '{lora.path}' has non-finite values (NaN or "
                        "infinity); all values must be finite. Download it again, or use an "
                        "earlier checkpoint of its training.",
                    )
            yield tensors


# -- PEFT's configuration ---------------------------------------------------------------------

#: settings of `peft.LoraConfig` that change the computation to more than a low-rank product
_UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
#: initialisations that do not change the base's weights
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

#: accepted patterns of layer names; PEFT accepts any regular expression, also endlessly slow ones
_PATTERN = re.compile(r"\^?[\w.-]{1,300}\$?")


def _read_config(path: Path) -> dict[str, Any]:
    place = path.parent / _CONFIG
    if not place.is_file():
        raise AfaError(
            "AFA-LOAD-036",
            f"'{path}' is a LoRA in PEFT's own layout, but there is no {_CONFIG} beside it, which "
            "has its scale (lora_alpha). Download or copy that file to the same folder.",
        )
    config = read_json(place, _MAX_CONFIG)
    _check_config(config, place)
    return config


def _by_part(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read PEFT's configurations in the header: `{"unet.r": 4, "unet.lora_alpha": 8, ...}`."""
    if not metadata.get(_METADATA):
        return {}
    try:
        content = json.loads(metadata[_METADATA])
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise AfaError(
            "AFA-LOAD-037",
            f"The metadata {_METADATA} of the LoRA '{path}' must be a JSON object, as diffusers "
            "writes it. Save the LoRA again, or without metadata.",
        )
    found: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, setting = key.partition(".")
        found.setdefault(part, {})[setting] = value
    for config in found.values():
        _check_config(config, path)
    return found


def _check_config(config: Mapping[str, Any], place: Path) -> None:
    """Check that a PEFT configuration describes low-rank products, with finite scales."""
    method = config.get("peft_type") or "LORA"
    if method != "LORA":
        raise AfaError(
            "AFA-LOAD-038",
            f"'{place}' describes a {method} adapter; only LORA is supported. Merge the adapter "
            "into its base with PEFT, and use the result as the expert.",
        )
    start = config.get("init_lora_weights")
    wrong = [f"{key} = {config[key]}" for key in _UNSUPPORTED if config.get(key)]
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        wrong.append(f"init_lora_weights = {start}, which changes the base's weights as well")
    if wrong:
        raise AfaError(
            "AFA-LOAD-039",
            f"'{place}' has {str(wrong[0])[:120]}, which is not supported; a LoRA must add "
            "low-rank products to the weights of its base. Merge the adapter into its base with "
            "PEFT, and use the result as the expert.",
        )
    numbers = {"r": config.get("r", 1), "lora_alpha": config.get("lora_alpha", 1)}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        numbers |= pattern if isinstance(pattern, dict) else {key: str(pattern)}
    for key, value in numbers.items():
        is_number = isinstance(value, (int, float)) and abs(value) < float("inf")
        if not is_number or not _PATTERN.fullmatch(key):
            raise AfaError(
                "AFA-LOAD-040",
                f"'{place}' has '{key[:80]}' = {str(value)[:60]}; ranks and alphas must be finite "
                "numbers, and their keys names of layers. Download it again.",
            )
