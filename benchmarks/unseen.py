"""Judge aggregators on objects that none of their training pictures shows, on emoji scenes.

    python -m benchmarks.unseen runs/unseen --zoo runs/categories    # resumes

Experts and base know all objects. The aggregators are trained on scenes without a quarter of each
domain's objects, and there are several choices of this quarter. Mixed prompts are grouped by how
many of their objects were unseen, prompts of one domain by whether both were. Pairs of seen objects
are held out of the base's training, too; most other pairs are not, since there are too few, so the
base has an advantage there. Rows: the base, the
experts, the uniform merge, the aggregators of each variant with one training per seed, drafts
without aggregators, and a mask that knows which expert owns which half, as the ceiling.

`benchmarks.unseen_prompts` has the prompts, for development only. The outcomes of every picture go
to `docs/unseen`, from which `benchmarks.unseen_outcomes` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from afa.denoisers.kinds import denoiser_of
from afa.drafting import DraftsRecipe
from afa.evaluation.recipe import slug
from afa.files import write_atomic
from afa.loading.expert_source import ExpertSource
from afa.loading.pipeline import load_pipeline, with_rules
from afa.studies.evaluating import evaluate_in_processes, sampling
from afa.studies.jobs import Job, run_jobs, train_aggregators_job
from afa.studies.results.comparison import write_prompts
from afa.studies.results.rivals.oracle_mask import HalfMask
from afa.studies.trainings import aggregators
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE, draw_pictures
from afa.studies.zoos import SHIPPED, Zoo, zoo_in
from afa.training.encoding import encode_captions
from afa.training.recipe import PromptedPictures
from afa.zoo import EXPERTS
from afa.zoo.judges import judge, load_classifier
from afa.zoo.scenes import BACKGROUNDS, caption_of, parse_caption
from afa.zoo.sprites import DOMAIN_OF, OBJECTS
from benchmarks.unseen_outcomes import (
    BASE,
    DOCS,
    DRAFTS,
    EXPERT,
    FOLDER,
    KEPT,
    Outcomes,
    write_outcomes,
)
from benchmarks.unseen_prompts import (
    CHOICES,
    prompts_of,
    training_prompts,
    unseen_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from afa.training.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """Changes to a training recipe.

    Attributes:
        aggregator: settings of the section `aggregator`.
        training: settings of the section `training`.
        with_base: whether the base is one more expert.
        drawn: number of training pictures that the experts draw by drafts, from captions of all
            objects.
        is_real: whether scenes without the unseen objects are training pictures; as many as drawn
            ones, if there are such.
    """

    aggregator: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    with_base: bool = False
    drawn: int = 0
    is_real: bool = True


#: by name; the first one is the paper's
VARIANTS = {
    "AFA": Variant(),
    "AFA without prompt": Variant({"prompt": False}),
    **{f"noise {level:g}": Variant(training={"prompt_noise": level}) for level in (0.5, 1, 2)},
    "with base": Variant(with_base=True),
    "prompts and scenes": Variant(drawn=1_000),
    "prompts alone": Variant(drawn=1_000, is_real=False),
    **{
        f"noise {level:g}, with base": Variant(training={"prompt_noise": level}, with_base=True)
        for level in (0.5, 1, 2)
    },
}
#: the tokens of both objects in a caption
_PLACES = (2, 8)


def recipe(num_steps: int, zoo: Zoo, variant: str, choice: int, seed: int, work: Path) -> Recipe:
    """Return the training recipe of a variant, on scenes without the unseen objects."""
    whole = aggregators(seed, num_steps, zoo)
    scenes = whole.data.scenes
    assert scenes is not None, "it is trained on scenes"
    changed = {"without": sorted(unseen_of(choice)), "hold_out": "fifth"}
    scenes = scenes.model_copy(update=changed)
    changes = VARIANTS[variant]
    base = [ExpertSource(zoo.base)] if changes.with_base else []
    prompts = None
    if changes.drawn:
        scenes = scenes.model_copy(update={"num_samples": changes.drawn})
        file = work / "training-prompts.txt"
        write_atomic(file, "\n".join(training_prompts(changes.drawn)) + "\n")
        prompts = PromptedPictures(
            file=file,
            drafts=DraftsRecipe(judge=ExpertSource(zoo.base)),
            number=changes.drawn,
            num_steps=10,
            guidance=GUIDANCE_SCALE,
            batch_size=20,
        )
    return whole.model_copy(
        update={
            "experts": [*whole.experts, *base],
            "data": whole.data.model_copy(
                update={"scenes": scenes if changes.is_real else None, "prompts": prompts}
            ),
            "aggregator": replace(whole.aggregator, **changes.aggregator),
            "training": whole.training.model_copy(update=changes.training),
        }
    )


def comparison(
    work: Path,
    zoo: Zoo,
    choice: int,
    folders: Mapping[str, Sequence[Path]],
    count: int,
    *,
    has_references: bool = True,
    has_kept: bool = False,
) -> dict[str, Any]:
    """Return the recipe of `afa evaluate` for a choice; writes its prompts."""
    methods: list[dict[str, Any]] = [
        {"name": name, "ensemble": [str(folder) for folder in listed]}
        for name, listed in folders.items()
    ]
    if has_kept:
        kept = {"drafts": {"judge": zoo.base, "aggregators": "keep"}}
        trained = [each for each in methods if VARIANTS[each["name"]].is_real]
        methods += [{**each, "name": f"{each['name']}{KEPT}", **kept} for each in trained]
    if has_references:
        drafts = {"drafts": {"judge": zoo.base}}
        methods.append({"name": DRAFTS, "fusion": {"rule": "feature_mean"}, **drafts})
        methods.append({"name": BASE, "model": zoo.base})
        methods += [{"name": f"{EXPERT}{name}", "model": zoo.experts[name]} for name in EXPERTS]
        merge = {"method": "weighted", "weights": [1 / 3] * 3}
        methods.append({"name": "uniform merge", "merge": merge})
    file = write_prompts(work / f"prompts-{choice}.csv", prompts_of(choice, count))
    return {
        "experts": list(zoo.experts.values()),
        "prompts": {"drawbench": str(file)},
        "methods": methods,
        "sampling": sampling(10),
        "metrics": ["scenes"],
        "num_resamples": 10_000,
    }


def judge_oracle(zoo: Zoo, prompts: Mapping[str, Sequence[str]], size: int = 16) -> list[bool]:
    """Whether the mask that knows the layout and the domains draws each prompt right."""
    pipeline, mask = load_pipeline(list(zoo.experts.values())), HalfMask()
    pipeline = with_rules(pipeline, [mask for _ in denoiser_of(pipeline).sites])
    classifier, found = load_classifier(), []
    for captions in prompts.values():
        for start in range(0, len(captions), size):
            batch = captions[start : start + size]
            shown = [parse_caption(caption) for caption in batch]
            mask.owners = [
                (EXPERTS.index(DOMAIN_OF[s.left]), EXPERTS.index(DOMAIN_OF[s.right])) for s in shown
            ]
            pictures = draw_pictures(pipeline, batch, seed=start, num_steps=10, batch_size=size)
            found += [verdict.both for verdict in judge(classifier, pictures, batch)]
    return found


@torch.no_grad()
def probe(zoo: Zoo, choice: int, num_contexts: int = 24) -> float:
    """Return how often the domain of an unseen object can be told from its token's embedding.

    A ridge regression from the embeddings, averaged over the experts, of the seen objects in
    captions of scenes to their domains. Its penalty is the best one for seen objects, of which a
    quarter at a time is left out.
    """
    pipelines = [load_pipeline([source]) for source in zoo.experts.values()]
    order = random.Random(choice)
    embeddings, names = [], []
    for name in OBJECTS:
        others = order.sample(sorted({*OBJECTS} - {name}), num_contexts)
        captions = [
            caption_of(*pair, order.choice(list(BACKGROUNDS)))
            for n, other in enumerate(others)
            for pair in [(name, other) if n % 2 == 0 else (other, name)]
        ]
        places = torch.tensor([_PLACES[n % 2] for n in range(num_contexts)])
        texts = torch.stack([encode_captions(each, captions)["text"] for each in pipelines])
        embeddings.append(texts.mean(0)[torch.arange(num_contexts), places])
        names.append(name)
    found = torch.stack(embeddings).double()
    labels = torch.tensor([EXPERTS.index(DOMAIN_OF[name]) for name in names])
    unseen = torch.tensor([name in unseen_of(choice) for name in names])

    def right(train: Tensor, test: Tensor, penalty: float) -> float:
        features = found[train].flatten(0, 1)
        mean, scale = features.mean(0), features.std(0)
        targets = F.one_hot(labels[train], len(EXPERTS)).double().repeat_interleave(num_contexts, 0)
        features = (features - mean) / scale
        gram = features.T @ features / len(features)
        gram += penalty * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram, features.T @ (targets - targets.mean(0)) / len(features))
        guessed = (((found[test] - mean) / scale) @ weights + targets.mean(0)).argmax(-1)
        return float((guessed == labels[test][:, None]).double().mean())

    fold = torch.arange(len(names)) % 4
    folds = [(~unseen & (fold != n), ~unseen & (fold == n)) for n in range(4)]
    folds = [(train, test) for train, test in folds if test.any()]
    best = max(
        (10.0**n for n in range(-4, 2)),
        key=lambda penalty: sum(right(train, test, penalty) for train, test in folds),
    )
    return right(~unseen, unseen, best)


def _folder(variant: str, choice: int, seed: int) -> str:
    """The name of a training's folder; trainings without scenes are the same for all choices."""
    parts = [slug(variant), *([str(choice)] if VARIANTS[variant].is_real else []), str(seed)]
    return "-".join(parts)


