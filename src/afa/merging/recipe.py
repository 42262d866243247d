"""What `afa merge` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from afa.merging.add_difference import AddDifference
from afa.merging.block_weights import BlockWeights
from afa.merging.dare import Dare
from afa.merging.method import MergeMethod
from afa.merging.slerp import Slerp
from afa.merging.ties import Ties
from afa.merging.weighted import WeightedSum
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_sources

_METHODS: dict[str, type[MergeMethod]] = {
    "weighted": WeightedSum,
    "add_difference": AddDifference,
    "slerp": Slerp,
    "ties": Ties,
    "dare": Dare,
    "block_weights": BlockWeights,
}
# option -> the methods it is for
_OPTIONS = {
    "weights": ("weighted", "add_difference", "slerp", "ties", "dare"),
    "block_weights": ("block_weights",),
    "density": ("ties", "dare"),
    "majority_sign": ("ties",),
    "seed": ("dare",),
}


class MergeRecipe(Section):
    """A whole merge; options that are left out have their method's default.

    Attributes:
        method: see `afa.merging`.
        experts: diffusers folders, hub ids and `zoo:` names, or single `.safetensors` files.
        base: what they were fine-tuned from; for add_difference, ties and dare.
        weights: one per expert. `weighted`, `slerp`: they sum to 1, uniform by default.
            `add_difference`, `dare`: any, 1/N each by default. `ties`: any, 1 each by default,
            since its mean is over the experts that agree.
        block_weights: weights per site, or a preset of the web UIs; see `BlockWeights`.
        density: share of a difference that is kept; `ties`: 0.2 by default, `dare`: required.
        majority_sign: `ties`: elect by the larger sum (total) or by more experts (frequency).
        seed: of `dare`; 0 by default.
        dtype: of the result; the first expert's by default, tensor by tensor.
        vae: the first expert's autoencoder as it is, or a merge of all.
    """

    method: Literal["weighted", "add_difference", "slerp", "ties", "dare", "block_weights"]
    experts: list[str] = Field(min_length=1)
    base: str | None = None
    weights: list[FiniteFloat] | None = None
    block_weights: str | list[float] | dict[str, list[float]] | None = None
    density: FiniteFloat | None = None
    majority_sign: Literal["total", "frequency"] | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    vae: Literal["first", "merge"] = "first"

    @field_validator("block_weights", mode="before")
    @classmethod
    def _one_of_three(cls, given: Any) -> Any:
        """Numbers, names or neither: said once, not once for every kind that it could have been."""
        vectors = given.values() if isinstance(given, Mapping) else [given]
        if given is None or isinstance(given, str) or all(map(_is_numbers, vectors)):
            return given
        raise ValueError(
            "must be a preset's name, 26 numbers, or a mapping of sites to one weight per expert"
        )

    @model_validator(mode="after")
    def _fits_its_method(self) -> MergeRecipe:
        for option, methods in _OPTIONS.items():
            if getattr(self, option) is not None and self.method not in methods:
                raise ValueError(
                    f"must leave {option} out with method {self.method}; it is for "
                    f"{', '.join(methods)}"
                )
        if self.method == "block_weights" and self.block_weights is None:
            raise ValueError("must have block_weights with method block_weights")
        if self.method == "dare" and self.density is None:
            raise ValueError("must have a density with method dare: 1 - the paper's drop rate")
        needs_base = _METHODS[self.method].needs_base
        if needs_base != (self.base is not None):
            what = "must have a base" if needs_base else "must leave base out"
            raise ValueError(f"{what} with method {self.method}")
        self.build()
        if self.weights is not None and len(self.weights) != len(self.experts):
            raise ValueError(
                f"must have as many weights as experts, came {len(self.weights)} for "
                f"{len(self.experts)}"
            )
        return self

    def build(self) -> MergeMethod:
        """The method with these settings.

        Raises:
            AfaError: settings that its constructor refuses.
        """
        settings = {name: getattr(self, name) for name in _OPTIONS}
        blocks = settings.pop("block_weights")
        settings["weights"] = self.weights if blocks is None else blocks
        given = {name: value for name, value in settings.items() if value is not None}
        return _METHODS[self.method](**given)


def load_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read and check a recipe; paths in it are relative to its own folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    return resolve_sources(read_recipe(path, MergeRecipe), Path(path).parent, "experts", "base")


def _is_numbers(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    )
