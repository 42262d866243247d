"""The extension that ComfyUI asks for its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes.ensemble import AfaEnsemble


class AfaExtension(ComfyExtension):
    """All nodes of afa."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The classes of the nodes."""
        return [AfaEnsemble]
