"""The plan of the study: its parts, students and their recordings, and the comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.distilling.recipe import DistillRecipe
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.expert_source import ExpertSource
from afa.loading.student_record import baked_guidance
from afa.studies.distillation.parts import Part
from afa.studies.evaluating import sampling
from afa.studies.zoo_build.build import ZooRecipe
from afa.studies.zoo_build.evaluate import GUIDANCE_SCALE
from afa.studies.zoo_build.transformer import TransformerRecipe
from afa.studies.zoos import SHIPPED, transformers
from afa.training.recipe import TrainingRecipe
from afa.zoo import EXPERTS
from afa.zoo.scenes import evaluation_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TEACHER, BASE = "teacher", "base"
FULL, GUIDED, LORA = "distilled", "distilled, guided", "distilled LoRA (rank 16)"
SELF = "animals, distilled from itself"
#: the base trained on pictures for the time of the teacher's training, the recording and the
#: student's training together
TUNED = "tuned base (total time)"
#: names of teachers
ENSEMBLE, ANIMALS, TRANSFORMERS = "ensemble", "animals", "transformers"
_TRANSFORMERS = TransformerRecipe()
NUM_MEASURED = 60  # pictures and steps whose time is measured
RECORDED_AT_ONCE = 20  # pictures of a batch


@dataclass(frozen=True)
class Settings:
    """Settings of the study; nothing was chosen on its test prompts.

    The settings of the trainings are those of a first trial on other prompts.
    """

    num_seeds: int = 3
    num_trajectories: int = 1000
    num_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    drawn_steps: tuple[int, ...] = (12, 20, 30)
    curve_trajectories: tuple[int, ...] = (100, 300, 3000)
    curve_steps: tuple[int, ...] = (250, 500, 1000, 4000)
    ranks: tuple[int, ...] = (4, 64)
    num_prompts: int = 3000  # to record
    num_mixed: int = 144
    num_own: int = 48  # of each domain
    test_seed: int = 7_000_000
    base_batch_size: int = 16
    base_learning_rate: float = 3e-4  # the better one of two on prompts of other pairs
    num_validation: int = 256  # predictions of pictures that are not trained on
    num_resamples: int = 10_000
    transformers: TransformerRecipe = _TRANSFORMERS
    num_aggregator_steps: int = 500  # of the ensemble of transformers
    teacher_steps: int = ZooRecipe.ensemble_steps  # of the bundled aggregators, for their cost


@dataclass(frozen=True)
class Student:
    """A student of the study.

    Attributes:
        row: its row in the tables; students that differ in the seed share one.
        seed: of recording and training.
        number: of pictures that the teacher draws; None for that of the settings.
        steps: of training; None for those of the settings.
        rank: of a LoRA; None for a complete model.
        bakes_in: whether it learns the guided prediction.
        teacher: see `teacher_of`.
        records_alone: whether it shares its recording with no other student.
    """

    row: str
    seed: int = 0
    number: int | None = None
    steps: int | None = None
    rank: int | None = None
    bakes_in: bool = False
    teacher: str = ENSEMBLE
    records_alone: bool = False

    @property
    def folder(self) -> str:
        """The name of its folder."""
        kept = "".join(c if c.isalnum() else "-" for c in f"{self.row} {self.seed}")
        return "-".join(filter(None, kept.split("-")))

    @property
    def recording(self) -> str:
        """The name of the folder of recorded predictions, which several students share."""
        return f"{self.row if self.records_alone else self.teacher}-{self.seed}"


#: the student whose recording and training are timed
MEASURED = Student("measured", number=NUM_MEASURED, steps=NUM_MEASURED, records_alone=True)


def students(settings: Settings, part: Part) -> list[Student]:
    """The students of a part."""
    if part == Part.MAIN:
        return [
            student
            for seed in range(settings.num_seeds)
            for student in (
                Student(FULL, seed),
                Student(GUIDED, seed, bakes_in=True),
                Student(LORA, seed, rank=16),
            )
        ]
    if part == Part.VARIANTS:
        return [
            *(Student(f"distilled LoRA (rank {rank})", rank=rank) for rank in settings.ranks),
            *(Student(f"distilled, {n:,} steps", steps=n) for n in settings.curve_steps),
            *(Student(f"distilled, {n:,} pictures", number=n) for n in settings.curve_trajectories),
            Student(SELF, number=300, steps=500, teacher=ANIMALS),
        ]
    if part == Part.TRANSFORMERS:
        return [
            Student(named(part, FULL), teacher=TRANSFORMERS),
            Student(named(part, GUIDED), teacher=TRANSFORMERS, bakes_in=True),
        ]
    return []


def named(part: Part, row: str) -> str:
    """The name of a row in a part; those of transformers are told apart from the bundled zoo's."""
    return f"{part}: {row}" if part == Part.TRANSFORMERS else row


def zoo_of(work: Path) -> Path:
    """The folder of the zoo of transformers."""
    return work / "transformers" / "zoo"


def teacher_of(name: str, work: Path) -> tuple[dict[str, str], str]:
    """A teacher, as in a recipe of `afa distill`, and the model where its students start.

    Args:
        name: `ENSEMBLE`, `ANIMALS` or `TRANSFORMERS`.
        work: folder of the study.
    """
    if name == ANIMALS:
        return {"model": "zoo:animals"}, "zoo:animals"
    if name == TRANSFORMERS:
        trained = work / "transformers" / "ensemble"
        return {"ensemble": str(trained)}, str(zoo_of(work) / "base")
    return {"ensemble": "zoo:ensemble"}, "zoo:base"


