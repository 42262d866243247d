"""The shell control: one expert alone, run by an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from afa.aggregators import FusionRule, Only
from afa.aggregators.fusion.recipe import FusionRecipe, check_expert_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.denoisers import Site


def shell(sites: Sequence[Site], expert: int) -> list[FusionRule]:
    """One expert alone, run by the ensemble: same text path and autoencoder, nothing is fused."""
    return [Only(expert) for _ in sites]


class ShellRecipe(FusionRecipe):
    """`rule: shell`; `expert` is a number from 0. See `shell`."""

    rule: Literal["shell"] = "shell"
    expert: int = Field(ge=0)

    def rules(self, sites: Sequence[Site]) -> list[FusionRule]:
        """The expert's feature at every site."""
        return shell(sites, self.expert)

    def check(self, num_experts: int, guidance: float) -> None:
        """Refuse an unknown expert."""
        check_expert_numbers([self.expert], num_experts)

    @classmethod
    def rows(cls, experts: Sequence[str]) -> dict[str, list[Self]]:
        """One row for each expert."""
        return {f"shell: {name}": [cls(expert=n)] for n, name in enumerate(experts)}
