"""AFA CLIP and AFA Text Encode: every expert's own embedding of a prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..errors import codes_shown
from ..folders import in_a_row
from ..texts import EnsembleClip
from .ensemble import MAX_EXPERTS


def _inputs() -> list[Any]:
    first = io.Clip.Input("clip_1", tooltip="The CLIP of the first expert.")
    others = range(2, MAX_EXPERTS + 1)
    return [first, *(io.Clip.Input(f"clip_{n}", optional=True) for n in others)]


def _joined(clips: dict[str, Any]) -> EnsembleClip:
    names = [f"clip_{n}" for n in range(1, MAX_EXPERTS + 1)]
    return EnsembleClip(in_a_row({name: clips.get(name) for name in names}))


class AfaClip(io.ComfyNode):
    """Join the CLIPs of all experts to one, for any node that encodes texts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaClip",
            display_name="AFA CLIP",
            category="afa",
            description="Joins the CLIPs of all experts, so that each encodes every prompt itself.",
            inputs=_inputs(),
            outputs=[io.Clip.Output()],
        )

    @classmethod
    @codes_shown()
    def execute(cls, **clips: Any) -> io.NodeOutput:
        """See ComfyUI."""
        return io.NodeOutput(_joined(clips))


class AfaTextEncode(io.ComfyNode):
    """Encode a prompt with the CLIP of every expert."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        text = io.String.Input("text", multiline=True, dynamic_prompts=True)
        return io.Schema(
            node_id="AfaTextEncode",
            display_name="AFA Text Encode",
            category="afa",
            description="Encodes a prompt with the CLIP of every expert of an ensemble.",
            inputs=[text, *_inputs()],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    @codes_shown()
    def execute(cls, text: str, **clips: Any) -> io.NodeOutput:
        """See ComfyUI."""
        clip = _joined(clips)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
