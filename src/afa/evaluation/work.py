"""The units of work of a comparison, and where on disk each leaves what it has done."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from afa.denoisers.kinds import kind_of_pipeline
from afa.ensemble.guard import decoded
from afa.errors import AfaError
from afa.evaluation.cost import Cost, measure
from afa.evaluation.recipe import slug
from afa.files import read_json, write_atomic
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.recipe import differing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe

#: what tells the folder of a comparison
MARK_FILE = "evaluation.json"


@dataclass(frozen=True)
class Unit:
    """One batch of one method's pictures: `places` are those of its prompts.

    Batches are cut the same way however many processes there are and wherever a run was stopped,
    so that every picture is drawn beside the same others, bit for bit. `part` keeps the pictures of
    the curve apart from those of the main comparison.
    """

    method: str
    replica: int
    seed: int
    num_steps: int
    batch: int
    places: tuple[int, ...]
    part: Literal["main", "curve"] = "main"

    @property
    def name(self) -> str:
        """The batch's number, and which prompts it holds."""
        return f"batch-{self.batch:04d}-{digest(self.places)}"


@dataclass(frozen=True)
class Claim:
    """What some files are made from.

    Attributes:
        place: the file beside them that says it.
        identity: as JSON.
        what: they are, for errors.
    """

    place: Path
    identity: dict[str, Any]
    what: str

    @classmethod
    def of(cls, place: Path, identity: dict[str, Any], what: str) -> Claim:
        """A claim whose identity is as JSON would read it back."""
        return cls(place, json.loads(json.dumps(identity)), what)


