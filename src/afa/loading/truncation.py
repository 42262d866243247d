"""What of a text the text encoders do not read, since every one has a greatest number of tokens.

CLIP reads 77 tokens, T5 as many as the pipeline asks for (256 in Stable Diffusion 3, 512 in Flux,
120 or 300 in PixArt). Tokens beyond are cut off by the pipelines; nothing here changes that, it is
only counted and said.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers

from afa.denoisers.kinds import kind_of, kind_of_pipeline
from afa.files import parts_of, read_json
from afa.loading.weights import keep_no_words
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from afa.denoisers import PipelineKind

#: a tokenizer without a limit of its own says so by a number of this size
_NO_LIMIT = 1_000_000
_CHUNK = 1000  # texts that are tokenized at once
_SHOWN = 60  # characters of what is not read


@dataclass(frozen=True)
class TextLimit:
    """How many tokens a text encoder reads.

    Attributes:
        names: of the tokenizers among a pipeline's parts.
        tokenizer: of the library.
        num_tokens: that are read, marks of beginning and end included.
        prepare: what the pipeline does to a text before.
    """

    names: tuple[str, ...]
    tokenizer: Any
    num_tokens: int
    prepare: Callable[[str], str] = str

    def count(self, texts: Iterable[str]) -> list[int]:
        """The number of tokens of each text, were nothing cut."""
        prepared = [self.prepare(text) for text in texts]
        chunks = (prepared[n : n + _CHUNK] for n in range(0, len(prepared), _CHUNK))
        return [len(ids) for chunk in chunks for ids in self._tokens(chunk)["input_ids"]]

    def unread(self, text: str) -> str:
        """The end of a text, which is not read; empty where all is."""
        text = self.prepare(text)
        kept = self.num_tokens - 1  # the last one is the mark of the end
        if self.count([text])[0] <= self.num_tokens:
            return ""
        if self.tokenizer.is_fast:
            start, _ = self._tokens([text], return_offsets_mapping=True)["offset_mapping"][0][kept]
            return text[start:].strip()
        ids = self._tokens([text])["input_ids"][0]
        return self.tokenizer.decode(ids[kept:], skip_special_tokens=True).strip()

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, truncation=False, padding=False, verbose=False, **options)


def limits_of(pipeline: Any) -> list[TextLimit]:
    """Those of a pipeline's text encoders; of an ensemble's, whose experts share a tokenizer."""
    parts = pipeline.components
    encoders = {
        name: parts.get(name.replace("tokenizer", "text_encoder"))
        for name, part in parts.items()
        if name.startswith("tokenizer") and part is not None
    }
    tokenizers = {name: parts[name] for name, encoder in encoders.items() if encoder is not None}
    are_t5 = {name for name in tokenizers if encoders[name].config.model_type == "t5"}
    return _limits(type(pipeline), tokenizers, are_t5)


def limits_of_folder(folder: Path) -> tuple[list[TextLimit], PipelineKind]:
    """Those of a pipeline's folder, whose weights are not read, and its kind.

    Raises:
        AfaError: it is incomplete or of no known kind.
    """
    index = read_json(folder / "model_index.json")
    class_name, classes = str(index.get("_class_name")), parts_of(index)
    kind = kind_of(class_name, folder)
    tokenizers, are_t5 = {}, set()
    for encoder in [name for name in classes if name.startswith("text_encoder")]:
        name = encoder.replace("text_encoder", "tokenizer")
        if name not in classes or not (folder / name).is_dir():
            continue
        found: Any = library_class(
            transformers, classes[name], transformers.PreTrainedTokenizerBase
        )
        tokenizers[name] = keep_no_words(found.from_pretrained(folder / name))
        if classes[encoder].startswith("T5"):
            are_t5.add(name)
    return _limits(kind.pipeline_class(class_name), tokenizers, are_t5), kind


def _limits(
    pipeline_class: type, tokenizers: Mapping[str, Any], are_t5: set[str]
) -> list[TextLimit]:
    kind = kind_of(pipeline_class.__name__, pipeline_class.__name__)
    taken = inspect.signature(pipeline_class.__call__).parameters.get("max_sequence_length")
    found: dict[tuple[str, int], TextLimit] = {}
    for name, tokenizer in sorted(tokenizers.items()):
        limit = tokenizer.model_max_length
        if name in are_t5 and taken is not None:
            limit = kind.call.get("max_sequence_length", taken.default)
        elif kind.shares_length and "tokenizer" in tokenizers:
            limit = tokenizers["tokenizer"].model_max_length  # their `tokenizer_max_length`
        if limit >= _NO_LIMIT:
            continue
        # equal ones, such as both of Stable Diffusion XL, are spoken of as one
        same = (str(sorted(tokenizer.get_vocab().items())), limit)
        names = (*(found[same].names if same in found else ()), name)
        found[same] = TextLimit(names, tokenizer, limit, kind.prepare)
    return list(found.values())


@dataclass(frozen=True)
class Cuts:
    """How many of some texts are longer than one text encoder reads.

    Attributes:
        limit: of the encoder.
        num_texts: how many were looked at.
        num_cut: how many are longer.
        most: the tokens of the longest.
        example: the first that is longer.
    """

    limit: TextLimit
    num_texts: int
    num_cut: int
    most: int
    example: str

    def line(self, what: str, plural: str) -> str:
        """One line for the user.

        Args:
            what: one text, as `prompt`.
            plural: several, as `prompts`.
        """
        reads = "reads" if len(self.limit.names) == 1 else "read"
        readers = f"{' and '.join(self.limit.names)} {reads}"
        unread = self.limit.unread(self.example)
        shown = f"{unread[:_SHOWN]}..." if len(unread) > _SHOWN else unread
        remedy = "Shorten it, or put what matters first."
        if self.num_texts == 1:
            return (
                f"The {what} has {self.most} tokens, and {readers} {self.limit.num_tokens}: "
                f"what follows from '{shown}' on is cut off. {remedy}"
            )
        return (
            f"{self.num_cut} of {self.num_texts} {plural} are longer than the "
            f"{self.limit.num_tokens} tokens that {readers}; the longest has {self.most}. What "
            f"is beyond is cut off, in the first of them from '{shown}' on. "
            f"{remedy.replace('it', 'them', 1)}"
        )


def cuts_of(limits: Sequence[TextLimit], texts: Iterable[str]) -> list[Cuts]:
    """What is cut of some texts, one entry for each encoder that does not read all of them."""
    different = list(texts)
    found = []
    for limit in limits:
        counts = limit.count(different)
        longer = [n for n, count in enumerate(counts) if count > limit.num_tokens]
        if longer:
            example = different[longer[0]]
            found.append(Cuts(limit, len(different), len(longer), max(counts), example))
    return found


def prompt_warnings(
    limits: Sequence[TextLimit],
    prompts: Sequence[str],
    negative_prompt: str = "",
    *,
    guidance: float | None = None,
    kind: PipelineKind | None = None,
) -> list[str]:
    """What a user should know of prompts before pictures are drawn, one line each.

    Args:
        limits: see `limits_of`.
        prompts: all of them.
        negative_prompt: of all of them.
        guidance: scale of classifier-free guidance, without which there is no negative prompt.
        kind: of the pipeline, which may read no negative prompt; None is one that reads it.
    """
    lines = [cut.line("prompt", "prompts") for cut in cuts_of(limits, prompts)]
    if not negative_prompt:
        return lines
    if kind is not None and not kind.takes_negative:
        said = f"The negative prompt is not used: the pipelines of {kind.name} take none beside"
        return [*lines, f"{said} `guidance`."]
    if guidance is not None and guidance <= 1:
        return [
            *lines,
            f"The negative prompt is not used, since guidance is {guidance:g}; it must be above 1.",
        ]
    cut = cuts_of(limits, [negative_prompt])
    return lines + [each.line("negative prompt", "negative prompts") for each in cut]


def warnings_for(
    pipeline: Any, prompts: Sequence[str], negative_prompt: str = "", guidance: float | None = None
) -> list[str]:
    """The same of a pipeline that is loaded."""
    return prompt_warnings(
        limits_of(pipeline),
        prompts,
        negative_prompt,
        guidance=guidance,
        kind=kind_of_pipeline(pipeline),
    )
