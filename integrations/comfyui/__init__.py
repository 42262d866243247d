"""Ensembles of afa as nodes for ComfyUI: MODELs in, a MODEL out.

ComfyUI loads this folder from `custom_nodes` and calls `comfy_entrypoint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """The extension with all nodes."""
    from .extension import AfaExtension
    from .folders import register_folder

    register_folder()
    return AfaExtension()
