"""Train a world's base and experts, in processes and resumable."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.files import read_json, staged, write_atomic
from afa.machine.ownership import owned
from afa.studies.jobs import Job, report_progress, run_jobs
from afa.studies.worlds.pack import RECIPE, SCORES, round_to_half, unpack_world
from afa.studies.worlds.prompts import groups_of, prompts_of
from afa.studies.worlds.recipe import BASE, POOLED, TEXT, WIDE, WIDE_CHANNELS, WorldRecipe
from afa.studies.worlds.text import train_contrastively, use_text_encoder
from afa.studies.zoo_build.evaluate import draw_pictures, scores_of
from afa.studies.zoo_build.workshop import (
    StableDiffusion,
    Workshop,
    encode_scenes,
    require_same_recipe,
    train_text_to_image,
)
from afa.zoo import expert_folder
from afa.zoo.judges import judge, load_classifier
from afa.zoo.models import WORDS, build_clip, build_tokenizer, build_unet
from afa.zoo.scenes import Scene, scene
from afa.zoo.sprites import CATEGORY, hash_sprites, load_sprites

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor

    from afa.studies.jobs import JobProgress
    from afa.studies.zoo_build.fit import FitStep

REPORT = "report.json"
#: what determines a base, which a world that starts from another one shares with it
_OF_BASE = (
    *("private", "base_steps", "batch_size", "learning_rate", "caption_dropout", "text_steps"),
    *("category_share", "num_scenes", "seed"),
)


@dataclass(frozen=True)
class WorldShop(Workshop[WorldRecipe]):
    """The inputs of the stages of a world, whose data are named by the model that they train."""

    def scene(self, index: int, kind: str, stream: int = 0) -> Scene:
        """The scene at `index` of a stream of a model's data."""
        model = self.recipe.shown_to_text(index) if kind == TEXT else kind
        chosen, without = self.recipe.shown(model)
        seed = self.recipe.seed + stream
        return scene(index, kind=chosen, seed=seed, without=without, hold_out="fifth")


def build_world(
    folder: Path,
    recipe: WorldRecipe,
    num_processes: int,
    packed: Path | None = None,
    without: Collection[str] = (),
) -> Iterator[JobProgress]:
    """Train all models of a world, or resume.

    Args:
        folder: gets `base`, the experts and `pooled` as diffusers pipelines, and `report.json` with
            their scores on development prompts.
        recipe: the world.
        num_processes: number of processes with one thread each.
        packed: folder of `afa.studies.worlds.pack.pack_world`, whose models are not trained again.
        without: models that are not trained, since nothing needs them any more.

    Yields:
        The progress.

    Raises:
        AfaError: if the folder belongs to another recipe, the world from which this one starts is
            missing or has another base, or the pack is of another world.
    """
    _require_start(recipe)
    folder = folder.resolve()
    with owned(folder):
        # the base of another world is compared with this one's settings instead
        require_same_recipe(folder / RECIPE, recipe.model_dump(mode="json", exclude={"start"}))
        if packed is not None:
            unpack_world(packed, folder)
        yield from run_jobs([Job(BASE, base_job, (recipe, folder))], 1)
        others = [*([POOLED] if recipe.pooled_steps else []), *([WIDE] if recipe.is_wide else [])]
        others = [name for name in others if name not in without]
        names = [*recipe.experts, *others]  # experts first, which other stages wait for
        yield from run_jobs([Job(n, model_job, (recipe, folder, n)) for n in names], num_processes)
        names = [BASE, *names]
        graded = [Job(f"scores of {n}", grade_job, (recipe, folder, n)) for n in names]
        yield from run_jobs(graded, num_processes)
        report = {name: read_json(folder / SCORES / f"{name}.json") for name in names}
        write_atomic(folder / REPORT, json.dumps(report, indent=2) + "\n")


def _require_start(recipe: WorldRecipe) -> None:
    """Check that the world from which another one starts is there and has the same base."""
    if recipe.start is None:
        return
    if not (recipe.start / BASE / "model_index.json").is_file():
        raise AfaError(
            "AFA-STUDY-013",
            f"This world starts from the base of '{recipe.start}', which has none. Build that "
            f"world first, with afa zoo build {recipe.start} --world NAME.",
        )
    other = read_json(recipe.start / RECIPE)
    own = recipe.model_dump(mode="json")
    wrong = [key for key in _OF_BASE if own[key] != other.get(key)]
    if wrong:
        raise AfaError(
            "AFA-STUDY-014",
            f"The base of '{recipe.start}' is another one than this world's: {', '.join(wrong)} "
            "differ. Set them as there, or remove start.",
        )


