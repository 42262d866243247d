"""Denoiser families as coroutines, and where their sites are.

A new architecture is one more file with a `Family`: a coroutine of 30 to 80 lines that reads like
the family's own forward pass, and a record of all that is to be known of it.
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
    split_text,
)
from afa.denoisers.sites import FAMILIES, Site, discover_sites, family_of, register_family

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Blocks",
    "Conditioning",
    "Execution",
    "Family",
    "Feature",
    "FileDenoiser",
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
