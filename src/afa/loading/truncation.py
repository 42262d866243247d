"""Truncated prompts: the part of a text beyond the token limits of the text encoders.

CLIP reads 77 tokens, T5 and Qwen as many as the pipeline sets (256 in Stable Diffusion 3, 512 in
Flux, FLUX.2, Chroma, Z-Image and Qwen-Image, 120 or 300 in PixArt). The pipelines truncate
longer texts; this module only counts and reports it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of, kind_of, kind_of_pipeline
from afa.denoisers.predictor import Predictor
from afa.ensemble.prompt_syntax import weights_in, words_of_prompt
from afa.ensemble.weighted_prompts import fuses_predictions, require_weighted
from afa.files import parts_of, read_json
from afa.loading.components import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from afa.denoisers import PipelineKind
    from afa.ensemble.prompt_syntax import PromptSyntax

#: tokenizers without a limit have a model_max_length of at least this
_NO_LIMIT = 1_000_000
_CHUNK = 1000  # texts that are tokenized at once
_SHOWN = 60  # displayed characters of the truncated part
_WEIGHTED = (
    "--prompt-syntax weighted (in a recipe, prompt_syntax: weighted; in the app, below More)"
)


@dataclass(frozen=True)
class TextLimit:
    """The token limit of one or several equal text encoders.

    Attributes:
        names: of the tokenizers in the pipeline.
        tokenizer: of the library.
        num_tokens: the limit, including begin and end tokens.
        prepare: the pipeline's preprocessing of texts.
    """

    names: tuple[str, ...]
    tokenizer: Any
    num_tokens: int
    prepare: Callable[[str], str] = str

    def count(self, texts: Iterable[str]) -> list[int]:
        """Count the tokens of each text, without truncation."""
        prepared = [self._prepared(text) for text in texts]
        chunks = (prepared[n : n + _CHUNK] for n in range(0, len(prepared), _CHUNK))
        return [len(ids) for chunk in chunks for ids in self._tokens(chunk)["input_ids"]]

    def unread(self, text: str) -> str:
        """Return the truncated end of a text; empty if it is read completely."""
        if self.count([text])[0] <= self.num_tokens:
            return ""
        text = self._prepared(text)
        # CLIP and T5 keep the end token of a truncated text; Qwen has none
        kept = self.num_tokens - bool(self.tokenizer.num_special_tokens_to_add())
        if self.tokenizer.is_fast:
            start, _ = self._tokens([text], return_offsets_mapping=True)["offset_mapping"][0][kept]
            return text[start:].strip()
        ids = self._tokens([text])["input_ids"][0]
        return self.tokenizer.decode(ids[kept:], skip_special_tokens=True).strip()

    def _prepared(self, text: str) -> str:
        """The prepared text, without what the preprocessing adds after it."""
        return self.prepare(text).removesuffix(self.prepare("x").partition("x")[2])

    def _tokens(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, truncation=False, padding=False, verbose=False, **options)


def limits_of(pipeline: Any) -> list[TextLimit]:
    """Return the token limits of a pipeline, or of an ensemble's pipeline.

    In an ensemble of predictions, each expert has text encoders of its own.
    """
    found = _limits_of_pipeline(pipeline)
    for expert in getattr(denoiser_of(pipeline), "experts", ()):
        if isinstance(expert, Predictor) and expert.pipeline is not None:
            for limit in _limits_of_pipeline(expert.pipeline):
                names = tuple(f"{expert.kind.name}'s {name}" for name in limit.names)
                found.append(replace(limit, names=names))
    return found


def _limits_of_pipeline(pipeline: Any) -> list[TextLimit]:
    parts = pipeline.components
    encoders = {
        name: parts.get(name.replace("tokenizer", "text_encoder"))
        for name, part in parts.items()
        if name.startswith("tokenizer") and part is not None
    }
    tokenizers = {name: parts[name] for name, encoder in encoders.items() if encoder is not None}
    set_by_call = {
        name for name in tokenizers if not encoders[name].config.model_type.startswith("clip")
    }
    return _limits(type(pipeline), tokenizers, set_by_call)


def limits_of_folder(folder: Path) -> tuple[list[TextLimit], PipelineKind]:
    """Return the token limits of a pipeline folder, without reading weights, and its kind.

    Raises:
        AfaError: if it is incomplete or of an unknown kind.
    """
    index = read_json(folder / "model_index.json")
    class_name, classes = str(index.get("_class_name")), parts_of(index)
    kind = kind_of(class_name, folder)
    tokenizers, set_by_call = {}, set()
    for encoder in [name for name in classes if name.startswith("text_encoder")]:
        name = encoder.replace("text_encoder", "tokenizer")
        if name not in classes or not (folder / name).is_dir():
            continue
        tokenizers[name] = load_tokenizer(folder / name, classes[name])
        if not classes[encoder].startswith("CLIP"):
            set_by_call.add(name)
    return _limits(kind.pipeline_class(class_name), tokenizers, set_by_call), kind


def _limits(
    pipeline_class: type, tokenizers: Mapping[str, Any], set_by_call: set[str]
) -> list[TextLimit]:
    """Return the limits; those of `set_by_call` are the call's `max_sequence_length`."""
    kind = kind_of(pipeline_class.__name__, pipeline_class.__name__)
    taken = inspect.signature(pipeline_class.__call__).parameters.get("max_sequence_length")
    found: dict[tuple[str, int], TextLimit] = {}
    for name, tokenizer in sorted(tokenizers.items()):
        limit = tokenizer.model_max_length
        if name in set_by_call and taken is not None:
            limit = kind.call.get("max_sequence_length", taken.default)
        elif kind.shares_length and "tokenizer" in tokenizers:
            limit = tokenizers["tokenizer"].model_max_length  # their `tokenizer_max_length`
        if limit >= _NO_LIMIT:
            continue
        # equal ones, such as both of Stable Diffusion XL, are reported together
        same = (str(sorted(tokenizer.get_vocab().items())), limit)
        names = (*(found[same].names if same in found else ()), name)
        found[same] = TextLimit(names, tokenizer, limit, kind.prepare)
    return list(found.values())