def base_job(name: str, recipe: WorldRecipe, folder: Path) -> None:
    """Train the text encoder and the base, or copy them from the world to start with."""
    place = folder / BASE
    if place.exists():
        return
    if recipe.start is not None:
        with staged(place) as partial:
            shutil.copytree(recipe.start / BASE, partial, dirs_exist_ok=True)
        return
    tokenizer = build_tokenizer(folder / "tokenizer", sorted({*WORDS, *CATEGORY.values()}))
    shop, vae = WorldShop(folder, recipe, load_sprites(), tokenizer), _autoencoder()
    torch.manual_seed(recipe.seed)
    clip = build_clip(tokenizer)
    _report(name, train_contrastively(shop, clip))
    torch.manual_seed(recipe.seed)
    model = StableDiffusion(tokenizer)
    use_text_encoder(clip, model)
    _train(name, shop, vae, model, BASE, hash_weights(clip))


def model_job(name: str, recipe: WorldRecipe, folder: Path, model: str) -> None:
    """Fine-tune the base to one expert, or to the pooled model."""
    if (folder / model).exists():
        return
    started = StableDiffusionPipeline.from_pretrained(folder / BASE, safety_checker=None)
    shop = WorldShop(folder, recipe, load_sprites(), started.tokenizer)
    if model == WIDE:
        torch.manual_seed(recipe.seed)
        trained = StableDiffusion(started.tokenizer, build_unet(WIDE_CHANNELS))
        trained.text_encoder.load_state_dict(started.text_encoder.state_dict())
        trained.text_encoder.requires_grad_(False)
        _train(name, shop, _autoencoder(), trained, WIDE, hash_weights(started.text_encoder))
        return
    trained = StableDiffusion(started.tokenizer)
    trained.unet.load_state_dict(started.unet.state_dict())
    trained.text_encoder.load_state_dict(started.text_encoder.state_dict())
    trained.text_encoder.requires_grad_(False)
    _train(name, shop, _autoencoder(), trained, model, hash_weights(trained))


def _train(
    name: str,
    shop: WorldShop,
    vae: AutoencoderKL,
    model: StableDiffusion,
    what: str,
    made_from: str,
) -> None:
    """Train a model on its data, and write its pipeline.

    The wide model is trained like the base, then like the pooled model.
    """
    recipe = shop.recipe
    everything = [*recipe.experts, BASE]
    plans = {
        BASE: [(BASE, [BASE], recipe.base_steps)],
        POOLED: [(POOLED, everything, recipe.pooled_steps)],
        WIDE: [
            (f"{WIDE}-{BASE}", [BASE], recipe.base_steps),
            (WIDE, everything, recipe.pooled_steps),
        ],
    }
    plan = plans.get(what, [(what, [what], recipe.expert_steps)])
    rate = recipe.learning_rate if what in plans else recipe.expert_learning_rate
    made_from = f"{hash_weights(vae)} {hash_sprites(shop.sprites)} {made_from}"
    for stage, sets, steps in plan:
        latents, token_ids = _data(shop, vae, sets)
        scaled = latents * vae.config.scaling_factor
        events = train_text_to_image(shop, stage, model, scaled, token_ids, steps, made_from, rate)
        _report(name, events)
    pipeline = model.pipeline(shop.tokenizer, vae)
    round_to_half(pipeline)
    with staged(shop.folder / what) as partial:
        pipeline.save_pretrained(partial)


def _data(shop: WorldShop, vae: AutoencoderKL, names: Iterable[str]) -> tuple[Tensor, Tensor]:
    """The latents and token ids of the data of some models together."""
    found = [encode_scenes(shop, vae, name) for name in names]
    return torch.cat([latents for latents, _ in found]), torch.cat([ids for _, ids in found])


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(expert_folder("base") / "vae").requires_grad_(False)


def _report(name: str, events: Iterable[FitStep]) -> None:
    for step in events:
        report_progress(f"{name}: {step.name}", step.step, step.num_steps)


def grade_job(name: str, recipe: WorldRecipe, folder: Path, model: str) -> None:
    """Score a model on development prompts."""
    place = folder / SCORES / f"{model}.json"
    if place.exists():
        return
    place.parent.mkdir(exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / model, safety_checker=None)
    classifier, scores = load_classifier(), dict[str, Any]()
    prompts = prompts_of(recipe, "development", recipe.num_graded)
    for done, group in enumerate(groups_of(recipe), start=1):
        verdicts = judge(classifier, draw_pictures(pipeline, prompts[group]), prompts[group])
        scores[group] = {key: asdict(each) for key, each in scores_of(verdicts).items()}
        report_progress(name, done, len(prompts))
    write_atomic(place, json.dumps(scores, indent=2) + "\n")
