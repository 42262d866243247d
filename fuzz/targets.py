"""The fuzz targets: each one reads bytes as one kind of file.

A target may accept its input or refuse it with an `AfaError`. Anything else is a finding. An
accepted input is used as far as that is cheap, so that a reader that accepts too much is also
found.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image
from safetensors import safe_open

from afa.cli.console import printable
from afa.drawing.recorded import read_picture
from afa.ensemble.steering import parse_bias
from afa.errors import AfaError
from afa.evaluation.recipe import load_evaluate_recipe
from afa.evaluation.search_recipe import load_search_recipe
from afa.files import read_json
from afa.loading.inspection import describe
from afa.loading.saved import read_config, sources_in
from afa.loading.single_file.identify import config_folder, config_of
from afa.loading.tensor_files import read_header
from afa.loading.trust.folders import check_folder
from afa.loading.weights import check_safetensors, tensor_shapes
from afa.merging.recipe import load_merge_recipe
from afa.training.data.folder import FolderImages
from afa.training.recipe import load_recipe

#: maximum length of an error in characters; names in files may be long
_MAX_MESSAGE = 20_000
_MAX_READ = 1_000_000


class Finding(Exception):
    """An input that a reader did not handle."""


@cache
def place() -> Path:
    """Return a folder for the inputs, in memory if possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="afa-fuzz-", dir=memory if memory.is_dir() else None))


def feed(target: str, data: bytes) -> bool:
    """Give bytes to a target, and return whether it accepted them.

    Raises:
        Finding: if the error message is empty or too long.
        Exception: any other exception, which is a finding as well.
    """
    try:
        TARGETS[target](data)
    except AfaError as error:
        line = printable(str(error))
        if not line or len(line) > _MAX_MESSAGE:
            raise Finding(f"an error of {len(line)} characters") from error
        return False
    return True


def safetensors_file(data: bytes) -> None:
    """Read a file of weights: header by afa and by safetensors, then every small tensor."""
    file = place() / "model.safetensors"
    file.write_bytes(data)
    header = check_safetensors(file)
    with safe_open(file, framework="pt") as opened:
        if set(opened.keys()) != set(header.tensors):
            raise Finding("safetensors reads other tensors")
    for tensor in read_header(file).values():
        if tensor.num_bytes > _MAX_READ:
            raise Finding("a tensor larger than the file")
        tensor.read()
    with suppress(AfaError):  # most inputs are not a known model
        config_of(tensor_shapes(file), file)


@cache
def _model() -> Path:
    """Return a pipeline folder without weights."""
    return Path(shutil.copytree(config_folder("stable-diffusion-1.5"), place() / "folder"))


def model_config(data: bytes) -> None:
    """Read the `config.json` of a denoiser, check it, and describe the model."""
    folder = _model()
    (folder / "unet" / "config.json").write_bytes(data)
    check_folder(folder)
    describe(folder / "unet")


def model_index(data: bytes) -> None:
    """Read `model_index.json` and a component that it may name."""
    folder = _model()
    (folder / "model_index.json").write_bytes(data)
    (folder / "unet" / "config.json").write_text("{}")
    check_folder(folder)


def shards(data: bytes) -> None:
    """Read the index of a sharded model."""
    folder = place() / "shards"
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "Any"]}))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(data)
    check_folder(folder)
    for shard in read_json(index)["weight_map"].values():
        if (folder / "unet" / str(shard)).resolve().parent != (folder / "unet").resolve():
            raise Finding("a shard outside its folder")


def ensemble_config(data: bytes) -> None:
    """Read the `config.json` of an ensemble folder."""
    folder = place() / "ensemble"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    sources_in(read_config(folder), folder)


def recipes(data: bytes) -> None:
    """Read a recipe as every command does; its paths must stay in allowed folders."""
    file = place() / "recipe.yaml"
    file.write_bytes(data)
    errors = []
    for load in (load_recipe, load_evaluate_recipe, load_merge_recipe, load_search_recipe):
        read: Callable[[Path], object] = load
        try:
            read(file)
        except AfaError as error:
            errors.append(error)
    if len(errors) == 4:
        raise errors[0]


@cache
def _png() -> bytes:
    file = place() / "plain.png"
    Image.new("RGB", (1, 1)).save(file)
    return file.read_bytes()


def picture(data: bytes) -> None:
    """Read a PNG, or only the text chunk with its recipe."""
    file = place() / "picture.png"
    if data[:1] == b"\x89":
        file.write_bytes(data)
    else:
        from PIL import PngImagePlugin

        info = PngImagePlugin.PngInfo()
        info.add_itxt("afa", data.decode(errors="replace"))
        Image.new("RGB", (1, 1)).save(file, pnginfo=info)
    read_picture(file)


def captions(data: bytes) -> None:
    """Read the `metadata.jsonl` of a picture folder."""
    folder = place() / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(_png())
    (folder / "metadata.jsonl").write_bytes(data)
    images = FolderImages(folder)
    for index in range(min(len(images), 3)):
        if images.rows[index][0].resolve().parent != folder.resolve():
            raise Finding("a picture outside its folder")
        _ = images[index]


def bias(data: bytes) -> None:
    """Parse a bias from the command line."""
    parse_bias(data.decode(errors="surrogateescape").split("\n"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors_file,
    "model-config": model_config,
    "model-index": model_index,
    "shards": shards,
    "ensemble-config": ensemble_config,
    "recipes": recipes,
    "picture": picture,
    "captions": captions,
    "bias": bias,
}
