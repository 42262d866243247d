"""Find public weights locally or on the hub, and read them completely and without running code."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from afa.errors import AfaError
from afa.loading.sources import HUB_ERRORS, fetch, why_not_fetched
from afa.loading.trust.folders import check_part
from afa.loading.trust.pickles import PICKLES
from afa.loading.weights import check_safetensors, keep_no_words
from afa.machine.damaged import Unreadable, loading
from afa.policy import policy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

# patterns of files in a hub repository; * also matches a slash
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model-0*.safetensors",
    "model.safetensors.index.json",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
PROCESSOR_ADVICE = " Or set processor to another folder."


def is_pickle(file: str | Path) -> bool:
    """Whether the suffix of a file is that of a pickle, which can run code when it is read."""
    return Path(file).suffix.lower() in PICKLES


def describe(source: Source, processor: Source | None) -> str:
    """Name the weights and the processor, on which a network's features depend."""
    return source.name if processor is None else f"{source.name}, {processor.name}"


class Lacking(KeyError):
    """A tensor is missing in a state dictionary; the argument is its name."""


def shape_of(tensors: Mapping[str, Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor in a state dictionary, which determines sizes of a model.

    Raises:
        Lacking: if the tensor is missing.
        Unreadable: if it has another number of dimensions, or one of size zero.
    """
    if name not in tensors:
        raise Lacking(name)
    shape = tuple(tensors[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise Unreadable(
            f"'{name}' has the shape {shape}; it must have {num_dimensions} dimensions of size 1 "
            "or more"
        )
    return shape


@dataclass(frozen=True)
class Source:
    """Weights named by a recipe, their purpose, and the name of the public ones."""

    what: str  # subject of error messages, such as "The weights of 'clip_t'"
    name: str  # a local path or a hub id
    public: str

    def locate(self, files: Sequence[str]) -> Path:
        """Find the local folder or file; downloads `files` of a hub id to the hub's cache.

        Raises:
            AfaError: if it does not exist, or the hub cannot be reached.
        """
        path = Path(self.name).expanduser()
        if path.exists():
            return path
        is_hub_id = self.name.count("/") == 1 and not self.name.startswith((".", "/", "~"))
        if not is_hub_id or path.suffix == ".safetensors" or is_pickle(path):
            raise AfaError(
                "AFA-METRIC-017",
                f"{self.what} must be a local path or a hub id; '{self.name}' does not exist. "
                f"Public ones: {self.public}.",
            )
        try:
            return fetch(self.name, files)
        except HUB_ERRORS as error:
            raise AfaError(
                "AFA-METRIC-018",
                f"{self.what} must be a local path or a hub id; '{self.name}' is not a path and "
                f"cannot be downloaded from the hub ({why_not_fetched(error)}). Check the name and "
                f"the network. Public ones: {self.public}.",
            ) from error

    def file(self, names: Sequence[str], *, beside: Sequence[str] = ()) -> Path:
        """Find the file of these weights: the path itself, or the first of `names` in the folder.

        Args:
            names: file names in a folder or hub repository, in order of preference.
            beside: other files of the repository to download.

        Raises:
            AfaError: if it does not exist, or it is a pickle and the user has not allowed pickles.
        """
        allow_pickle = policy().allow_pickle
        wanted = [name for name in names if allow_pickle or not is_pickle(name)]
        path = self.locate([*wanted, *beside])
        if path.is_dir():
            is_refused = wanted != list(names)
            advice = " To read a pickle, pass --allow-pickle." if is_refused else ""
            path = self.part(path, wanted or names, advice)
        if is_pickle(path) and not allow_pickle:
            raise AfaError(
                "AFA-METRIC-019",
                f"{self.what} must be safetensors; '{self.name}' is a pickle, which can run code "
                "when it is opened. Get a .safetensors file, or pass --allow-pickle to read only "
                "its tensors.",
            )
        return path

    def part(self, folder: Path, names: Sequence[str], advice: str = "") -> Path:
        """Find the first of `names` in a folder of these weights.

        Raises:
            AfaError: if there is none; the message ends with `advice`.
        """
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise AfaError(
                "AFA-METRIC-020",
                f"{self.what} must be a folder with {' or '.join(names)}; '{self.name}' has none. "
                f"Public ones: {self.public}.{advice}",
            )
        return found

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """Read the state dictionary of a file to the CPU, without running code of a pickle.

        Raises:
            AfaError: if the file is damaged or contains something else.
        """
        if not is_pickle(file):
            check_safetensors(file)
            return load_file(file)
        with self.loading():
            content = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(content, dict):
                content = content.get("state_dict", content)
            if not isinstance(content, dict):
                raise Unreadable(f"it contains a {type(content).__name__}, not a state dictionary")
            return {
                key: t
                for key, t in content.items()
                if isinstance(key, str) and isinstance(t, torch.Tensor)
            }

    def loading(self) -> AbstractContextManager[None]:
        """Convert errors of libraries about damaged or incomplete weights to AfaError."""
        return loading(
            f"{self.what} in '{self.name}' must be complete",
            f"Download them again. Public ones: {self.public}.",
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Like `loading`; also converts `Lacking`."""
        with self.loading():
            try:
                yield
            except Lacking as error:
                raise self._lacks([str(error.args[0])]) from error

    def _lacks(self, missing: Sequence[str]) -> AfaError:
        return AfaError(
            "AFA-METRIC-021",
            f"{self.what} must be complete; '{self.name}' lacks {len(missing)} tensors (first: "
            f"{missing[0]}). Download them again. Public ones: {self.public}.",
        )

    def model(self, model_class: Any, folder: Path | None = None, **options: Any) -> Any:
        """Load a frozen float32 model of transformers without randomly initialized weights.

        Args:
            model_class: class with `from_pretrained`.
            folder: folder of its safetensors; None if `options` has `config` and `state_dict`.
            options: options of `from_pretrained`.

        Raises:
            AfaError: if safetensors are missing, damaged or incomplete.
        """
        if folder is not None:
            check_part(folder)
            files = sorted(folder.glob("model*.safetensors"))
            if not files:
                raise AfaError(
                    "AFA-METRIC-022",
                    f"{self.what} must be a folder with model.safetensors; '{self.name}' has none. "
                    f"Public ones: {self.public}.",
                )
            for file in files:
                check_safetensors(file)
        with self.loading():
            model, info = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                **options,
            )
        if info["missing_keys"]:
            raise self._lacks(sorted(info["missing_keys"]))
        return model.eval().requires_grad_(False)

    def tokenizer(self, tokenizer_class: Any, folder: Path, *, num_embeddings: int) -> Any:
        """Load a tokenizer of transformers from its folder.

        Raises:
            AfaError: if there is none, or it has more tokens than the model.
        """
        self.part(folder, _TOKENIZER_FILES, PROCESSOR_ADVICE)
        check_part(folder)
        with self.loading():
            tokenizer = keep_no_words(tokenizer_class.from_pretrained(folder))
        if len(tokenizer) > num_embeddings:
            raise AfaError(
                "AFA-METRIC-023",
                f"{self.what} must have a tokenizer of the model's {num_embeddings} tokens; that "
                f"in '{self.name}' has {len(tokenizer)}. Public ones: {self.public}.",
            )
        return tokenizer