def main() -> None:
    """Train and judge all variants, then print a table per choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--zoo", type=Path, help="folder of base and experts; default: bundled")
    parser.add_argument("--name", default="bundled", help="of the zoo; starts the outcomes' files")
    parser.add_argument("--outcomes", type=Path, default=DOCS / FOLDER)
    parser.add_argument("--choices", type=int, nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--num-train-steps", type=int, default=700)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--only", action="store_true", help="Only the variants, without drafts.")
    parser.add_argument("--kept", action="store_true", help="Also drafts beside the aggregators.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    zoo = SHIPPED if arguments.zoo is None else zoo_in(arguments.zoo)
    num_processes = arguments.processes
    trained = {
        (variant, choice): [
            work / "trained" / _folder(variant, choice, seed) for seed in range(arguments.num_seeds)
        ]
        for variant in arguments.variants
        for choice in arguments.choices
    }
    jobs = {
        folder: Job(
            folder.name,
            train_aggregators_job,
            (recipe(arguments.num_train_steps, zoo, variant, choice, seed, work), folder),
        )
        for (variant, choice), listed in trained.items()
        for seed, folder in enumerate(listed)
    }
    for event in run_jobs(list(jobs.values()), num_processes):
        if event.done % 50 == 0:
            sys.stderr.write(f"{event.name}: step {event.done} of {event.total}\n")
    for choice in arguments.choices:
        listed = {variant: trained[variant, choice] for variant in arguments.variants}
        output = work / f"comparison-{choice}"
        compared = comparison(
            work,
            zoo,
            choice,
            listed,
            arguments.num_prompts,
            has_references=not arguments.only,
            has_kept=arguments.kept,
        )
        evaluate_in_processes(output, compared, num_processes)
        if arguments.only:
            continue
        place = output / "oracle.json"  # prompts of this folder never change
        if not place.exists():
            found = judge_oracle(zoo, prompts_of(choice, arguments.num_prompts))
            write_atomic(place, json.dumps(found) + "\n")
        about = {
            "zoo": arguments.name,
            "choice": choice,
            "unseen": sorted(unseen_of(choice)),
            "num_train_steps": arguments.num_train_steps,
            "trainings": arguments.variants,
            "trained_on_scenes": [each for each in arguments.variants if VARIANTS[each].is_real],
        }
        path = arguments.outcomes / f"{arguments.name}-{choice}.json"
        write_outcomes(path, compared, output, json.loads(place.read_text()), about)
        print("\n".join(Outcomes([json.loads(path.read_text())]).table()))  # noqa: T201


if __name__ == "__main__":
    main()
