"""The oracle mask: a ceiling that knows the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from afa.aggregators.rule import Condition, Fused, FusionRule, weighted_sum
from afa.denoisers.kinds import denoiser_of
from afa.evaluation.cost import Cost, measure
from afa.evaluation.work import draw
from afa.loading.pipeline import load_pipeline, with_rules
from afa.studies.results.rivals.rival import SAMPLING, Drawer, Rival
from afa.studies.results.rows import ORACLE
from afa.zoo.scenes import parse_caption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor


class HalfMask(FusionRule):
    """Use the feature of one expert in the left half, and of another one in the right half.

    Set `owners` to the two experts of each picture of a batch before it is drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[tuple[int, int]] = []

    def forward(self, features: Sequence[Tensor], condition: Condition) -> Fused:
        """Return the features of the owners of both halves."""
        batch, _, height, width = features[0].shape
        weights = features[0].new_zeros((batch, len(features), height, width))
        for row in range(batch):  # with guidance, all pictures twice
            left, right = self.owners[row % len(self.owners)]
            weights[row, left, :, : width // 2] = 1
            weights[row, right, :, width // 2 :] = 1
        return Fused(weighted_sum(features, weights), weights)


@dataclass(frozen=True)
class OracleMask(Rival):
    """A ceiling that no method can use: it knows the layout, and who owns which object."""

    row: ClassVar[str] = ORACLE

    def open(self) -> Drawer:
        """See `Rival.open`."""
        return _Masked(self)


class _Masked(Drawer):
    def __init__(self, asked: OracleMask) -> None:
        pipeline, self._mask = load_pipeline(list(asked.place.experts.values())), HalfMask()
        rules = [self._mask for _ in denoiser_of(pipeline).sites]
        self._asked, self._pipeline = asked, with_rules(pipeline, rules)

    def draw(
        self, captions: Sequence[str], numbers: Sequence[int], seed: int
    ) -> tuple[list[Image.Image], Cost]:
        """See `Drawer.draw`."""
        world, names = self._asked.place.recipe, list(self._asked.place.experts)
        shown = [parse_caption(caption) for caption in captions]
        self._mask.owners = [
            (names.index(world.owner(s.left)), names.index(world.owner(s.right))) for s in shown
        ]
        with measure(self._pipeline) as cost:
            pictures = draw(
                self._pipeline, captions, numbers, seed, self._asked.num_steps, SAMPLING
            )
        return pictures, cost
