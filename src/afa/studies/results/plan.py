"""The plan of the study: trainings, candidates of the baselines, and the comparison."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from afa.aggregators import SABWSettings
from afa.aggregators.fusion import FUSIONS
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from afa.loading.student_record import baked_guidance
from afa.studies.evaluating import sampling
from afa.studies.zoo_build.evaluate import NUM_STEPS
from afa.training.recipe import (
    DataRecipe,
    Recipe,
    ScenesRecipe,
    TrainingRecipe,
)
from afa.zoo import EXPERTS, MODELS
from afa.zoo.models import AGGREGATOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SUBJECT = "AFA"
#: rows of other aggregators: without one of the states or with fewer of them (AFA, section 4.4),
#: and with the paper's size
VARIANTS: dict[str, dict[str, Any]] = {
    "ablation: no spatial": {"spatial": False},
    "ablation: no timestep": {"timestep": False},
    "ablation: no prompt": {"prompt": False},
    "ablation: shared by width": {"sharing": "width"},
    "ablation: conv_out only": {"sites": "conv_out"},
    "AFA, the paper's size": {"hidden_ratio": None, "min_scale": 1},
}
#: rows with other numbers of experts
OTHER_EXPERTS = {
    "AFA, animals and food": ("animals", "food"),
    "AFA, things twice": ("animals", "food", "things", "things"),
}
#: rows of the tuned base: with as many steps, or as much time, as the aggregators' training
STEPS, TIME = "tuned base (steps)", "tuned base (time)"
#: rows that are also drawn with a preset of `afa.Acceleration`
SPED_UP = (SUBJECT, "add-difference merge", TIME)


def fast(row: str) -> str:
    """The name of the accelerated variant of a row."""
    return f"{row}, fast"


def training_name(row: str) -> str:
    """The name and the folder of the training of a row of `VARIANTS`."""
    return row.replace(":", "")


@dataclass(frozen=True)
class Zoo:
    """The experts of a study.

    Attributes:
        experts: sources of the experts, by domain.
        base: source of their base.
        is_main: whether it is the bundled zoo of U-Nets, with variants and block-wise merges.
    """

    experts: Mapping[str, str]
    base: str
    is_main: bool = True


SHIPPED = Zoo({name: f"zoo:{name}" for name in EXPERTS}, "zoo:base")


def transformers(folder: Path) -> Zoo:
    """The zoo in a folder of `afa zoo build --family dit`.

    Raises:
        AfaError: if models are missing.
    """
    missing = [name for name in MODELS if not (folder / name).is_dir()]
    if missing:
        raise AfaError(
            "AFA-STUDY-003",
            f"The zoo '{folder}' lacks {', '.join(missing)}. Build it: afa zoo build {folder} "
            "--family dit.",
        )
    return zoo_in(folder)


def zoo_in(folder: Path) -> Zoo:
    """The zoo in a folder with a base and an expert of each domain, which may be made later."""
    folder = folder.resolve()
    return Zoo({name: str(folder / name) for name in EXPERTS}, str(folder / "base"), is_main=False)


@dataclass(frozen=True)
class StudySettings:
    """Settings of the study; with the bundled zoo it takes 65 to 110 minutes on two cores."""

    num_train_steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    num_seeds: int = 3
    base_learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    num_mixed: int = 96
    num_own: int = 32  # of each domain
    num_tuning: int = 48  # prompts for tuning the baselines
    tuning_steps: int = 12
    num_trials: int = 100
    num_steps: int = NUM_STEPS
    curve_steps: tuple[int, ...] = (5, 10, 20, 50)
    num_curve: int = 48  # mixed prompts
    num_resamples: int = 10_000


def training(settings: StudySettings, seed: int, **changes: Any) -> TrainingRecipe:
    """Settings of one training of aggregators or of the base."""
    values = {
        "num_steps": settings.num_train_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "num_warmup_steps": min(50, settings.num_train_steps),
        "learning_rate_schedule": "cosine",
        "checkpoint_every": 100,
        "trackers": [],
        "seed": seed,
    }
    return TrainingRecipe(**{**values, **changes})


def scenes(seed: int) -> ScenesRecipe:
    """The data of one seed: all pairs of objects that are not held out."""
    return ScenesRecipe(num_samples=100_000, seed=seed + 3)


#: settings for transformers, without variants and search: 50 minutes on two cores
FEWER = StudySettings(num_seeds=2, num_own=24, num_tuning=32, curve_steps=(5, 20), num_curve=32)


def aggregator_recipes(settings: StudySettings, zoo: Zoo = SHIPPED) -> dict[str, Recipe]:
    """The recipes of all trainings of aggregators, by the name of their folder."""
    chosen = {field.name: getattr(AGGREGATOR, field.name) for field in fields(SABWSettings)}

    def recipe(experts: Sequence[str], seed: int, **switches: Any) -> Recipe:
        return Recipe(
            experts=[ExpertSource(zoo.experts[name]) for name in experts],
            allow_duplicates=len(set(experts)) < len(experts),
            data=DataRecipe(scenes=scenes(seed)),
            aggregator=SABWSettings(**{**chosen, **switches}),
            training=training(settings, seed),
        )

    recipes = {f"afa-{seed}": recipe(EXPERTS, seed) for seed in range(settings.num_seeds)}
    if not zoo.is_main:
        return recipes
    recipes |= {
        training_name(row): recipe(EXPERTS, 0, **switches) for row, switches in VARIANTS.items()
    }
    recipes |= {name: recipe(experts, 0) for name, experts in OTHER_EXPERTS.items()}
    return recipes


# -- candidates of the baselines --------------------------------------------------------------


def candidates(zoo: Zoo = SHIPPED) -> dict[str, list[dict[str, Any]]]:
    """Candidate settings of each tunable baseline, as in the recipe of a method.

    The study selects the best ones on prompts that share no pair of objects with the test.
    """
    uniform = [1 / 3] * 3
    leading = [[0.5 if n == m else 0.25 for n in range(3)] for m in range(3)]
    weights = [uniform, *leading]
    merges = {
        "weighted merge": [_merge("weighted", weights=w) for w in weights],
        "add-difference merge": [
            _merge("add_difference", weights=[w] * 3) for w in (0.05, 0.1, 0.2, 1 / 3, 0.5, 1.0)
        ],
        "SLERP merge": [_merge("slerp", weights=w) for w in weights],
        "TIES merge": [
            _merge("ties", density=d, weights=[w] * 3)
            for d, w in itertools.product((0.2, 0.5, 0.8), (0.25, 0.5, 1.0))
        ],
        "DARE merge": [
            _merge("dare", density=d, weights=[w] * 3)
            for d, w in itertools.product((0.2, 0.5, 0.8), (0.1, 0.2, 1 / 3))
        ],
    }
    if zoo.is_main:
        merges["MBW"] = [_merge("block_weights", block_weights=b) for b in block_presets()]
    return merges | {row: listed for row, listed in fusion_rows().items() if len(listed) > 1}


def fusion_rows() -> dict[str, list[dict[str, Any]]]:
    """The rows of all fusions without training, with their candidate settings."""
    return {
        row: [{"fusion": settings.model_dump(exclude_none=True)} for settings in listed]
        for fusion in FUSIONS
        for row, listed in fusion.rows(EXPERTS).items()
    }


def _merge(method: str, **settings: Any) -> dict[str, Any]:
    return {"merge": {"method": method, **settings}}


def block_presets() -> list[dict[str, list[float]]]:
    """Typical manual block weights, in which a different expert leads at each depth.

    All orders of the experts over shallow, middle and deep blocks, with hard and soft weights, and
    uniform weights for the text encoders.
    """
    depths = (
        ("conv_in", "down.0.0", "down.0.downsample"),
        ("down.1.0", "mid", "up.0.0"),
        ("up.0.1", "up.1.0", "conv_out"),
    )
    presets = []
    for order, lead in itertools.product(itertools.permutations(range(3)), (1.0, 0.6)):
        rest = (1 - lead) / 2
        weights = {"default": [1 / 3] * 3}
        for sites, leader in zip(depths, order, strict=True):
            vector = [lead if n == leader else rest for n in range(3)]
            weights |= {site: vector for site in sites}
        presets.append(weights)
    return presets


# -- the comparison ---------------------------------------------------------------------------

_JUDGES = [
    "scenes",
    {"name": "clip_t", "weights": "zoo:clip"},
    {"name": "clip_i", "weights": "zoo:clip"},
    {"name": "fid", "weights": "zoo:clip"},
    {"name": "kid", "weights": "zoo:clip"},
    {"name": "cmmd", "weights": "zoo:clip"},
]


def tuning_prompts(settings: StudySettings) -> dict[str, Any]:
    """Mixed prompts of pairs that are not in the test."""
    return {"zoo": {"kinds": {"mixed": settings.num_tuning}, "held_out": False, "seed": 2_000_000}}


def tuning_recipe(
    settings: StudySettings, bases: dict[str, Path], zoo: Zoo = SHIPPED
) -> dict[str, Any]:
    """The recipe that compares all candidates, and bases tuned with several learning rates."""
    methods = [
        {"name": f"{name} {n}", **candidate}
        for name, listed in candidates(zoo).items()
        for n, candidate in enumerate(listed)
    ]
    methods += [{"name": name, "model": str(folder)} for name, folder in bases.items()]
    return {
        "experts": list(zoo.experts.values()),
        "base": zoo.base,
        "prompts": tuning_prompts(settings),
        "methods": methods,
        "sampling": sampling(settings.tuning_steps),
        "metrics": ["scenes"],
        "num_resamples": 100,
    }


def search_recipe(settings: StudySettings, zoo: Zoo = SHIPPED) -> dict[str, Any]:
    """The recipe of autoMBW's search, on the prompts for tuning."""
    return {
        "experts": list(zoo.experts.values()),
        "prompts": tuning_prompts(settings),
        "sampling": sampling(settings.tuning_steps),
        "metric": "scenes",
        "num_trials": settings.num_trials,
    }


