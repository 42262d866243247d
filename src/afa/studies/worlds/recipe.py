"""The description of a world: what its base knows, what each expert knows, and how they learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from afa.errors import AfaError
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_path
from afa.zoo.scenes import is_held_out
from afa.zoo.sprites import DOMAINS, OBJECTS

if TYPE_CHECKING:
    from afa.zoo.scenes import Kind

#: names of models in a world's folder, besides its experts
BASE, POOLED, WIDE = "base", "pooled", "wide"
#: the text encoder that they share
TEXT = "text"
#: channels of the wide model, which has three times the base's parameters
WIDE_CHANNELS = (56, 168)


class WorldRecipe(Section):
    """A world of emoji scenes: a base and its experts, with the bundled autoencoder and judges.

    Its text encoder is trained first, by contrast with pictures, and knows that a fox is an animal.
    The test pairs of `afa.zoo.scenes.pair_set` are held out of all training sets, too.

    Attributes:
        num_experts: with 3, each expert's data are the objects of one domain; otherwise the 48
            objects are dealt out in turn. Its data are all pairs of its objects that are not held
            out.
        private: objects of each domain that only their expert's data show, besides the text
            encoder's.
        start: folder of another world with the same base, which is not trained again.
        base_steps: steps of the base.
        expert_steps: steps of each expert.
        pooled_steps: steps of one more model, `pooled`, which continues the base on its own data
            and those of all experts together; 0 trains none.
        is_wide: whether one more model, `wide`, with three times the parameters is trained from
            random weights, as long and on the same data as the base and the pooled model together.
        batch_size: scenes in a step.
        learning_rate: of the base and of the pooled model.
        expert_learning_rate: of the experts.
        caption_dropout: fraction of captions that are dropped, for classifier-free guidance.
        text_steps: steps of the text encoder.
        category_share: fraction of the objects in its captions that are named by their category.
        num_scenes: scenes of each set of data, which are encoded once.
        num_graded: prompts of each kind for the scores of each model.
        seed: seed of the data and the initial weights.
    """

    num_experts: Literal[2, 3, 4, 8] = 3
    private: int = Field(default=0, ge=0, le=4)
    start: Path | None = None
    base_steps: int = Field(default=3_000, ge=1)
    expert_steps: int = Field(default=2_000, ge=1)
    pooled_steps: int = Field(default=0, ge=0)
    is_wide: bool = False
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    expert_learning_rate: float = Field(default=1e-3, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    text_steps: int = Field(default=3_000, ge=1)
    category_share: float = Field(default=0.5, ge=0, le=1)
    num_scenes: int = Field(default=16_384, ge=1)
    num_graded: int = Field(default=48, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _fits(self) -> WorldRecipe:
        if self.private and self.num_experts != len(DOMAINS):
            raise ValueError("must have 3 experts if objects are private to one of them")
        if self.is_wide and not self.pooled_steps:
            raise ValueError("must have pooled_steps for a wide model, which is trained as long")
        return self

    @property
    def experts(self) -> dict[str, tuple[str, ...]]:
        """The objects in each expert's data."""
        if self.num_experts == len(DOMAINS):
            return {domain: tuple(name for name, _ in listed) for domain, listed in DOMAINS.items()}
        count = self.num_experts
        return {f"part-{n + 1}": tuple(OBJECTS[n::count]) for n in range(count)}

    @property
    def private_objects(self) -> frozenset[str]:
        """The objects that the base's data do not show: of each domain, every fourth one.

        They are those that `benchmarks.unseen` never leaves out of trainings.
        """
        if not self.private:
            return frozenset()
        return frozenset(
            name for each in DOMAINS.values() for name, _ in each[3::4][: self.private]
        )

    def shown(self, model: str) -> tuple[Kind, frozenset[str]]:
        """The kind of the scenes in a model's data, and the objects that they leave out."""
        if model == BASE:
            return "any", self.private_objects
        if model in DOMAINS:
            return model, frozenset()
        return "any", frozenset(OBJECTS) - set(self.experts[model])

    def shown_to_text(self, index: int) -> str:
        """The model whose kind of scene is at an index of the text encoder's data.

        It knows all words, as CLIP does. Objects that are private to an expert are shown beside
        others of their domain alone, since all other pairs with them are prompts of tests.
        """
        if not self.private or index % 2 == 0:
            return BASE
        return list(self.experts)[index // 2 % len(self.experts)]

    def owner(self, shown: str) -> str:
        """The expert whose data show an object."""
        return next(name for name, known in self.experts.items() if shown in known)

    def is_mixed(self, left: str, right: str) -> bool:
        """Whether two objects are of different experts, and no model was trained on the pair."""
        if self.owner(left) == self.owner(right):
            return False
        is_private = not self.private_objects.isdisjoint((left, right))
        return is_private or is_held_out(left, right, "fifth")


#: worlds by name
WORLDS: dict[str, WorldRecipe] = {
    "main": WorldRecipe(pooled_steps=6_000, is_wide=True),
    "private": WorldRecipe(private=4, pooled_steps=6_000),
    **{
        f"after-{steps}": WorldRecipe(start=Path("main"), expert_steps=steps)
        for steps in (50, 200, 700)
    },
    **{
        f"split-{count}": WorldRecipe(
            start=Path("main"), num_experts=count, expert_steps=6_000 // count
        )
        for count in (2, 4, 8)
    },
}


def read_world(named: str, folder: Path) -> WorldRecipe:
    """Return a world by its name in `WORLDS` or its YAML file.

    Args:
        named: a name or a file.
        folder: where the world is built; worlds of `WORLDS` start from their sibling folders.

    Raises:
        AfaError: if there is no such world, or the file cannot be read.
    """
    if named in WORLDS:
        recipe, place = WORLDS[named], folder.resolve().parent
    elif not Path(named).suffix:
        raise AfaError(
            "AFA-STUDY-015",
            f"There is no world '{named}'. Use {', '.join(WORLDS)}, or a YAML file.",
        )
    else:
        recipe, place = read_recipe(named, WorldRecipe), Path(named).parent
    if recipe.start is None:
        return recipe
    return recipe.model_copy(update={"start": resolve_path(recipe.start, place)})
