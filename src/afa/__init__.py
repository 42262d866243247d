"""afa: several fine-tuned text-to-image diffusion models as one generator.

Adaptive Feature Aggregation, Wang et al., ICLR 2025, https://arxiv.org/abs/2405.17082.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afa.acceleration.apply import accelerate as accelerate
    from afa.acceleration.settings import Acceleration as Acceleration
    from afa.aggregators import SABW as SABW
    from afa.aggregators import FusionRule as FusionRule
    from afa.aggregators import SABWConfig as SABWConfig
    from afa.checkpoint import load_ensemble as load_ensemble
    from afa.checkpoint import save_ensemble as save_ensemble
    from afa.ensemble import EnsembleDenoiser as EnsembleDenoiser
    from afa.errors import AfaError as AfaError
    from afa.maps import record_weights as record_weights
    from afa.pipeline import load_pipeline as load_pipeline
    from afa.steering import steer as steer
    from afa.text import EnsembleTextEncoder as EnsembleTextEncoder
    from afa.text import attach_controlnet as attach_controlnet
    from afa.trust import trusting as trusting

__version__ = "0.1.0"

# public name -> its module; imported on first use, so that `import afa` and `afa --help` are quick
_PUBLIC = {
    "Acceleration": "afa.acceleration.settings",
    "AfaError": "afa.errors",
    "EnsembleDenoiser": "afa.ensemble",
    "EnsembleTextEncoder": "afa.text",
    "FusionRule": "afa.aggregators",
    "SABW": "afa.aggregators",
    "SABWConfig": "afa.aggregators",
    "accelerate": "afa.acceleration.apply",
    "attach_controlnet": "afa.text",
    "load_ensemble": "afa.checkpoint",
    "load_pipeline": "afa.pipeline",
    "record_weights": "afa.maps",
    "save_ensemble": "afa.checkpoint",
    "steer": "afa.steering",
    "trusting": "afa.trust",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'afa' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
