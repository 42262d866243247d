"""Weighted and long prompts as the text embeddings of a stock pipeline, by the library compel.

Compel (https://github.com/damian0815/compel) tokenizes and encodes a prompt in chunks of as many
tokens as CLIP reads (77), and weights words in the embeddings: above 1 away from the embedding of
the empty prompt, below 1 towards the prompt without these words. All of it is computed for each
feature alone, so that the joined embedding of an ensemble is that of every expert's own encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.sites import family_of
from afa.ensemble.prompt_syntax import read_weighted
from afa.ensemble.prompts import PromptEncoder
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.denoisers import PipelineKind
    from afa.ensemble.prompt_syntax import PromptSyntax, WeightedPrompt


def encode_prompt(
    pipeline: DiffusionPipeline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Encode weighted prompts of any length for a stock pipeline or an ensemble's pipeline.

    Args:
        pipeline: of Stable Diffusion 1.x, 2.x or XL; also with a picture or a ControlNet.
        prompt: B prompts, or one: `a (red:1.3) fox`, see `afa.ensemble.prompt_syntax`.
        negative_prompt: B negative prompts, or one for all. None is that of the pipeline's own
            call: the empty prompt, or zeros for Stable Diffusion XL.

    Returns: arguments of the pipeline's call, instead of its prompts: `prompt_embeds` and
        `negative_prompt_embeds` [B, L, D], and for Stable Diffusion XL the pooled ones [B, D']. L
        is a multiple of the tokens that the encoder reads. Shorter prompts are padded by the empty
        prompt, which changes their pictures: encode prompts of other lengths in calls of their own.
        Pooled embeddings are those of the words without weights, up to the encoder's limit.

    Raises:
        AfaError: if a prompt cannot be read, or the pipeline's prompts cannot be weighted.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives: list[str | None] = [negative_prompt] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if not prompts or len(prompts) != len(negatives):
        raise AfaError(
            "AFA-ENSEMBLE-077",
            f"There are {len(prompts)} prompts and {len(negatives)} negative prompts. Pass at "
            "least one prompt, and as many negative prompts, or one for all.",
        )
    encoders = _encoders_of(pipeline)
    texts = [read_weighted(each or "") for each in (*prompts, *negatives)]
    with torch.no_grad():
        parts = [encoder.embeddings(texts) for encoder in encoders]
        longest = max(each.shape[1] for own in parts for each in own)
        joined = torch.cat(
            [
                torch.cat([encoder.padded(each, longest) for each in own])
                for encoder, own in zip(encoders, parts, strict=True)
            ],
            -1,
        )
        found = {"prompt_embeds": joined}
        pooled = [encoder.pooled(texts) for encoder in encoders if encoder.is_pooled]
        if pooled:
            found["pooled_prompt_embeds"] = torch.cat(pooled, -1)
    has_zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
    zeros = [has_zeros and each is None for each in negatives]
    for name, both in list(found.items()):
        positive, negative = both.split(len(prompts))
        negative[zeros] = 0
        found |= {name: positive, f"negative_{name}": negative}
    return found


def prompt_call(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    negative_prompt: str,
    guidance: float,
    syntax: PromptSyntax,
) -> dict[str, Any]:
    """The arguments of a pipeline's call for prompts and classifier-free guidance.

    Args:
        pipeline: any pipeline.
        prompts: one prompt, or a list of them.
        negative_prompt: for all; empty for none.
        guidance: scale of classifier-free guidance; 1 means none.
        syntax: `weighted` encodes the prompts with `encode_prompt`.

    Raises:
        AfaError: see `encode_prompt`.
    """
    kind = kind_of_pipeline(pipeline)
    if syntax == "weighted":
        encoded = encode_prompt(pipeline, prompts, negative_prompt or None)
        return {**encoded, **kind.guide(guidance)}
    if isinstance(prompts, str):
        return {"prompt": prompts, **kind.guidance(guidance, negative_prompt)}
    # some pipelines change the list
    return {"prompt": list(prompts), **kind.guidance(guidance, negative_prompt, len(prompts))}


def of_equal_length(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative_prompt: str,
    syntax: PromptSyntax,
) -> list[list[int]]:
    """The indices of prompts that are encoded in one batch without changing each other.

    A longer prompt would pad the others; see `encode_prompt`.

    Raises:
        AfaError: see `encode_prompt`.
    """
    if syntax == "plain":
        return [list(range(len(prompts)))] if prompts else []
    encoders = _encoders_of(pipeline)
    others = max(encoder.num_tokens(read_weighted(negative_prompt)) for encoder in encoders)
    found: dict[int, list[int]] = {}
    for n, prompt in enumerate(prompts):
        read = read_weighted(prompt)
        own = max(encoder.num_tokens(read) for encoder in encoders)
        found.setdefault(max(own, others), []).append(n)
    return list(found.values())


def require_weighted(kind: PipelineKind, *, fuses_predictions: bool = False) -> None:
    """Require that the prompts of a kind of pipeline can be weighted.

    Args:
        kind: of the pipeline.
        fuses_predictions: whether the experts of an ensemble have text encoders of any kinds, whose
            conditions travel in the embedding of the first; see `afa.denoisers.packing`.

    Raises:
        AfaError: if they cannot.
    """
    if kind.clip_layer is None:
        raise AfaError(
            "AFA-ENSEMBLE-074",
            f"Prompts of {kind.name} pipelines cannot be weighted, because not all of their text "
            "encoders are those of CLIP. Use the prompt syntax plain.",
        )
    if fuses_predictions:
        raise AfaError(
            "AFA-ENSEMBLE-075",
            "Prompts cannot be weighted for experts whose predictions are fused, because each "
            "expert encodes the prompt in its own way. Use the prompt syntax plain.",
        )


def _kind_of(pipeline: Any) -> PipelineKind:
    """The kind of a pipeline; of other classes, such as with a ControlNet, by its text encoders."""
    try:
        return kind_of_pipeline(pipeline)
    except AfaError:
        parts = pipeline.components
        names = {
            name
            for name, part in parts.items()
            if part is not None and name.startswith("text_encoder")
        }
        for kind in family_of(denoiser_of(pipeline)).pipelines:
            if set(kind.text) == names:
                return kind
        raise


def fuses_predictions(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline's text encoder also holds the conditions of other experts."""
    return any(isinstance(part, PromptEncoder) for part in pipeline.components.values())