@dataclass(frozen=True)
class Cuts:
    """The number of texts that a text encoder truncates.

    Attributes:
        limit: of the encoder.
        num_texts: number of checked texts.
        num_cut: number of texts beyond the limit.
        most: number of tokens of the longest.
        example: the first text beyond the limit.
    """

    limit: TextLimit
    num_texts: int
    num_cut: int
    most: int
    example: str

    def line(self, what: str, plural: str) -> str:
        """Describe the truncation in one line for the user.

        Args:
            what: one text, such as `prompt`.
            plural: several, such as `prompts`.
        """
        limit = f"the limit of {self.limit.num_tokens} ({' and '.join(self.limit.names)})"
        unread = self.limit.unread(self.example)
        shown = f"{unread[:_SHOWN]}..." if len(unread) > _SHOWN else unread
        if self.num_texts == 1:
            return (
                f"The {what} has {self.most} tokens and is truncated to {limit}, from '{shown}' "
                "on. Shorten it, or put important words first."
            )
        return (
            f"{self.num_cut} of {self.num_texts} {plural} have up to {self.most} tokens and are "
            f"truncated to {limit}, the first of them from '{shown}' on. Shorten them, or put "
            "important words first."
        )


def cuts_of(limits: Sequence[TextLimit], texts: Iterable[str]) -> list[Cuts]:
    """Return the truncations of texts, one entry for each encoder that truncates some."""
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
    syntax: PromptSyntax | None = None,
) -> list[str]:
    """Return warnings about prompts before pictures are drawn, one line each.

    Args:
        guidance: scale of classifier-free guidance; without it the negative prompt has no effect.
        kind: of the pipeline, which may not support negative prompts; None: it does.
        syntax: of the prompts; None if the user cannot choose it.

    Raises:
        AfaError: if the prompts are weighted and cannot be read.
    """
    if syntax == "weighted":
        for text in (*prompts, negative_prompt):
            words_of_prompt(text, syntax)
        limits = []  # they are encoded in chunks
    can_weight = syntax is not None and (kind is None or kind.clip_layer is not None)
    longer = f" Or pass {_WEIGHTED}, which reads longer prompts." if can_weight else ""
    lines = [cut.line("prompt", "prompts") + longer for cut in cuts_of(limits, prompts)]
    if syntax != "weighted":
        lines += _weights_as_words([*prompts, negative_prompt], can_weight=can_weight)
    if not negative_prompt:
        return lines
    if kind is not None and not kind.takes_negative:
        return [*lines, f"The negative prompt is ignored: {kind.name} pipelines do not use one."]
    if guidance is not None and guidance <= 1:
        return [
            *lines,
            f"The negative prompt is ignored because guidance is {guidance:g}; it must be above 1.",
        ]
    cut = cuts_of(limits, [negative_prompt])
    return lines + [each.line("negative prompt", "negative prompts") + longer for each in cut]


def _weights_as_words(texts: Sequence[str], *, can_weight: bool) -> list[str]:
    """A warning if plain prompts have brackets that look like weights."""
    example = next(filter(None, map(weights_in, texts)), None)
    if example is None:
        return []
    line = f"'{example}' is drawn as words, because the prompt is plain text."
    return [f"{line} For weights, pass {_WEIGHTED}." if can_weight else line]


def warnings_for(
    pipeline: Any,
    prompts: Sequence[str],
    negative_prompt: str = "",
    guidance: float | None = None,
    syntax: PromptSyntax | None = None,
) -> list[str]:
    """Return the warnings about prompts for a loaded pipeline; see `prompt_warnings`.

    Raises:
        AfaError: if the prompts are weighted, and cannot be read or encoded by this pipeline.
    """
    kind, fuses = kind_of_pipeline(pipeline), fuses_predictions(pipeline)
    if syntax == "weighted":
        require_weighted(kind, fuses_predictions=fuses)
    elif fuses:
        syntax = None
    found = prompt_warnings(
        limits_of(pipeline), prompts, negative_prompt, guidance=guidance, kind=kind, syntax=syntax
    )
    drafter = getattr(denoiser_of(pipeline), "drafter", None)
    if syntax == "weighted" and drafter is not None:
        words = [words_of_prompt(prompt, syntax) for prompt in prompts]
        cuts = cuts_of(limits_of(drafter.judge), words)
        found += [f"For the judge of drafts: {cut.line('prompt', 'prompts')}" for cut in cuts]
    return found
