"""The parts of a round that train: to the end, stopped and resumed, and abandoned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import denoiser_of
from afa.drawing.pictures import draw, identity_of, prepare
from afa.training import Recipe, Stopped, TrainStep, train
from benchmarks.soak.drawn import asked_for

if TYPE_CHECKING:
    from benchmarks.soak.fixtures import Round

NUM_STEPS = 4


def recipe(data: dict[str, Any], **training: Any) -> Recipe:
    """Return a training recipe for the zoo that takes seconds, with all monitoring."""
    settings = {
        "num_steps": NUM_STEPS,
        "batch_size": 2,
        "num_warmup_steps": 0,
        "checkpoint_every": 2,
        "log_every": 2,
        "device": "cpu",
    }
    return Recipe.model_validate(
        {
            "experts": ["zoo:animals", "zoo:food"],
            "data": {"resolution": 64, **data},
            "aggregator": {
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "norm_num_groups": 4,
            },
            "training": {**settings, **training},
            "validation": {"num_samples": 2, "every": 2},
            "previews": {"prompts": ["a fox", "a pizza"], "every": 4, "num_steps": 2},
        }
    )


def to_the_end(this: Round) -> None:
    """Train from a cache, and draw with the trained ensemble."""
    output = this.folder / "trained"
    asked = recipe(
        {
            "scenes": {"num_samples": 16, "seed": this.number},
            "cache": True,
            "cache_folder": str(this.folder / "encoded"),
            "num_variants": 2,
        },
        ema_decay=0.9,
        gradient_checkpointing=bool(this.number % 2),
    )
    for _ in train(asked, output):
        pass
    pipeline = prepare(str(output))
    identity = identity_of(denoiser_of(pipeline))
    draw(pipeline, asked_for(pipeline, this.number, ensemble=str(output), identity=identity))


def stopped(this: Round) -> None:
    """Train with a data worker process, stop after two steps, and resume."""
    output = this.folder / "stopped"
    asked = recipe(
        {"folder": str(this.fixtures.pictures), "cache": False, "num_workers": 1, "max_broken": 0.5}
    )
    seen: list[TrainStep] = []
    try:
        for event in train(asked, output, should_stop=lambda: len(seen) == 1):
            if isinstance(event, TrainStep):
                seen.append(event)
        raise AssertionError("the training must stop when it is asked to")
    except Stopped:
        pass
    steps = [event for event in train(asked, output) if isinstance(event, TrainStep)]
    if steps[-1].step != NUM_STEPS or steps[0].step == 1:
        raise AssertionError("the training must go on where it stopped")


def left(this: Round) -> None:
    """Abandon a training after its first step."""
    asked = recipe({"scenes": {"num_samples": 8}, "cache": False})
    events: Any = train(asked, this.folder / "left")
    next(events)
    events.close()
