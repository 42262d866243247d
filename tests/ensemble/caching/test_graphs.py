"""Steps that are recorded and replayed: which are, and that nothing stale is read.

There is no GPU here, so what replays a step runs it again on the arguments that were recorded: an
argument that is not copied there is seen. tests/test_gpu.py has real graphs.
"""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import afa
from afa.ensemble.caching.graphs import Graphs
from tests.ensemble.caching.test_loop import FAMILIES, STEPS, arguments_of, at, draw, ensemble_of
from tests.refusal import refusal
from tests.tiny import tiny_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable


class Replays(Graphs):
    """What is recorded runs when it is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_recorded = self.num_replayed = 0

    def can_record(self, latent: Tensor) -> bool:
        return True

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            function()

        return replay


def recording(family: str = "unet") -> tuple[Any, Replays]:
    ensemble = ensemble_of(family)
    ensemble.graphs = Replays()
    return ensemble, ensemble.graphs


def assert_same(came: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(came, expected, strict=True)] == [True] * len(came)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_runs_and_the_others_are_replayed(family: str) -> None:
    ensemble, graphs = recording(family)
    arguments = arguments_of(family)
    expected = draw(ensemble_of(family), arguments)
    assert_same(draw(ensemble, arguments), expected)
    assert (graphs.num_recorded, graphs.num_replayed) == (1, len(STEPS) - 1)
    assert_same(draw(ensemble, arguments), expected)  # a loop has a graph of its own
    assert (graphs.num_recorded, graphs.num_replayed) == (2, 2 * (len(STEPS) - 1))


def test_timesteps_may_be_numbers() -> None:
    ensemble, graphs = recording()
    arguments = arguments_of("unet")
    with torch.no_grad():
        for number in (900, 700, 500):
            expected = ensemble_of("unet")(**{**arguments, "timestep": number}).sample
            assert torch.equal(ensemble(**{**arguments, "timestep": number}).sample, expected)
    assert graphs.num_replayed == 2


def test_a_latent_that_is_changed_in_place_is_read_again() -> None:
    ensemble, _ = recording()
    plain, arguments = ensemble_of("unet"), arguments_of("unet")
    with torch.no_grad():
        for step in STEPS:
            arguments["timestep"] = torch.full_like(arguments["timestep"], step)
            arguments["sample"].mul_(0.9)
            assert torch.equal(ensemble(**arguments).sample, plain(**arguments).sample)


def test_predictions_are_not_overwritten_by_later_ones() -> None:
    ensemble, _ = recording()
    came = draw(ensemble, arguments_of("unet"))
    assert len({prediction.data_ptr() for prediction in came}) == len(came)


def test_a_prompt_that_is_changed_in_place_is_recorded_again() -> None:
    ensemble, graphs = recording()
    plain, arguments = ensemble_of("unet"), arguments_of("unet")
    with torch.no_grad():
        for number, step in enumerate(STEPS):
            if number == 3:
                arguments["encoder_hidden_states"].add_(1)
            came = ensemble(**at(arguments, step)).sample
            assert torch.equal(came, plain(**at(arguments, step)).sample)
    assert (graphs.num_recorded, graphs.num_replayed) == (2, 4)  # it is copied there then


def test_two_prompts_in_turns_have_a_graph_each() -> None:
    ensemble, graphs = recording()
    one, other = arguments_of("unet"), arguments_of("unet")
    other["encoder_hidden_states"] = other["encoder_hidden_states"] + 1
    plain = ensemble_of("unet")
    with torch.no_grad():
        for step in STEPS:
            for prompt in (one, other):
                came = ensemble(**at(prompt, step)).sample
                assert torch.equal(came, plain(**at(prompt, step)).sample)
    assert (graphs.num_recorded, graphs.num_replayed) == (2, 2 * (len(STEPS) - 1))


def test_residuals_of_a_controlnet_are_read_at_every_step() -> None:
    ensemble, graphs = recording("flux")
    plain, arguments = ensemble_of("flux"), arguments_of("flux")
    with torch.no_grad():
        for step in STEPS:
            arguments["controlnet_block_samples"] = [torch.randn(2, 16, 16)]
            came = ensemble(**at(arguments, step)).sample
            assert torch.equal(came, plain(**at(arguments, step)).sample)
    assert graphs.num_replayed == len(STEPS) - 1


def test_another_number_of_arguments_is_another_step() -> None:
    ensemble, graphs = recording("flux")
    plain, arguments = ensemble_of("flux"), arguments_of("flux")
    with torch.no_grad():
        for number, step in enumerate(STEPS):
            if number == 2:
                arguments["controlnet_block_samples"] = [torch.randn(2, 16, 16)]
            came = ensemble(**at(arguments, step)).sample
            assert torch.equal(came, plain(**at(arguments, step)).sample)
    assert (graphs.num_recorded, graphs.num_replayed) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "num_replayed"),
    [
        ({"interval": 2, "fresh": 0}, 2),  # three whole steps, the first of which runs
        ({"interval": 2, "fresh": 1}, 0),  # features are kept
        ({"interval": 50, "drift": 1e-6, "fresh": 0}, 4),
    ],
    ids=str,
)
def test_it_goes_together_with_what_is_left_out(
    settings: dict[str, Any], num_replayed: int
) -> None:
    ensemble, graphs = recording()
    arguments, plain = arguments_of("unet"), ensemble_of("unet")
    for each in (ensemble, plain):
        each.acceleration = afa.Acceleration(**settings)
    outcomes = []
    for each in (ensemble, plain):
        with torch.no_grad():
            outcomes.append([each(**at(arguments, step)).sample for step in STEPS])
    assert_same(*outcomes)
    assert graphs.num_replayed == num_replayed


def test_steps_that_something_looks_into_run() -> None:
    ensemble, graphs = recording()
    with afa.record_weights(ensemble) as record:
        draw(ensemble, arguments_of("unet"))
    assert len(record.steps) == len(STEPS)
    assert graphs.num_recorded == 0


def test_a_bias_of_the_next_loop_is_seen() -> None:
    ensemble, _ = recording()
    arguments, plain = arguments_of("unet"), ensemble_of("unet")
    before = draw(ensemble, arguments)
    for each in (ensemble, plain):
        afa.steer(each, {"0": 2.0})
    steered = draw(ensemble, arguments)
    assert_same(steered, draw(plain, arguments))
    assert not torch.equal(steered[-1], before[-1])


def test_a_scale_of_loras_is_part_of_the_step() -> None:
    ensemble, graphs = recording()
    arguments = arguments_of("unet")
    with torch.no_grad():
        for step, scale in zip(STEPS, (1.0, 1.0, 1.0, 0.5, 0.5), strict=True):
            ensemble(**at(arguments, step), cross_attention_kwargs={"scale": scale})
    assert (graphs.num_recorded, graphs.num_replayed) == (2, 3)


class Once(Replays):
    """Holds nothing of what it recorded, as CUDA does."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        return lambda: None


def test_graphs_go_with_the_prompt() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.graphs = Once()
    draw(ensemble, arguments)
    (loop,) = ensemble.loops
    graph = weakref.ref(loop.graph)
    del loop
    assert graph() is not None
    del arguments
    gc.collect()
    assert graph() is None


def test_they_are_refused_where_they_could_not_be(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = afa.accelerate(tiny_pipeline(tmp_path), {"interval": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refusal("AFA-ENSEMBLE-001", "CUDA"):
        afa.accelerate(pipeline, cuda_graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    afa.accelerate(pipeline, cuda_graphs=True)
    assert pipeline.unet.graphs is not None
    afa.accelerate(pipeline)
    assert pipeline.unet.graphs is None
    pipeline.unet.stream_experts()
    with refusal("AFA-ENSEMBLE-018", "CUDA graphs", "streamed experts"):
        afa.accelerate(pipeline, cuda_graphs=True)
