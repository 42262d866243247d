"""Public weights: found locally or on the hub, read without running code, complete or refused."""

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

# of a hub repository; * in these patterns matches a slash as well
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
PROCESSOR_ADVICE = " Or name another folder as processor."


def is_pickle(file: str | Path) -> bool:
    """Whether a file's name says that reading it can run code."""
    return Path(file).suffix.lower() in PICKLES


def describe(source: Source, processor: Source | None) -> str:
    """What a network's features depend on, for its name."""
    return source.name if processor is None else f"{source.name}, {processor.name}"


class Lacking(KeyError):
    """Names a tensor that a state dictionary lacks."""


def shape_of(tensors: Mapping[str, Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor in a state dictionary, from which a model's sizes are read.

    Raises:
        Lacking: there is no such tensor.
        Unreadable: it has another number of dimensions, or one of length zero.
    """
    if name not in tensors:
        raise Lacking(name)
    shape = tuple(tensors[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise Unreadable(
            f"'{name}' has the shape {shape}; it must have {num_dimensions} dimensions, none of "
            "them empty"
        )
    return shape


@dataclass(frozen=True)
class Source:
    """Weights as a recipe names them, what they are for, and where the public ones are."""

    what: str  # starts a message: "The weights of 'clip_t'"
    name: str  # a local path or a hub id
    public: str

    def locate(self, files: Sequence[str]) -> Path:
        """The local folder or file; of a hub id, `files` are downloaded into the hub's cache.

        Raises:
            AfaError: nothing is there, or the hub cannot be reached.
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
                f"{self.what} must be a local path or a hub id; '{self.name}' is no path, and "
                f"could not be fetched from the hub ({why_not_fetched(error)}). Check name and "
                f"network. Public ones: {self.public}.",
            ) from error

    def file(self, names: Sequence[str], *, beside: Sequence[str] = ()) -> Path:
        """The one file of these weights: itself, or the first of `names` in the folder.

        Args:
            names: of the file in a folder or hub repository, the preferred one first.
            beside: what else of the repository is needed.

        Raises:
            AfaError: it is not there, or it is a pickle and the user has not allowed any.
        """
        allow_pickle = policy().allow_pickle
        wanted = [name for name in names if allow_pickle or not is_pickle(name)]
        path = self.locate([*wanted, *beside])
        if path.is_dir():
            is_refused = wanted != list(names)
            advice = " They are a pickle, which --allow-pickle reads." if is_refused else ""
            path = self.part(path, wanted or names, advice)
        if is_pickle(path) and not allow_pickle:
            raise AfaError(
                "AFA-METRIC-019",
                f"{self.what} must be safetensors; '{self.name}' is a pickle, which can run code "
                "when it is opened. Get a .safetensors file, or read its tensors alone: "
                "--allow-pickle.",
            )
        return path

    def part(self, folder: Path, names: Sequence[str], advice: str = "") -> Path:
        """The first of `names` that is in a folder of these weights.

        Raises:
            AfaError: none is; ends in `advice`.
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
        """The state dictionary in a file, on the CPU; a pickle's code is not run.

        Raises:
            AfaError: the file is damaged or holds something else.
        """
        if not is_pickle(file):
            check_safetensors(file)
            return load_file(file)
        with self.loading():
            content = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(content, dict):
                content = content.get("state_dict", content)
            if not isinstance(content, dict):
                raise Unreadable(f"it holds a {type(content).__name__} in place of tensors by name")
            return {
                key: t
                for key, t in content.items()
                if isinstance(key, str) and isinstance(t, torch.Tensor)
            }

    def loading(self) -> AbstractContextManager[None]:
        """Turn whatever a library says of damaged or incomplete weights into one line."""
        return loading(
            f"{self.what} must be complete in '{self.name}'",
            f"Download them again. Public ones: {self.public}.",
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """As `loading`, where `Lacking` names a tensor that a state dictionary lacks."""
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
        """A float32 model of transformers, frozen; refused where it would be filled with noise.

        Args:
            model_class: that has `from_pretrained`.
            folder: with its safetensors; None where `options` has `config` and `state_dict`.
            options: for `from_pretrained`.

        Raises:
            AfaError: no safetensors, or damaged or incomplete ones.
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
        """A tokenizer of transformers from its folder.

        Raises:
            AfaError: there is none, or it has more tokens than the model embeds.
        """
        self.part(folder, _TOKENIZER_FILES, PROCESSOR_ADVICE)
        check_part(folder)
        with self.loading():
            tokenizer = keep_no_words(tokenizer_class.from_pretrained(folder))
        if len(tokenizer) > num_embeddings:
            raise AfaError(
                "AFA-METRIC-023",
                f"{self.what} must be a tokenizer of the model's {num_embeddings} tokens; that in "
                f"'{self.name}' has {len(tokenizer)}. Public ones: {self.public}.",
            )
        return tokenizer
