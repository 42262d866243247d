"""A LoRA's file: its tensors, what it and the configuration beside it say, and its hash."""

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

#: in the names of tensors: methods that add something else than a low-rank product
_OTHER_METHODS = {
    "dora_scale": "DoRA in the layout of LyCORIS",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    ".ia3_": "IA3",
    ".vera_": "VeRA",
    "lora_embedding_": "LoRA for embeddings",
    "lora_controlnet": "a Control-LoRA",
    "bundle_emb.": "a textual inversion",
}
_CONFIG = "adapter_config.json"
#: bytes of it; published ones have 2 kB
_MAX_CONFIG = 1_000_000
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA's header, and PEFT's configuration where there is one.

    Args:
        path: a file, or a pickle that may be opened.

    Raises:
        AfaError: the file is missing, a pickle, damaged, or of another method than LoRA; or it is
            in PEFT's own layout without its configuration.
    """
    path = path.expanduser()
    if path.suffix.lower() in PICKLES:
        path = as_safetensors(path, "A LoRA")
    if not path.is_file():
        raise AfaError(
            "AFA-LOAD-033",
            f"A LoRA must be a local file; '{path}' does not exist. Download it first.",
        )
    header = check_safetensors(path)
    for mark, method in _OTHER_METHODS.items():
        found = next((name for name in header.tensors if mark in name), None)
        if found is not None:
            raise AfaError(
                "AFA-LOAD-034",
                f"'{path}' has '{found}', a tensor of {method}. A LoRA must add low-rank products "
                "to weights. Merge it into a checkpoint with the tool it is from, and name that as "
                "the expert.",
            )
    adapter = None
    if any(name.startswith(RAW_PEFT) for name in header.tensors):
        adapter = _read_config(path)
    metadata = header.metadata
    return LoraFile(path, header.tensors, metadata, adapter, _by_part(path, metadata))


def hash_lora(path: Path) -> str:
    """SHA-256 of a LoRA's file; with the `adapter_config.json` that scales it, of both.

    Two files are hashed as a folder's are, see `afa.loading.weights.hash_files`.

    Raises:
        AfaError: see `open_lora`.
    """
    lora = open_lora(path)
    if lora.adapter is None:
        return hash_file(lora.path)
    folder = lora.path.parent
    return hash_files(folder, [lora.path, folder / _CONFIG])


def read_tensors(lora: LoraFile, entries: Iterable[Mapping[K, str]]) -> Iterator[dict[K, Tensor]]:
    """The tensors of each entry in float32, one entry at a time.

    Args:
        lora: the file.
        entries: names of tensors, by any key.

    Raises:
        AfaError: a tensor has NaN or infinity.
    """
    with safe_open(lora.path, framework="pt") as file:
        for entry in entries:
            tensors = {key: file.get_tensor(name).float() for key, name in entry.items()}
            for key, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise AfaError(
                        "AFA-LOAD-035",
                        f"'{entry[key]}' of the LoRA '{lora.path}' has non-finite values (NaN or "
                        "infinity). All numbers of a LoRA must be finite. Download it again, or "
                        "take an earlier checkpoint of its training.",
                    )
            yield tensors


# -- PEFT's configuration ---------------------------------------------------------------------

#: of `peft.LoraConfig`: what makes more of the tensors than a low-rank product
_UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
#: how factors were initialised, where that left the base's own weights as they were
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

#: patterns of layers' names; PEFT takes any expression, and some take forever to be matched
_PATTERN = re.compile(r"\^?[\w.-]{1,300}\$?")


def _read_config(path: Path) -> dict[str, Any]:
    place = path.parent / _CONFIG
    if not place.is_file():
        raise AfaError(
            "AFA-LOAD-036",
            f"'{path}' is a LoRA in PEFT's own layout, whose scale (lora_alpha) stands in the "
            f"{_CONFIG} that PEFT saves with it. That file must lie beside it; there is none. "
            "Download or copy it, too.",
        )
    config = read_json(place, _MAX_CONFIG)
    _check_config(config, place)
    return config


def _by_part(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configurations in the header: `{"unet.r": 4, "unet.lora_alpha": 8, ...}`."""
    if not metadata.get(_METADATA):
        return {}
    try:
        content = json.loads(metadata[_METADATA])
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise AfaError(
            "AFA-LOAD-037",
            f"The metadata {_METADATA} of the LoRA '{path}' is no JSON object. It must be what "
            "diffusers writes. Save the LoRA again, or without metadata.",
        )
    found: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, setting = key.partition(".")
        found.setdefault(part, {})[setting] = value
    for config in found.values():
        _check_config(config, path)
    return found


def _check_config(config: Mapping[str, Any], place: Path) -> None:
    """Refuse what is more than low-rank products, or is damaged."""
    method = config.get("peft_type") or "LORA"
    if method != "LORA":
        raise AfaError(
            "AFA-LOAD-038",
            f"'{place}' describes a {method} adapter. It must be a LORA one. Merge the adapter "
            "into its base with PEFT, and name the result as the expert.",
        )
    start = config.get("init_lora_weights")
    wrong = [f"{key} = {config[key]}" for key in _UNSUPPORTED if config.get(key)]
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        wrong.append(f"init_lora_weights = {start}, which changes the base's weights as well")
    if wrong:
        raise AfaError(
            "AFA-LOAD-039",
            f"'{place}' has {str(wrong[0])[:120]}. A LoRA must add low-rank products to the "
            "weights of its base. Merge the adapter into its base with PEFT, and name the result "
            "as the expert.",
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
                f"'{place}' has '{key[:80]}' = {str(value)[:60]}. Ranks and alphas must be finite "
                "numbers, for layers by their names. Download it again.",
            )
