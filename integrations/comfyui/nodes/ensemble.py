"""AFA Ensemble: several MODELs and trained aggregators to one MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ensemble import ensemble_model
from ..errors import codes_shown
from ..folders import ensemble_input, find_ensemble, fingerprint, in_a_row
from ..settings import Settings

#: MODELs that can be connected
MAX_EXPERTS = 8


def record_input() -> io.Boolean.Input:
    """The switch for recording fusion weights."""
    return io.Boolean.Input(
        "record_weights",
        default=False,
        optional=True,
        tooltip="Keep who did what, for AFA Weights.",
    )


class AfaEnsemble(io.ComfyNode):
    """Combine MODELs, in the order in which the aggregators were trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        others = [
            io.Model.Input(f"model_{n}", optional=True, tooltip="The next expert.")
            for n in range(2, MAX_EXPERTS + 1)
        ]
        return io.Schema(
            node_id="AfaEnsemble",
            display_name="AFA Ensemble",
            category="afa",
            description=(
                "Runs several models in lockstep and fuses their features after every block, with "
                "weights per pixel from trained aggregators (Adaptive Feature Aggregation)."
            ),
            inputs=[
                io.Model.Input("model_1", tooltip="The first expert, as in the training recipe."),
                *others,
                ensemble_input(),
                record_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, ensemble: str, **others: Any) -> str:
        """Executed again if the ensemble's files changed."""
        return f"{fingerprint(ensemble)} {others.get('record_weights', False)}"

    @classmethod
    @codes_shown()
    def execute(
        cls, model_1: Any, ensemble: str, record_weights: bool = False, **others: Any
    ) -> io.NodeOutput:
        """See ComfyUI."""
        given = {f"model_{n}": others.get(f"model_{n}") for n in range(2, MAX_EXPERTS + 1)}
        models = in_a_row({"model_1": model_1, **given})
        settings = Settings(records=record_weights)
        return io.NodeOutput(ensemble_model(models, find_ensemble(ensemble), settings))
