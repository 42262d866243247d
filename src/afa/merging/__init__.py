"""Merge several checkpoints into one set of weights, tensor by tensor."""

from afa.merging.add_difference import AddDifference
from afa.merging.block_weights import BlockWeights
from afa.merging.dare import Dare
from afa.merging.method import MergeMethod, merge_tensor
from afa.merging.plan import MergePlan, plan_merge
from afa.merging.presets import PRESETS
from afa.merging.recipe import MergeRecipe, load_merge_recipe
from afa.merging.run import MergeProgress, merge_checkpoints, run_merge
from afa.merging.slerp import Slerp
from afa.merging.ties import Ties
from afa.merging.weighted import WeightedSum

__all__ = [
    "PRESETS",
    "AddDifference",
    "BlockWeights",
    "Dare",
    "MergeMethod",
    "MergePlan",
    "MergeProgress",
    "MergeRecipe",
    "Slerp",
    "Ties",
    "WeightedSum",
    "load_merge_recipe",
    "merge_checkpoints",
    "merge_tensor",
    "plan_merge",
    "run_merge",
]
