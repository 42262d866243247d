"""Compare methods on the same prompts and noise, with paired intervals and costs."""

from afa.evaluation.recipe import EvaluateRecipe, load_evaluate_recipe
from afa.evaluation.run import EvaluateProgress, evaluate

__all__ = ["EvaluateProgress", "EvaluateRecipe", "evaluate", "load_evaluate_recipe"]
