"""The recipe of `afa merge`."""

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
#: methods that need the base of the experts
WITH_BASE = tuple(name for name, method in _METHODS.items() if method.needs_base)
# option -> methods that use it
_OPTIONS = {
    "weights": ("weighted", "add_difference", "slerp", "ties", "dare"),
    "block_weights": ("block_weights",),
    "density": ("ties", "dare"),
    "majority_sign": ("ties",),
    "seed": ("dare",),
}


class MergeRecipe(Section):
    """The recipe of a merge. Omitted options use the method's defaults.

    Attributes:
        method: the merge method; see `afa.merging`.
        experts: diffusers folders, hub ids and `zoo:` names, or single `.safetensors` files.
        base: the model that they were fine-tuned from; for add_difference, ties and dare.
        weights: one per expert. `weighted`, `slerp`: must sum to 1, default 1/N each.
            `add_difference`, `dare`: any, default 1/N each. `ties`: any, default 1 each, because
            its mean is over the experts that agree.
        block_weights: weights per site, or a preset of the web UIs; see `BlockWeights`.
        density: fraction of each difference to keep; `ties`: default 0.2, `dare`: required.
        majority_sign: `ties`: elect by the larger sum (total) or by more experts (frequency).
        seed: seed of `dare`; default 0.
        dtype: dtype of the result; default: the first expert's, tensor by tensor.
        vae: `first` copies the first expert's autoencoder, `merge` merges all.
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
        """Check the type here; pydantic would report one error for each type of the union."""
        vectors = given.values() if isinstance(given, Mapping) else [given]
        if given is None or isinstance(given, str) or all(map(_is_numbers, vectors)):
            return given
        raise ValueError(
            "must be the name of a preset, 26 numbers, or a mapping of sites to one weight per "
            "expert"
        )

    @model_validator(mode="after")
    def _fits_its_method(self) -> MergeRecipe:
        for option, methods in _OPTIONS.items():
            if getattr(self, option) is not None and self.method not in methods:
                raise ValueError(
                    f"must not have {option} with method {self.method}; only "
                    f"{', '.join(methods)} {'use' if len(methods) > 1 else 'uses'} it"
                )
        if self.method == "block_weights" and self.block_weights is None:
            raise ValueError("must have block_weights with method block_weights")
        if self.method == "dare" and self.density is None:
            raise ValueError("must have density (1 - drop rate) with method dare")
        needs_base = _METHODS[self.method].needs_base
        if needs_base != (self.base is not None):
            verb = "must have" if needs_base else "must not have"
            raise ValueError(f"{verb} a base with method {self.method}")
        self.build()
        if self.weights is not None and len(self.weights) != len(self.experts):
            raise ValueError(
                f"must have one weight per expert; got {len(self.weights)} for {len(self.experts)}"
            )
        return self

    def build(self) -> MergeMethod:
        """Build the merge method.

        Raises:
            AfaError: if its settings are invalid.
        """
        settings = {name: getattr(self, name) for name in _OPTIONS}
        block_weights = settings.pop("block_weights")
        if block_weights is not None:
            settings["weights"] = block_weights
        given = {name: value for name, value in settings.items() if value is not None}
        return _METHODS[self.method](**given)


def load_merge_recipe(path: str | Path) -> MergeRecipe:
    """Read and check a recipe; its paths are relative to its own folder.

    Raises:
        AfaError: if it is invalid; see `afa.recipe.read_recipe`.
    """
    return resolve_sources(read_recipe(path, MergeRecipe), Path(path).parent, "experts", "base")


def _is_numbers(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    )
