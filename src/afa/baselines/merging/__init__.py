"""Static merges: one set of weights from several checkpoints, tensor by tensor."""

from afa.baselines.merging.add_difference import AddDifference
from afa.baselines.merging.block_weights import BlockWeights
from afa.baselines.merging.dare import Dare
from afa.baselines.merging.method import MergeMethod, merge_tensor
from afa.baselines.merging.plan import MergePlan, plan_merge
from afa.baselines.merging.presets import PRESETS
from afa.baselines.merging.recipe import MergeRecipe, load_merge_recipe
from afa.baselines.merging.run import MergeProgress, merge_checkpoints, run_merge
from afa.baselines.merging.slerp import Slerp
from afa.baselines.merging.ties import Ties
from afa.baselines.merging.weighted import WeightedSum

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
