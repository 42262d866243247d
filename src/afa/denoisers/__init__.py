"""Denoiser families: each architecture as a coroutine, and its sites.

To add an architecture, add a file with a `Family`: a coroutine of 30 to 80 lines that reads like
the model's own forward pass, and a record of everything else that afa must know.
"""

from afa.denoisers.architecture import check_same_architecture
from afa.denoisers.coroutine import Blocks, Feature, run_alone, run_lockstep
from afa.denoisers.execution import PLAIN, Execution, move_all_but
from afa.denoisers.family import (
    Conditioning,
    Family,
    FileDenoiser,
    PipelineKind,
    SingleFiles,
    Widths,
)
from afa.denoisers.interface import Interface
from afa.denoisers.sites import FAMILIES, Site, discover_sites, family_of, register_family
from afa.denoisers.splitting import split_text

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Blocks",
    "Conditioning",
    "Execution",
    "Family",
    "Feature",
    "FileDenoiser",
    "Interface",
    "PipelineKind",
    "SingleFiles",
    "Site",
    "Widths",
    "check_same_architecture",
    "discover_sites",
    "family_of",
    "move_all_but",
    "register_family",
    "run_alone",
    "run_lockstep",
    "split_text",
]
