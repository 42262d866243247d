"""AFA Steer: a bias towards or against an expert."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from afa.ensemble.steering import STAGES

from ..ensemble import runner_of, with_settings
from ..errors import codes_shown

_ALL = "all"
_LARGEST = 10.0


class AfaSteer(io.ComfyNode):
    """Add a bias to the logits of an expert's fusion weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaSteer",
            display_name="AFA Steer",
            category="afa",
            description=(
                "Favours or disfavours an expert: a bias of +1 multiplies its odds against every "
                "other expert by 2.7 at every pixel. Several of these nodes in a row add up."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of an ensemble."),
                io.String.Input(
                    "expert", default="1", tooltip="The expert's name, or its number from 1."
                ),
                io.Combo.Input(
                    "stage",
                    options=[_ALL, *STAGES],
                    default=_ALL,
                    tooltip="Part of the denoiser: encoder (down), bottleneck, decoder (up).",
                ),
                io.Float.Input("bias", default=1.0, min=-_LARGEST, max=_LARGEST, step=0.1),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @codes_shown()
    def execute(cls, model: Any, expert: str, stage: str, bias: float) -> io.NodeOutput:
        """See ComfyUI."""
        runner = runner_of(model)
        name = runner.expert_named(expert)
        known = {key: dict(by) for key, by in (runner.settings.bias or {}).items()}
        own = known.setdefault(name, dict.fromkeys(STAGES, 0.0))
        for each in STAGES if stage == _ALL else [stage]:
            own[each] += bias
        return io.NodeOutput(with_settings(model, bias=known))