def prompts(settings: Settings) -> list[str]:
    """The prompts that teachers draw: pairs of the training sets, without any test prompt."""
    tests = set(captions_of_test(settings))
    share = {"mixed": settings.num_prompts // 2} | {
        name: settings.num_prompts // 2 // len(EXPERTS) for name in EXPERTS
    }
    found: list[str] = []
    for kind, count in share.items():
        available = _distinct(kind, count + settings.num_own)
        found += [caption for caption in available if caption not in tests][:count]
    return found


def _distinct(kind: Any, count: int) -> list[str]:
    """Up to `count` distinct captions of a kind."""
    while True:
        try:
            return evaluation_prompts(count, kind=kind, seed=5, held_out=False)
        except AfaError:
            count -= 1 + count // 20


def captions_of_test(settings: Settings) -> list[str]:
    """The captions of the test."""
    return [
        caption
        for kind, count in _kinds(settings).items()
        for caption in evaluation_prompts(count, kind=kind, seed=settings.test_seed)  # type: ignore[arg-type]
    ]


def _kinds(settings: Settings) -> dict[str, int]:
    return {"mixed": settings.num_mixed} | {name: settings.num_own for name in EXPERTS}


def distill_recipe(student: Student, settings: Settings, work: Path) -> DistillRecipe:
    """The recipe of a student."""
    teacher, init = teacher_of(student.teacher, work)
    chosen: dict[str, Any] = {"init": ExpertSource(init)}
    if student.rank is not None:
        chosen |= {"what": "lora", "rank": student.rank}
    return DistillRecipe.model_validate(
        {
            "teacher": teacher,
            "student": chosen,
            "trajectories": {
                "prompts": {"text": work / "prompts.txt"},
                "number": student.number or settings.num_trajectories,
                "num_steps": list(settings.drawn_steps),
                "guidance": GUIDANCE_SCALE,
                "seed": student.seed,
            },
            "recording": {
                "folder": work / "recorded" / student.recording,
                "batch_size": RECORDED_AT_ONCE,
                "num_threads": 1,
            },
            "guidance": {"bake_in": GUIDANCE_SCALE} if student.bakes_in else "keep",
            "training": {
                "num_steps": student.steps or settings.num_steps,
                "batch_size": settings.batch_size,
                "learning_rate": settings.learning_rate,
                "num_warmup_steps": 50,
                "checkpoint_every": 250,
                "keep_checkpoints": 1,
                "trackers": [],
                "device": "cpu",
                "seed": student.seed,
            },
            "validation": {"num_samples": settings.num_validation, "every": 250},
        }
    )


def tuning(settings: Settings, seed: int, num_steps: int) -> TrainingRecipe:
    """The settings of the base that is tuned on pictures."""
    return TrainingRecipe(
        num_steps=num_steps,
        batch_size=settings.base_batch_size,
        learning_rate=settings.base_learning_rate,
        num_warmup_steps=50,
        learning_rate_schedule="cosine",
        checkpoint_every=250,
        trackers=[],
        seed=seed,
    )


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


def merges_of(part: Part) -> dict[str, dict[str, Any]]:
    """The static merges that are compared in a part, as methods of `afa evaluate`.

    An earlier comparison of merges chose their settings on pairs of objects that are in no test.
    """
    chosen: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("merges.json"))
    return chosen.get(str(part), {})


def comparison(
    part: Part,
    settings: Settings,
    work: Path,
    folders: Mapping[str, Sequence[Path]],
    merges: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The recipe of `afa evaluate` that compares the rows of a part with its teacher.

    Args:
        part: of the study.
        settings: of the study.
        work: folder of the study.
        folders: of students and tuned bases, by row.
        merges: settings of static merges, by row.
    """
    is_other = part == Part.TRANSFORMERS
    zoo = transformers(zoo_of(work)) if is_other else SHIPPED
    teacher, _ = teacher_of(TRANSFORMERS if is_other else ENSEMBLE, work)
    methods: list[dict[str, Any]] = [{"name": named(part, TEACHER), **teacher}]
    methods += student_methods(folders)
    methods.append({"name": named(part, BASE), "model": zoo.base})
    experts = {Part.VARIANTS: (ANIMALS,), Part.BUDGET: ()}.get(part, EXPERTS)
    methods += [
        {"name": named(part, f"expert: {name}"), "model": zoo.experts[name]} for name in experts
    ]
    methods += [{"name": named(part, row), **chosen} for row, chosen in merges.items()]
    return {
        "experts": list(zoo.experts.values()),
        "base": zoo.base,
        "prompts": {"zoo": {"kinds": _kinds(settings), "seed": settings.test_seed}},
        "methods": methods,
        "sampling": sampling(20),
        "metrics": [
            "scenes",
            {"name": "clip_t", "weights": "zoo:clip"},
            {"name": "clip_i", "weights": "zoo:clip"},
            {"name": "fid", "weights": "zoo:clip"},
            {"name": "cmmd", "weights": "zoo:clip"},
        ],
        "num_resamples": settings.num_resamples,
    }
