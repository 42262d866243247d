"""What the configurations of a model's folder may say, checked before a library reads them.

The libraries read more of a folder than its weights: an index that names further files, an adapter
with a base somewhere else, attention kernels to be fetched and run, the sizes of what is built.
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

#: bytes; configurations that are published have 2 kB, the tokenizer of T5 2.4 MB
_MAX_CONFIG, _MAX_TOKENIZER = 1_000_000, 64_000_000
#: entries that have a library run code from the folder or from the hub
_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
#: entries that choose how attention is computed, and what the libraries have of their own
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_OWN = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d)")
#: how often a part may be built and how wide anything may be; the most published are 57 and 152064
_MAX_LAYERS, _MAX_WIDTH = 200, 10_000_000
_COUNTS = re.compile(r"(^|_)(layers?|blocks|depth|types|channels)(_per_block)?$")
#: what a table is made of when a transformer is built, as large as its square
_SIDES, _MAX_SIDE = ("sample_size", "pos_embed_max_size"), 1024
#: entries of a list: noise schedules have a number for each of their steps
_MAX_LIST = 10_000
_ADAPTER = "adapter_config.json"
_TOKENIZER = re.compile(r"tokenizer(_\d+)?")


def check_folder(folder: Path) -> None:
    """Refuse a pipeline's folder that is more than data about a model.

    Args:
        folder: with a `model_index.json`; of it and of the parts that it names all JSON is read.

    Raises:
        AfaError: names the file and the entry, and what it would do.
    """
    index = folder / "model_index.json"
    content = read_json(index, _MAX_CONFIG)
    _check_entries(content, index)
    for part in parts_of(content):
        check_part(folder / part)


def check_part(folder: Path) -> None:
    """Refuse the folder of one component; see `check_folder`. A folder that is missing passes."""
    if not folder.is_dir():
        return
    if (folder / _ADAPTER).exists():
        raise AfaError(
            "AFA-LOAD-083",
            f"A model's part must be whole; '{folder / _ADAPTER}' makes it an adapter, whose base "
            "may be anywhere. Merge the adapter into its base and save it, or name it as a LoRA.",
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
                f"A tokenizer's file must be smaller than {_MAX_TOKENIZER} bytes; '{file}' has "
                f"{file.stat().st_size}. Download it again.",
            )


def _read(file: Path, limit: int) -> dict[str, Any]:
    """A JSON object; an index of shards has a line for every tensor."""
    return read_json(file, 64 * limit if file.name.endswith(".index.json") else limit)


def _check_index(content: dict[str, Any], file: Path) -> None:
    """Shards lie beside their index, and are safetensors."""
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise AfaError(
            "AFA-LOAD-085",
            f"'{file}' must have a weight_map of tensors to files. Download it again.",
        )
    for shard in set(map(str, shards.values())):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise AfaError(
                "AFA-LOAD-086",
                f"'{file}' must name safetensors files beside it, came '{shard[:80]}'. Download it "
                "again from a source you trust.",
            )


def _check_entries(content: dict[str, Any], file: Path) -> None:
    for key, value in _entries(content):
        if key in _CODE and value not in (None, False, {}, []):
            raise AfaError(
                "AFA-LOAD-087",
                f"A model must be data alone; '{file}' has {key}, with which code of others is "
                "run. Take that entry out if the class that it replaces is a library's own.",
            )
        if key in _ATTENTION and not _is_own(value):
            raise AfaError(
                "AFA-LOAD-088",
                f"A model must compute attention by a library's own means; '{file}' has {key} = "
                f"'{str(value)[:80]}', which is fetched and run. Take that entry out.",
            )
        _check_size(key, value, file)


def _is_own(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(each is None or (isinstance(each, str) and _OWN.fullmatch(each)) for each in values)


def _check_size(key: str, value: Any, file: Path) -> None:
    """Refuse numbers that would have a model built without end, or tables without measure."""
    is_count = _COUNTS.search(key) is not None
    numbers, length = _flat(value)
    if length > (_MAX_LAYERS if is_count else _MAX_LIST):
        raise AfaError(
            "AFA-LOAD-089",
            f"'{file}' must describe a model that can be built; its {key} has {length} entries. "
            "Download it again from a source you trust.",
        )
    limit = _MAX_WIDTH
    if is_count and not key.endswith("channels"):
        limit = _MAX_LAYERS
    elif key in _SIDES and file.parent.name == "transformer":
        limit = _MAX_SIDE
    # infinity is no size; tokenizers without a limit say that texts may have 1e30 tokens
    is_free = "max_len" in key
    for number in numbers:
        if not (is_free or abs(number) == math.inf or abs(number) <= limit):
            raise AfaError(
                "AFA-LOAD-090",
                f"'{file}' must describe a model that can be built; its {key} is "
                f"{str(number)[:20]}, {limit} is the most. Download it again from a source you "
                "trust.",
            )


def _flat(value: Any) -> tuple[list[float], int]:
    """All numbers of a value, and how many entries its lists have."""
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
    """All entries of an object and of the objects in it."""
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from ((str(key), value) for key, value in found.items())
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(item for item in found if isinstance(item, dict | list))