def student_methods(folders: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """The rows of distilled models in a recipe of `afa evaluate`.

    Args:
        folders: of `afa distill`, by row: complete models, or LoRAs on the base. A student with
            guidance in its prediction is drawn with guidance 1.
    """
    methods = []
    for row, places in folders.items():
        models: list[Any] = [str(place) for place in places]
        if (places[0] / "lora.safetensors").exists():
            models = [
                {"base": "zoo:base", "lora": str(place / "lora.safetensors")} for place in places
            ]
        guidance = {} if baked_guidance(places[0]) is None else {"guidance": 1.0}
        methods.append({"name": row, "model": models, **guidance})
    return methods


def comparison_recipe(
    settings: StudySettings,
    trained: dict[str, Path],
    tuned: dict[str, list[Path]],
    chosen: dict[str, dict[str, Any]],
    zoo: Zoo = SHIPPED,
    students: Mapping[str, Sequence[Path]] | None = None,
) -> dict[str, Any]:
    """The recipe of `afa evaluate` for the comparison.

    Args:
        settings: settings of the study.
        trained: folders of ensembles, by the name of their training.
        tuned: folders of tuned bases, by row.
        chosen: selected settings, by baseline.
        zoo: the experts.
        students: folders of distilled models, by row; see `student_methods`.
    """
    seeds = [str(trained[f"afa-{seed}"]) for seed in range(settings.num_seeds)]
    methods: list[dict[str, Any]] = [{"name": SUBJECT, "ensemble": seeds}]
    methods += [{"name": name, **selected} for name, selected in chosen.items()]
    methods += [
        {"name": row, **listed[0]} for row, listed in fusion_rows().items() if len(listed) == 1
    ]
    methods += [
        {"name": f"expert: {name}", "model": source} for name, source in zoo.experts.items()
    ]
    methods.append({"name": "base", "model": zoo.base})
    methods += [{"name": row, "model": [str(f) for f in folders]} for row, folders in tuned.items()]
    methods += student_methods(students or {})
    if zoo.is_main:
        methods += [{"name": row, "ensemble": str(trained[training_name(row)])} for row in VARIANTS]
        methods += [{"name": name, "ensemble": str(trained[name])} for name in OTHER_EXPERTS]
    accelerated = [
        {**method, "name": fast(method["name"]), "acceleration": "fast"}
        for method in methods
        if method["name"] in SPED_UP
    ]
    methods += accelerated
    kinds = {"mixed": settings.num_mixed} | {name: settings.num_own for name in EXPERTS}
    return {
        "experts": list(zoo.experts.values()),
        "base": zoo.base,
        "prompts": {"zoo": {"kinds": kinds}},
        "methods": methods,
        "sampling": sampling(settings.num_steps),
        "metrics": _JUDGES,
        "subject": SUBJECT,
        "curve": {
            "num_steps": list(settings.curve_steps),
            "also": ["base", *tuned, *(method["name"] for method in accelerated)],
            "limit": settings.num_curve,
        },
        "num_resamples": settings.num_resamples,
    }
