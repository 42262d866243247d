"""Honest comparison: same prompts, same noise, paired intervals, and what a picture costs."""

from afa.evaluation.recipe import EvaluateRecipe, load_evaluate_recipe
from afa.evaluation.run import EvaluateProgress, evaluate

__all__ = ["EvaluateProgress", "EvaluateRecipe", "evaluate", "load_evaluate_recipe"]
