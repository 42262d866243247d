"""Compiled blocks: the same pictures, and one graph for the blocks of all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import afa
from afa.aggregators import SABWConfig
from afa.ensemble import accelerate
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.ensemble.caching.test_loop import STEPS, arguments_of, at, ensemble_of
from tests.ensemble.test_ensemble import call
from tests.refusal import refusal
from tests.tiny import tiny_pipeline, tiny_unet

SMALL = SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        del inputs
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def no_graphs_of_others() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def draw(ensemble: EnsembleDenoiser, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [ensemble(**at(arguments, step), return_dict=False)[0] for step in STEPS]


@pytest.mark.parametrize(
    "family", [pytest.param("unet", marks=pytest.mark.nightly), "sd3", "flux", "dit"]
)
def test_the_same_comes_out(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    expected, graphs = draw(ensemble, arguments), Graphs()
    ensemble.compile_repeated_blocks(backend=graphs)
    for came, exact in zip(draw(ensemble, arguments), expected, strict=True):
        torch.testing.assert_close(came, exact, rtol=1e-5, atol=1e-6)
    assert graphs.count


@pytest.mark.nightly
def test_all_experts_share_graphs() -> None:
    def graphs_of(num_experts: int) -> int:
        torch.compiler.reset()
        ensemble = EnsembleDenoiser([tiny_unet(n) for n in range(num_experts)], SMALL)
        graphs = Graphs()
        ensemble.compile_repeated_blocks(backend=graphs)
        with torch.no_grad():
            ensemble(**call(num_experts))
        return graphs.count

    assert graphs_of(1) == graphs_of(2) > 0


@pytest.mark.nightly
def test_the_prompt_is_attended_once_all_the_same() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    calls: list[nn.Module] = []
    for module in ensemble.modules():
        if isinstance(getattr(module, "attn2", None), nn.Module):
            module.attn2.to_k.register_forward_hook(lambda module, *_: calls.append(module))
    ensemble.compile_repeated_blocks(backend=Graphs())
    draw(ensemble, arguments)
    assert len(calls) == len(set(calls)) > 0


@pytest.mark.nightly
def test_streamed_layers_are_compiled_too() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    expected, graphs = draw(ensemble, arguments), Graphs()
    ensemble.stream_experts()
    ensemble.compile_repeated_blocks(backend=graphs)
    for came, exact in zip(draw(ensemble, arguments), expected, strict=True):
        torch.testing.assert_close(came, exact, rtol=1e-5, atol=1e-6)
    seen = graphs.count
    draw(ensemble, arguments)
    assert graphs.count == seen


def test_it_is_refused_without_a_compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = afa.accelerate(tiny_pipeline(tmp_path / "one"))
    with refusal("AFA-ENSEMBLE-002", "'regional'", "'whole'"):
        afa.accelerate(pipeline, compile="whole")  # type: ignore[arg-type]
    monkeypatch.setattr(accelerate.shutil, "which", lambda _: None)
    with refusal("AFA-ENSEMBLE-003", r"g\+\+"):
        afa.accelerate(pipeline, compile="regional")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_really_compiled_it_is_the_same_to_rounding(tmp_path: Any) -> None:
    pipeline = tiny_pipeline(tmp_path / "one")
    ensemble = EnsembleDenoiser([tiny_unet(n) for n in range(2)], SMALL)
    with torch.no_grad():
        expected = ensemble(**call(2)).sample
    pipeline.register_modules(unet=ensemble)
    afa.accelerate(pipeline, compile="regional")
    with torch.no_grad():
        came = ensemble(**call(2)).sample
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-5)
