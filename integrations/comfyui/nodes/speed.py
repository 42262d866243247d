"""AFA Speed: the feature cache and pruning plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from afa.ensemble.caching.settings import PRESETS
from afa.errors import AfaError

from ..ensemble import with_settings
from ..errors import codes_shown
from ..folders import plans


class AfaSpeed(io.ComfyNode):
    """Make an ensemble faster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaSpeed",
            display_name="AFA Speed",
            category="afa",
            description=(
                "Reuses features of earlier steps (balanced, fast), or leaves experts out where a "
                "plan of `afa prune` says so. Both change the picture a little."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of an ensemble."),
                io.Combo.Input("preset", options=list(PRESETS), default="fast"),
                io.Combo.Input(
                    "plan",
                    options=["none", *plans()],
                    default="none",
                    optional=True,
                    tooltip="A file of `afa prune` in models/afa.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str, plan: str = "none", **_: Any) -> str:
        """Executed again if the plan changed."""
        file = plans().get(plan)
        return f"{preset} {file.read_text(encoding='utf-8') if file else plan}"

    @classmethod
    @codes_shown()
    def execute(cls, model: Any, preset: str, plan: str = "none") -> io.NodeOutput:
        """See ComfyUI."""
        file: Path | None = None
        if plan != "none" and (file := plans().get(plan)) is None:
            raise AfaError(
                "AFA-COMFY-025",
                f"No pruning plan '{plan}' is in models/afa. Copy the file of `afa prune` to "
                "there, and refresh the page.",
            )
        return io.NodeOutput(with_settings(model, preset=preset, plan=file))