@dataclass(frozen=True)
class _Encoder:
    """One text encoder of a pipeline, as compel uses it; `is_pooled` if the pipeline pools it."""

    pipeline: Any
    compel: Any
    is_pooled: bool

    def embeddings(self, texts: Sequence[WeightedPrompt]) -> list[Tensor]:
        """The embeddings [1, L, D] of texts, each with its own L."""
        found = []
        for text in texts:
            try:
                found.append(self._embedding(text))
            except RuntimeError as error:
                if "token" not in str(error):  # memory, ...
                    raise
                raise AfaError(
                    "AFA-ENSEMBLE-076",
                    f"Compel cannot weight the prompt '{text.words[:80]}': {error}. Change the "
                    "words at the ends of its brackets, or use the prompt syntax plain.",
                ) from error
        return found

    def _embedding(self, text: WeightedPrompt) -> Tensor:
        from compel.prompt_parser import Conjunction, FlattenedPrompt, Fragment

        prompts = []
        for part in text.parts:
            fragments = [Fragment("", each.weight) for each in part]
            for fragment, each in zip(fragments, part, strict=True):
                fragment.text = self._converted(each.text)  # its constructor removes backslashes
            used = [fragment for fragment in fragments if fragment.text]
            prompts.append(FlattenedPrompt(used or [Fragment("")]))
        conditioning, _ = self.compel.build_conditioning_tensor_for_conjunction(
            Conjunction(prompts)
        )
        return conditioning

    def pooled(self, texts: Sequence[WeightedPrompt]) -> Tensor:
        """The pooled embeddings [B, D'] of the words without weights."""
        provider, device = self.compel.conditioning_provider, self.compel.device
        # compel itself would also encode its syntax: https://github.com/damian0815/compel/issues/96
        words = [self._converted(text.words) for text in texts]
        return torch.cat([provider.get_pooled_embeddings([each], device=device) for each in words])

    def padded(self, embedding: Tensor, length: int) -> Tensor:
        """An embedding [1, L, D] with chunks of the empty prompt up to a length."""
        empty = self.compel.conditioning_provider.empty_z.to(embedding)
        missing = (length - embedding.shape[1]) // empty.shape[1]
        return torch.cat([embedding, *[empty] * missing], 1)

    def num_tokens(self, text: WeightedPrompt) -> int:
        """The length L of the embedding of a text."""
        provider = self.compel.conditioning_provider
        return sum(
            len(
                provider.get_token_ids_and_expand_weights(
                    [self._converted(each.text) for each in part],
                    [each.weight for each in part],
                    device="cpu",
                )[0]
            )
            for part in text.parts
        )

    def _converted(self, text: str) -> str:
        """A text with all tokens of textual inversions that have several, as pipelines do."""
        tokenizer = self.compel.conditioning_provider.tokenizer
        converted: str = self.pipeline.maybe_convert_prompt(text, tokenizer)
        return converted if tokenizer.tokenize(converted) else ""


def _encoders_of(pipeline: Any) -> list[_Encoder]:
    """The text encoders of a pipeline whose prompts can be weighted."""
    kind = _kind_of(pipeline)
    parts = pipeline.components
    require_weighted(kind, fuses_predictions=fuses_predictions(pipeline))

    from compel import Compel
    from compel.embeddings_provider import ReturnedEmbeddingsType as Returned

    layer = {
        "last": Returned.LAST_HIDDEN_STATES_NORMALIZED,
        "penultimate": Returned.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    }[kind.clip_layer or "last"]
    found = []
    for name in kind.text:
        encoder, tokenizer = parts[name], parts[name.replace("text_encoder", "tokenizer")]
        if encoder is None:  # the refiner of Stable Diffusion XL has the second one only
            continue
        is_masked = bool(getattr(encoder.config, "use_attention_mask", False))
        compel = Compel(
            tokenizer,
            encoder,
            truncate_long_prompts=False,
            padding_attention_mask_value=0 if is_masked else 1,
            returned_embeddings_type=layer,
            device=pipeline._execution_device,
        )
        found.append(_Encoder(pipeline, compel, name in kind.pooled))
    return found
