"""AFA Load Ensemble: an ensemble folder with the experts that it names."""

from __future__ import annotations

from comfy_api.latest import io

from ..errors import codes_shown
from ..folders import ensemble_input, find_ensemble, fingerprint
from ..loading import load_ensemble_parts
from ..settings import Settings
from .ensemble import record_input


class AfaLoadEnsemble(io.ComfyNode):
    """Load an ensemble folder like a checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="AfaLoadEnsemble",
            display_name="AFA Load Ensemble",
            category="afa",
            description=(
                "Loads an ensemble folder and the checkpoints that it names, whose hashes must be "
                "those of the training."
            ),
            inputs=[ensemble_input(with_mean=False), record_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, ensemble: str, record_weights: bool = False) -> str:
        """Executed again if the ensemble's files changed."""
        return f"{fingerprint(ensemble)} {record_weights}"

    @classmethod
    @codes_shown()
    def execute(cls, ensemble: str, record_weights: bool = False) -> io.NodeOutput:
        """See ComfyUI."""
        folder = find_ensemble(ensemble)
        assert folder is not None, "the mean is not among the choices"
        return io.NodeOutput(*load_ensemble_parts(folder, Settings(records=record_weights)))
