"""The extension that ComfyUI asks for its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes.ensemble import AfaEnsemble
from .nodes.load import AfaLoadEnsemble
from .nodes.merge import AfaMerge
from .nodes.recipe import AfaSaveRecipe
from .nodes.speed import AfaSpeed
from .nodes.steer import AfaSteer
from .nodes.text import AfaClip, AfaTextEncode
from .nodes.weights import AfaWeights


class AfaExtension(ComfyExtension):
    """All nodes of afa."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The classes of the nodes."""
        return [
            AfaEnsemble,
            AfaLoadEnsemble,
            AfaClip,
            AfaTextEncode,
            AfaSteer,
            AfaSpeed,
            AfaWeights,
            AfaMerge,
            AfaSaveRecipe,
        ]
