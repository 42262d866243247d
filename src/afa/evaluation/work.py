"""The units of work of a comparison, and the files that they write."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.schedulers import sampled_with
from afa.drafting import batches, routed
from afa.ensemble.guard import decoded
from afa.ensemble.prompt_syntax import words_of_prompt
from afa.ensemble.sparse import LeadingExperts
from afa.ensemble.weighted_prompts import of_equal_length, prompt_call
from afa.errors import AfaError
from afa.evaluation.cost import Cost, measure
from afa.evaluation.recipe import slug
from afa.files import read_json, write_atomic, write_png
from afa.loading.trust.unchanged import require_unchanged
from afa.machine.exhausted import saying_what_fits, smaller_batch
from afa.reading import read_picture
from afa.recipe import differing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe, SamplingRecipe

#: file that marks the folder of a comparison
MARK_FILE = "evaluation.json"


@dataclass(frozen=True)
class Unit:
    """One batch of pictures of one method; `places` are the indices of its prompts.

    The batches do not depend on the number of processes or on interruptions, so each picture is
    always drawn in the same batch and equals bit for bit. `part` separates the pictures of the
    curve from those of the main comparison.
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
        """The number of the batch, and a digest of its prompt indices."""
        return f"batch-{self.batch:04d}-{digest(self.places)}"


@dataclass(frozen=True)
class Claim:
    """Records the inputs from which files were made.

    Attributes:
        path: the file that stores the record.
        identity: the inputs, as JSON.
        what: name of the files, for errors.
        files: patterns of the files beside it that were made from these inputs.
    """

    path: Path
    identity: dict[str, Any]
    what: str
    files: tuple[str, ...] = ("seed-*", "methods/*")


def digest(content: Any) -> str:
    """Eight hex digits of the SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def units_of(
    recipe: EvaluateRecipe,
    places: Sequence[int],
    num_steps: int,
    methods: Sequence[str] | None = None,
    part: Literal["main", "curve"] = "main",
) -> list[Unit]:
    """All units of `methods` (None: all methods) at `num_steps`, in the order of the methods."""
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

    `methods/METHOD/replica-R` contains the files of a method: pictures in
    `seed-S/steps-T/000012.png`, next to them the cost of each batch, its `scores/METRIC` and its
    `features/NETWORK`. Files are written atomically. The cost is written last, so a batch is drawn
    if its cost exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def method(self, name: str, replica: int) -> Path:
        """The folder of one replica of a method."""
        return self.folder / "methods" / slug(name) / f"replica-{replica}"

    def unit(self, unit: Unit) -> Path:
        """The folder of a batch's pictures."""
        steps = f"{'curve' if unit.part == 'curve' else 'steps'}-{unit.num_steps}"
        return self.method(unit.method, unit.replica) / f"seed-{unit.seed}" / steps

    def picture(self, unit: Unit, place: int) -> Path:
        """The file of the picture of the prompt with index `place`."""
        return self.unit(unit) / f"{place:06d}.png"

    def cost(self, unit: Unit) -> Path:
        """The file of a batch's cost; it exists once the batch is drawn."""
        return self.unit(unit) / f"{unit.name}.json"

    def scores(self, metric: str, unit: Unit) -> Path:
        """The file of a batch's scores; `metric` also identifies its settings."""
        return self.unit(unit) / "scores" / metric / f"{unit.name}.json"

    def features(self, network: str, unit: Unit) -> Path:
        """The file of a batch's features; `network` also identifies its weights."""
        return self.unit(unit) / "features" / network / f"{unit.name}.safetensors"

    def reference_features(self, network: str, number: int) -> Path:
        """The file of the features of one batch of reference pictures."""
        return self.folder / "references" / "features" / network / f"{number:04d}.safetensors"

    def require(self, claim: Claim) -> None:
        """Require that existing files were made from the inputs of a claim; writes nothing.

        Raises:
            AfaError: if the inputs differ, or pictures exist without a record of their inputs.
        """
        path, what = claim.path, claim.what
        if not path.exists():
            if any(any(path.parent.glob(pattern)) for pattern in claim.files):
                raise AfaError(
                    "AFA-EVAL-029",
                    f"'{path}', the record of how the files of {what} were made, is missing. "
                    f"Restore it, or delete '{path.parent}' to make them again.",
                )
            return
        found, identity = read_json(path), json.loads(json.dumps(claim.identity))
        if found != identity:
            keys = sorted({key.split(".")[0] for key in differing(found, identity)})
            raise AfaError(
                "AFA-EVAL-030",
                f"The files of {what} in '{path.parent}' were made with another recipe or other "
                f"checkpoints; they differ in {', '.join(keys)}. Delete that folder to make them "
                "again, or pass another output folder.",
            )

    def claim(self, claims: Sequence[Claim]) -> None:
        """Record the inputs of files; if one claim is refused, none is recorded.

        Raises:
            AfaError: see `require`.
        """
        for claim in claims:
            self.require(claim)
        for claim in claims:
            if not claim.path.exists():
                write_json(claim.path, claim.identity)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def draw(
    pipeline: DiffusionPipeline,
    texts: Sequence[str],
    places: Sequence[int],
    seed: int,
    num_steps: int,
    sampling: SamplingRecipe,
    output_type: Literal["pil", "latent"] = "pil",
) -> list[Any]:
    """Draw pictures; the noise of each depends only on the seed and the index of its prompt.

    Those that cannot be drawn together are batches of their own; see `drawn_together`.

    Returns: a picture, or its latents [C, H, W], for each prompt.
    """
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + place) for place in places]
    syntax, negative = sampling.prompt_syntax, sampling.negative_prompt
    call: dict[str, Any] = {
        "height": sampling.height,
        "width": sampling.width,
        **kind_of_pipeline(pipeline).call,
    }
    found: list[Any] = [None] * len(texts)
    for batch in drawn_together(pipeline, texts, sampling):
        prompts, noise = [texts[n] for n in batch], [generators[n] for n in batch]
        what = f"A batch of {len(batch)} pictures"
        otherwise = "Or set sampling.dtype: bfloat16, or draw smaller pictures."
        remedy = smaller_batch(len(batch), "sampling.batch_size", None, otherwise)
        checked = decoded(pipeline) if output_type == "pil" else nullcontext()
        words = [words_of_prompt(prompt, syntax) for prompt in prompts]
        sampled = sampled_with(pipeline, sampling.scheduler)
        with torch.no_grad(), saying_what_fits(what, remedy), sampled:
            call |= prompt_call(pipeline, prompts, negative, sampling.guidance, syntax)
            with routed(pipeline, words, noise, **call), checked:
                drawn = pipeline(
                    num_inference_steps=num_steps,
                    generator=noise,
                    output_type=output_type,
                    **call,
                ).images
        for n, picture in zip(batch, drawn, strict=True):
            found[n] = picture
    return found


