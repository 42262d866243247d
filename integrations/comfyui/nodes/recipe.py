"""AFA Save Recipe: PNGs that say which ensemble drew them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from afa.provenance import __version__

from ..ensemble import runner_of
from ..errors import codes_shown

if TYPE_CHECKING:
    from torch import Tensor

#: of the text chunk in a PNG
KEY = "afa_comfyui"


class AfaSaveRecipe(io.ComfyNode):
    """Save pictures with the ensemble's recipe beside ComfyUI's own prompt and workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaSaveRecipe",
            display_name="AFA Save Recipe",
            category="afa",
            description=(
                "Saves pictures as PNG, with the workflow and the ensemble's recipe in them: the "
                "hashes of experts and aggregators, steering and speed."
            ),
            inputs=[
                io.Image.Input("images"),
                io.Model.Input("model", tooltip="The MODEL that drew them."),
                io.String.Input("filename_prefix", default="afa"),
            ],
            is_output_node=True,
        )

    @classmethod
    @codes_shown()
    def execute(cls, images: Tensor, model: Any, filename_prefix: str) -> io.NodeOutput:
        """See ComfyUI."""
        # ComfyUI writes each entry as JSON beside its own prompt and workflow
        given = dict(cls.hidden.extra_pnginfo or {})
        cls.hidden.extra_pnginfo = {**given, KEY: recipe_of(model)}
        saved = ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls)
        return io.NodeOutput(ui=saved)


def recipe_of(model: Any) -> dict[str, Any]:
    """The recipe of an ensemble's MODEL, as a picture stores it.

    The experts are those of the training; `experts_are_checked` says whether the MODELs were
    compared with them, as AFA Load Ensemble does. `loras` says whether the first expert's weights
    are changed by LoRAs, its own or those after the ensemble; ComfyUI's workflow names them.

    Raises:
        AfaError: if the MODEL is not an ensemble.
    """
    runner = runner_of(model)
    experts = [
        {"name": each.name, "sha256": each.sha256} for each in runner.denoiser.provenance.experts
    ]
    recipe = {
        "format": "afa-comfyui",
        "version": 1,
        "afa": __version__,
        "experts": experts,
        "experts_are_checked": runner.origin.are_checked,
        "aggregators": runner.origin.aggregators,
        "loras": len(model.patches) > 0,
        **runner.settings.described(),
    }
    return json.loads(json.dumps(recipe))
