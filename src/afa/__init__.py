"""afa: combine several fine-tuned text-to-image diffusion models into one generator.

Adaptive Feature Aggregation, Wang et al., ICLR 2025, https://arxiv.org/abs/2405.17082.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from afa.provenance import __version__ as __version__

if TYPE_CHECKING:
    from afa.aggregators import SABW as SABW
    from afa.aggregators import FusionRule as FusionRule
    from afa.aggregators import SABWConfig as SABWConfig
    from afa.distilling.run import distill as distill
    from afa.ensemble.accelerate import accelerate as accelerate
    from afa.ensemble.caching.settings import Acceleration as Acceleration
    from afa.ensemble.denoiser import EnsembleDenoiser as EnsembleDenoiser
    from afa.ensemble.recording import record_weights as record_weights
    from afa.ensemble.steering import steer as steer
    from afa.ensemble.text import EnsembleTextEncoder as EnsembleTextEncoder
    from afa.ensemble.text import attach_controlnet as attach_controlnet
    from afa.ensemble.weighted_prompts import encode_prompt as encode_prompt
    from afa.errors import AfaError as AfaError
    from afa.loading.ensemble_folder import load_ensemble as load_ensemble
    from afa.loading.ensemble_folder import save_ensemble as save_ensemble
    from afa.loading.expert_source import ExpertSource as ExpertSource
    from afa.loading.pipeline import load_pipeline as load_pipeline
    from afa.policy import trusting as trusting


# public name -> its module; imported on first use, so that `import afa` and `afa --help` are quick
_PUBLIC = {
    "Acceleration": "afa.ensemble.caching.settings",
    "AfaError": "afa.errors",
    "EnsembleDenoiser": "afa.ensemble.denoiser",
    "EnsembleTextEncoder": "afa.ensemble.text",
    "ExpertSource": "afa.loading.expert_source",
    "FusionRule": "afa.aggregators",
    "SABW": "afa.aggregators",
    "SABWConfig": "afa.aggregators",
    "accelerate": "afa.ensemble.accelerate",
    "attach_controlnet": "afa.ensemble.text",
    "distill": "afa.distilling.run",
    "encode_prompt": "afa.ensemble.weighted_prompts",
    "load_ensemble": "afa.loading.ensemble_folder",
    "load_pipeline": "afa.loading.pipeline",
    "record_weights": "afa.ensemble.recording",
    "save_ensemble": "afa.loading.ensemble_folder",
    "steer": "afa.ensemble.steering",
    "trusting": "afa.policy",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'afa' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