def drawn_together(
    pipeline: DiffusionPipeline, texts: Sequence[str], sampling: SamplingRecipe
) -> list[list[int]]:
    """The indices of prompts that are drawn in one batch.

    All are drawn in the same way, see `afa.drafting.way_of`, and weighted prompts have equally many
    chunks of tokens. Each is alone if only its leading experts run.
    """
    syntax = sampling.prompt_syntax
    if isinstance(getattr(denoiser_of(pipeline), "schedule", None), LeadingExperts):
        return [[n] for n in range(len(texts))]
    words = [words_of_prompt(text, syntax) for text in texts]
    return [
        [batch[n] for n in equal]
        for batch in batches(pipeline, words)
        for equal in of_equal_length(
            pipeline, [texts[n] for n in batch], sampling.negative_prompt, syntax
        )
    ]


def draw_unit(
    pipeline: DiffusionPipeline,
    unit: Unit,
    prompts: Sequence[Prompt],
    sampling: SamplingRecipe,
    store: Store,
) -> None:
    """Draw the pictures of one batch, and store them and their cost."""
    texts = [prompts[place].text for place in unit.places]
    with measure(pipeline) as cost:
        pictures = draw(pipeline, texts, unit.places, unit.seed, unit.num_steps, sampling)
    require_unchanged(pipeline)
    folder = store.cost(unit).parent
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in zip(unit.places, pictures, strict=True):
        write_png(store.picture(unit, place), picture)
    write_json(store.cost(unit), asdict(cost))


def read_cost(store: Store, unit: Unit) -> Cost:
    """Read the cost of a drawn batch."""
    return Cost(**read_json(store.cost(unit)))


def open_pictures(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """Read pictures as RGB, transparent ones on white; see `afa.reading.read_picture`.

    Raises:
        AfaError: if one is missing or damaged.
    """
    return map(read_picture, paths)