def digest(content: Any) -> str:
    """Eight digits that tell one JSON content from another."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def units_of(
    recipe: EvaluateRecipe,
    places: Sequence[int],
    num_steps: int,
    methods: Sequence[str] | None = None,
    part: Literal["main", "curve"] = "main",
) -> list[Unit]:
    """All units of some methods (None: all) at so many steps, in the order of the methods."""
    size = recipe.sampling.batch_size
    batches = [tuple(places[start : start + size]) for start in range(0, len(places), size)]
    return [
        Unit(method.name, replica, seed, num_steps, batch, chosen, part)
        for method in recipe.methods
        if methods is None or method.name in methods
        for replica in range(method.num_replicas)
        for seed in recipe.sampling.seeds
        for batch, chosen in enumerate(batches)
    ]


class Store:
    """The folder of a comparison.

    Everything of a method lies below `methods/METHOD/replica-R`: pictures in
    `seed-S/steps-T/000012.png`, beside them what each batch cost, its `scores/METRIC` and its
    `features/NETWORK`. A file is there whole or not at all, and a batch counts as drawn when its
    cost is there, which is written last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def method(self, name: str, replica: int) -> Path:
        """The folder of all that was made of one method's replica."""
        return self.folder / "methods" / slug(name) / f"replica-{replica}"

    def unit(self, unit: Unit) -> Path:
        """The folder of a batch's pictures."""
        steps = f"{'curve' if unit.part == 'curve' else 'steps'}-{unit.num_steps}"
        return self.method(unit.method, unit.replica) / f"seed-{unit.seed}" / steps

    def picture(self, unit: Unit, place: int) -> Path:
        """Where the picture of the prompt at `place` lies."""
        return self.unit(unit) / f"{place:06d}.png"

    def cost(self, unit: Unit) -> Path:
        """Where the cost of a batch lies, once it is drawn."""
        return self.unit(unit) / f"{unit.name}.json"

    def scores(self, metric: str, unit: Unit) -> Path:
        """Where the scores of a batch lie; `metric` tells its settings, too."""
        return self.unit(unit) / "scores" / metric / f"{unit.name}.json"

    def features(self, network: str, unit: Unit) -> Path:
        """Where the features of a batch lie; `network` tells its weights, too."""
        return self.unit(unit) / "features" / network / f"{unit.name}.safetensors"

    def reference_features(self, network: str, number: int) -> Path:
        """Where the features of the reference pictures of one batch lie."""
        return self.folder / "references" / "features" / network / f"{number:04d}.safetensors"

    def require(self, claim: Claim) -> None:
        """Refuse what was made from something else than is asked for; nothing is written.

        Raises:
            AfaError: the claim's place says so, or it is missing beside pictures.
        """
        place, what = claim.place, claim.what
        if not place.exists():
            if any(place.parent.glob("seed-*")) or any(place.parent.glob("methods/*")):
                raise AfaError(
                    "AFA-EVAL-029",
                    f"What is kept of {what} must say what it was made from; '{place}' is missing. "
                    f"Restore it, or delete '{place.parent}' to make all of it again.",
                )
            return
        found = read_json(place)
        if found != claim.identity:
            keys = sorted({key.split(".")[0] for key in differing(found, claim.identity)})
            raise AfaError(
                "AFA-EVAL-030",
                f"What is kept of {what} must be of the same recipe and the same checkpoints; in "
                f"'{place.parent}' it differs in {', '.join(keys)}. Delete that folder to make it "
                "again, or name another output folder.",
            )

    def claim(self, claims: Sequence[Claim]) -> None:
        """Note what files are made from; where one of the claims is refused, none is noted.

        Raises:
            AfaError: see `require`.
        """
        for claim in claims:
            self.require(claim)
        for claim in claims:
            if not claim.place.exists():
                write_json(claim.place, claim.identity)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def draw(
    pipeline: StableDiffusionPipeline,
    texts: Sequence[str],
    places: Sequence[int],
    seed: int,
    num_steps: int,
    sampling: SamplingRecipe,
    output_type: Literal["pil", "latent"] = "pil",
) -> list[Image.Image]:
    """One batch of pictures; the noise of each depends on the seed and its prompt's place alone."""
    what = f"A batch of {len(texts)} pictures"
    otherwise = "Or take sampling.dtype: bfloat16, or smaller pictures."
    remedy = smaller_batch(len(texts), "sampling.batch_size", None, otherwise)
    checked = decoded(pipeline) if output_type == "pil" else nullcontext()
    with torch.no_grad(), saying_what_fits(what, remedy), checked:
        return pipeline(
            list(texts),
            negative_prompt=[sampling.negative_prompt] * len(texts),
            num_inference_steps=num_steps,
            guidance_scale=sampling.guidance,
            height=sampling.height,
            width=sampling.width,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + place) for place in places],
            output_type=output_type,
            **kind_of_pipeline(pipeline).call,
        ).images


def draw_unit(
    pipeline: StableDiffusionPipeline,
    unit: Unit,
    prompts: Sequence[Prompt],
    sampling: SamplingRecipe,
    store: Store,
) -> None:
    """Draw the pictures of one batch and note what they cost."""
    texts = [prompts[place].text for place in unit.places]
    with measure(pipeline) as cost:
        pictures = draw(pipeline, texts, unit.places, unit.seed, unit.num_steps, sampling)
    require_unchanged(pipeline)
    folder = store.cost(unit).parent
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in zip(unit.places, pictures, strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomic(store.picture(unit, place), buffer.getvalue())
    write_json(store.cost(unit), asdict(cost))


def read_cost(store: Store, unit: Unit) -> Cost:
    """What a drawn batch cost."""
    return Cost(**read_json(store.cost(unit)))


def read_pictures(store: Store, unit: Unit) -> list[Image.Image]:
    """The pictures of a drawn batch.

    Raises:
        AfaError: one is missing or damaged.
    """
    return list(open_pictures(store.picture(unit, place) for place in unit.places))


def open_pictures(paths: Iterator[Path] | Sequence[Path]) -> Iterator[Image.Image]:
    """Pictures from files as RGB; transparent ones on white, see `afa.reading.read_picture`.

    Raises:
        AfaError: one is missing or damaged; names it.
    """
    from afa.reading import read_picture

    for path in paths:
        yield read_picture(path)
