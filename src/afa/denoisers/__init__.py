"""Denoiser families as coroutines, and where their sites are.

A new architecture is one more file with a `Family`: a coroutine of 30 to 80 lines that reads like
the family's own forward pass, a check of what it can take apart, and an example of its input.
"""

from afa.denoisers.architecture import check_same_architecture
from afa.denoisers.coroutine import Blocks, Feature, run_alone, run_lockstep
from afa.denoisers.execution import PLAIN, Execution, move_all_but
from afa.denoisers.family import Family, Widths
from afa.denoisers.sites import FAMILIES, Site, discover_sites, family_of, register_family

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Blocks",
    "Execution",
    "Family",
    "Feature",
    "Site",
    "Widths",
    "check_same_architecture",
    "discover_sites",
    "family_of",
    "move_all_but",
    "register_family",
    "run_alone",
    "run_lockstep",
]
