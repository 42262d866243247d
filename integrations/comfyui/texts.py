"""The text encoders of several experts as one CLIP, whose texts hold every expert's own embedding.

Embeddings are joined along the feature axis, [B, L, N * D], and so are pooled embeddings. ComfyUI's
nodes for conditions combine, average, mask and schedule them like those of one model. The ensemble
splits them; a ControlNet gets those of the first expert (see `controls`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class EnsembleClip:
    """Several CLIPs, called as one by ComfyUI's nodes.

    Args:
        clips: the experts' CLIPs, in their order; they have one architecture and tokenizer.

    Raises:
        AfaError: if the architectures differ.
    """

    def __init__(self, clips: Sequence[Any]) -> None:
        kinds = {type(clip.cond_stage_model).__name__ for clip in clips}
        if len(kinds) > 1:
            raise AfaError(
                "AFA-COMFY-013",
                f"The CLIPs must have one architecture; got {', '.join(sorted(kinds))}. Connect "
                "the CLIP of each expert.",
            )
        self.clips = list(clips)

    # -- what ComfyUI's nodes call --------------------------------------------------------------

    @property
    def cond_stage_model(self) -> Any:
        """The first text encoder, for the names of LoRAs."""
        return self.clips[0].cond_stage_model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which all experts share."""
        return self.clips[0].tokenizer

    @property
    def patcher(self) -> Any:
        """Refused, because there is one for each expert.

        Raises:
            AfaError: always.
        """
        raise AfaError(
            "AFA-COMFY-014",
            "A CLIP of several experts cannot be saved, merged or given hooks. Do so with the CLIP "
            "of each expert, before AFA CLIP.",
        )

    def clone(self) -> EnsembleClip:
        """A copy, whose patches are its own."""
        return EnsembleClip([clip.clone() for clip in self.clips])

    def get_ram_usage(self) -> int:
        """The bytes of all text encoders."""
        return sum(clip.get_ram_usage() for clip in self.clips)

    def add_patches(self, patches: Any, *strengths: float) -> Any:
        """Add a LoRA to all text encoders; returns the names that fit."""
        names = [clip.add_patches(patches, *strengths) for clip in self.clips]
        return names[0]

    def clip_layer(self, layer_idx: int) -> None:
        """Use the output of another layer, in all text encoders."""
        for clip in self.clips:
            clip.clip_layer(layer_idx)

    def set_tokenizer_option(self, option_name: str, value: Any) -> None:
        """Set an option of the tokenizers."""
        for clip in self.clips:
            clip.set_tokenizer_option(option_name, value)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """The tokens of a text, for all experts."""
        return self.clips[0].tokenize(text, *args, **kwargs)

    def encode_from_tokens(
        self, tokens: Any, return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """The joined embeddings [B, L, N * D] of tokens; see `comfy.sd.CLIP`."""
        found = [clip.encode_from_tokens(tokens, return_pooled, True) for clip in self.clips]
        joined = join([[each.pop("cond"), each]] for each in found)
        cond, pooled = joined[0]
        if return_dict:
            return {"cond": cond, **pooled}
        return (cond, pooled["pooled_output"]) if return_pooled else cond

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        """Conditions with the joined embeddings of tokens; see `comfy.sd.CLIP`."""
        return join(c.encode_from_tokens_scheduled(tokens, *args, **kwargs) for c in self.clips)

    def encode(self, text: str) -> Tensor:
        """The joined embeddings [B, L, N * D] of a text."""
        embeddings: Tensor = self.encode_from_tokens(self.tokenize(text))
        return embeddings


def join(conditions: Any) -> list[list[Any]]:
    """Join the conditions of N experts for one prompt.

    Args:
        conditions: by expert, ComfyUI's CONDITIONING: pairs of an embedding [B, L, D] and further
            entries, such as the pooled embedding [B, D'].

    Returns: CONDITIONING with embeddings [B, L, N * D] and pooled embeddings [B, N * D'].

    Raises:
        AfaError: if the experts' conditions differ in number or length.
    """
    listed = [list(each) for each in conditions]
    if len({len(each) for each in listed}) > 1:
        raise AfaError(
            "AFA-COMFY-015",
            "The experts' conditions have different schedules, so they cannot be joined. Use the "
            "same hooks for the CLIP of each expert.",
        )
    return [_joined(together) for together in zip(*listed, strict=True)]


def _joined(together: Sequence[Sequence[Any]]) -> list[Any]:
    texts, entries = [each[0] for each in together], [each[1] for each in together]
    if len({text.shape[1] for text in texts}) > 1:
        raise AfaError(
            "AFA-COMFY-016",
            f"The experts' embeddings have {', '.join(str(t.shape[1]) for t in texts)} tokens; "
            "they must have equally many. Use the CLIPs of one kind of model.",
        )
    first: Mapping[str, Any] = entries[0]
    found = dict(first)
    pooled = [each.get("pooled_output") for each in entries]
    if all(each is not None for each in pooled):
        found["pooled_output"] = torch.cat(pooled, dim=-1)
    return [torch.cat(texts, dim=-1), found]
