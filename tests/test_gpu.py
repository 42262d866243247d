"""On a CUDA device: what is computed, by every way that only a GPU has.

pytest tests/test_gpu.py -m gpu
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import afa
from afa.denoisers.kinds import denoiser_of
from afa.ensemble.caching.graphs import Graphs
from tests.ensemble.caching.test_loop import FAMILIES, STEPS, arguments_of, at, draw, ensemble_of
from tests.refusal import refusal
from tests.tiny_transformers import stacked
from tests.training import runs

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
PROMPT = "a fox on the left and a pizza on the right, blue background"


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of cuDNN take 10 bits of 23 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(value: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Tensors of a call on the GPU, floating-point ones in a type."""
    if isinstance(value, dict):
        return {key: moved(item, dtype) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, dtype) for item in value]
    if not isinstance(value, Tensor):
        return value
    return value.to("cuda", dtype if value.is_floating_point() else value.dtype)


def looped(ensemble: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [stacked(ensemble(**call, return_dict=False)[0]) for call in calls]


def calls_of(family: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The calls of a loop: the prompt, and all that a pipeline keeps, is the same object in all."""
    arguments = moved(arguments_of(family), dtype)
    return [at(arguments, step) for step in STEPS]


def distance(came: Tensor, expected: Tensor) -> float:
    """Relative, in the mean square."""
    return float((came - expected).norm() / expected.norm())


def assert_same(came: list[Tensor], expected: list[Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(came, expected, strict=True)] == [True] * len(came)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_a_processor_does(family: str) -> None:
    calls = [moved(at(arguments_of(family), step)) for step in STEPS]
    expected = draw(ensemble_of(family), arguments_of(family))
    came = looped(ensemble_of(family).to("cuda"), calls)
    # embeddings take the sine of numbers in the thousands: of 7 digits, 3 are before the point
    assert max(distance(a.cpu(), b) for a, b in zip(came, expected, strict=True)) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_the_same_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    calls, ensemble = calls_of(family, dtype), ensemble_of(family).to("cuda", dtype)
    expected = looped(ensemble, calls)
    ensemble.graphs = Graphs()
    for _ in range(2):
        assert_same(looped(ensemble, calls), expected)
    assert [loop.graph.is_recorded for loop in ensemble.loops] == [True]


def test_graphs_read_arguments_anew() -> None:
    ensemble = ensemble_of("unet").to("cuda")
    one, other = calls_of("unet", torch.float32), calls_of("unet", torch.float32)
    other = [{**call, "sample": call["sample"] + 1} for call in other]
    expected = looped(ensemble, one), looped(ensemble, other)
    assert not torch.equal(expected[0][-1], expected[1][-1])
    ensemble.graphs = Graphs()
    assert_same(looped(ensemble, one), expected[0])
    assert_same(looped(ensemble, other), expected[1])


def test_graphs_of_steered_ensembles() -> None:
    ensemble, calls = ensemble_of("unet").to("cuda"), calls_of("unet", torch.float32)
    afa.steer(ensemble, {"1": 2.0})
    expected = looped(ensemble, calls)
    ensemble.graphs = Graphs()
    assert_same(looped(ensemble, calls), expected)


def test_memory_of_graphs_is_taken_once() -> None:
    ensemble = ensemble_of("unet").to("cuda")
    ensemble.graphs = Graphs()

    def after_a_loop() -> int:
        looped(ensemble, calls_of("unet", torch.float32))
        gc.collect()
        return torch.cuda.memory_reserved()

    seen = [after_a_loop() for _ in range(12)]
    assert len(set(seen[4:])) == 1, seen


def test_a_step_that_waits_for_the_gpu_is_named() -> None:
    ensemble, calls = ensemble_of("unet").to("cuda"), calls_of("unet", torch.float32)
    ensemble.graphs = Graphs()

    def wait(*_: Any) -> None:
        calls[0]["sample"].sum().item()

    ensemble.aggregators[0].register_forward_hook(wait)
    with refusal("AFA-ENSEMBLE-004"):
        looped(ensemble, calls)
    ensemble.graphs = None
    assert looped(ensemble, calls)[0].isfinite().all()
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is as it was


def test_prompts_are_let_go_of() -> None:
    ensemble, calls = ensemble_of("unet").to("cuda"), calls_of("unet", torch.float32)
    ensemble.graphs = Graphs()
    looped(ensemble, calls)
    assert len(list(ensemble.loops)) == 1
    calls.clear()
    gc.collect()
    assert not list(ensemble.loops)


@pytest.mark.parametrize("way", ["stream_experts", "offload_experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_brought_there_compute_the_same(family: str, way: str) -> None:
    calls = calls_of(family, torch.float32)
    expected = looped(ensemble_of(family).to("cuda"), calls)
    ensemble = ensemble_of(family)
    getattr(ensemble, way)("cuda")
    for _ in range(2):
        assert_same(looped(ensemble, calls), expected)


@pytest.mark.parametrize("speed", ["exact", "balanced", "fast"])
def test_the_zoo_draws_the_same_pictures(speed: str) -> None:
    def picture(device: str, graphs: bool) -> Any:
        pipeline = afa.load_ensemble("zoo:ensemble", device=device)
        pipeline = afa.accelerate(pipeline, speed, cuda_graphs=graphs)
        generator = torch.Generator().manual_seed(1)
        return pipeline(
            PROMPT,
            num_inference_steps=20,
            guidance_scale=3,
            generator=generator,
            output_type="np",
        ).images[0]

    on_gpu = picture("cuda", graphs=False)
    assert np.array_equal(picture("cuda", graphs=True), on_gpu)
    assert np.abs(picture("cpu", graphs=False) - on_gpu).mean() < 0.02


def test_the_memory_budget_of_a_gpu_is_kept() -> None:
    plans: list[Any] = []
    torch.cuda.empty_cache()
    pipeline = afa.load_ensemble(
        "zoo:ensemble", device="cuda", memory_budget="2GB", on_plan=plans.append
    )
    torch.cuda.reset_peak_memory_stats()
    pipeline(PROMPT, num_inference_steps=5)
    assert plans[0].place == "memory"
    assert denoiser_of(pipeline).device.type == "cuda"
    assert torch.cuda.max_memory_allocated() < 2e9


def test_it_trains(experts: list[Path], tmp_path: Path) -> None:
    def losses(device: str) -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)  # one device for a process
        asked = runs.recipe(experts, device=device, num_steps=6)
        return [step.loss for step in runs.steps_of(asked, tmp_path / device)]

    on_gpu, on_processor = losses("cuda"), losses("cpu")
    assert len(on_gpu) == 6
    assert np.allclose(on_gpu, on_processor, rtol=0.02)


@pytest.mark.slow
def test_compiled_blocks_on_a_gpu() -> None:
    calls, ensemble = calls_of("unet", torch.float32), ensemble_of("unet").to("cuda")
    expected = looped(ensemble, calls)
    ensemble.compile_repeated_blocks()
    compiled = looped(ensemble, calls)
    assert max(distance(a, b) for a, b in zip(compiled, expected, strict=True)) < 2e-3
    ensemble.graphs = Graphs()
    assert_same(looped(ensemble, calls), compiled)
