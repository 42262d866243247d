"""Check the configurations of a model's folder before a library reads them.

Libraries read more than weights from a folder: an index of further files, an adapter with a base
elsewhere, attention kernels to download and run, and the sizes of the model.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import parts_of, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: bytes; published configurations have 2 kB, the tokenizer of T5 2.4 MB
_MAX_CONFIG, _MAX_TOKENIZER = 1_000_000, 64_000_000
#: entries with which a library runs code from the folder or the hub
_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
#: entries that select the attention implementation, and the libraries' own implementations
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_OWN = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d)")
#: limits of layers and widths; the largest published values are 57 and 152064
_MAX_LAYERS, _MAX_WIDTH = 200, 10_000_000
_COUNTS = re.compile(r"(^|_)(layers?|blocks|depth|types|channels)(_per_block)?$")
#: sides of the table of position embeddings, which has the size of their square
_SIDES, _MAX_SIDE = ("sample_size", "pos_embed_max_size"), 1024
#: entries of a list; noise schedules have one number per step
_MAX_LIST = 10_000
_ADAPTER = "adapter_config.json"
_TOKENIZER = re.compile(r"tokenizer(_\d+)?")


def check_folder(folder: Path) -> None:
    """Check that a pipeline folder contains only data.

    Args:
        folder: with a `model_index.json`; all JSON files in it and in its parts are read.

    Raises:
        AfaError: if not; names the file, the entry and its effect.
    """
    index = folder / "model_index.json"
    content = read_json(index, _MAX_CONFIG)
    _check_entries(content, index)
    for part in parts_of(content):
        check_part(folder / part)


def check_part(folder: Path) -> None:
    """Check the folder of one component, if it exists; see `check_folder`."""
    if not folder.is_dir():
        return
    if (folder / _ADAPTER).exists():
        raise AfaError(
            "AFA-LOAD-083",
            f"'{folder / _ADAPTER}' makes this part an adapter, whose base may be anywhere; it "
            "must be a complete model. Merge the adapter into its base, or use it as a LoRA.",
        )
    is_tokenizer = _TOKENIZER.fullmatch(folder.name) is not None
    for file in sorted(folder.glob("*.json")):
        content = _read(file, _MAX_TOKENIZER if is_tokenizer else _MAX_CONFIG)
        if file.name.endswith(".safetensors.index.json"):
            _check_index(content, file)
        elif file.name.endswith("config.json"):
            _check_entries(content, file)
    for file in folder.iterdir():
        if is_tokenizer and file.is_file() and file.stat().st_size > _MAX_TOKENIZER:
            raise AfaError(
                "AFA-LOAD-084",
                f"The tokenizer file '{file}' has {file.stat().st_size} bytes; the maximum is "
                f"{_MAX_TOKENIZER}. Download it again.",
            )


def _read(file: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object; an index of shards may be larger, with a line for every tensor."""
    return read_json(file, 64 * limit if file.name.endswith(".index.json") else limit)


def _check_index(content: dict[str, Any], file: Path) -> None:
    """Check that shards are safetensors files beside their index."""
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise AfaError(
            "AFA-LOAD-085",
            f"'{file}' has no weight_map of tensors to files. Download it again.",
        )
    for shard in set(map(str, shards.values())):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise AfaError(
                "AFA-LOAD-086",
                f"'{file}' names '{shard[:80]}'; shards must be safetensors files beside it. "
                "Download it again from a source you trust.",
            )


def _check_entries(content: dict[str, Any], file: Path) -> None:
    for key, value in _entries(content):
        if key in _CODE and value not in (None, False, {}, []):
            raise AfaError(
                "AFA-LOAD-087",
                f"'{file}' has {key}, which runs code from the model; a model must contain only "
                "data. Remove that entry, if a library's own class can replace it.",
            )
        if key in _ATTENTION and not _is_own(value):
            raise AfaError(
                "AFA-LOAD-088",
                f"'{file}' has {key} = '{str(value)[:80]}', which is downloaded and run; a model "
                "must use a library's own attention. Remove that entry.",
            )
        _check_size(key, value, file)


def _is_own(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(each is None or (isinstance(each, str) and _OWN.fullmatch(each)) for each in values)


def _check_size(key: str, value: Any, file: Path) -> None:
    """Check that numbers and lists do not create a model of unreasonable size."""
    is_count = _COUNTS.search(key) is not None
    numbers, length = _flat(value)
    if length > (_MAX_LAYERS if is_count else _MAX_LIST):
        raise AfaError(
            "AFA-LOAD-089",
            f"The list {key} in '{file}' has {length} entries, too many for a model. Download it "
            "again from a source you trust.",
        )
    limit = _MAX_WIDTH
    if is_count and not key.endswith("channels"):
        limit = _MAX_LAYERS
    elif key in _SIDES and file.parent.name == "transformer":
        limit = _MAX_SIDE
    # infinity is not a size; tokenizers without a limit have a maximum length of 1e30
    is_free = "max_len" in key
    for number in numbers:
        if not (is_free or abs(number) == math.inf or abs(number) <= limit):
            raise AfaError(
                "AFA-LOAD-090",
                f"{key} in '{file}' is {str(number)[:20]}, too large for a model; the maximum is "
                f"{limit}. Download it again from a source you trust.",
            )


def _flat(value: Any) -> tuple[list[float], int]:
    """Return all numbers in a value, and the total length of its lists."""
    level, numbers, length = [value], [], 0
    while level:
        item = level.pop()
        if isinstance(item, list):
            length += len(item)
            level.extend(item)
        elif isinstance(item, int | float):
            numbers.append(item)
    return numbers, length


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield all entries of an object and of nested objects."""
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from ((str(key), value) for key, value in found.items())
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(item for item in found if isinstance(item, dict | list))
