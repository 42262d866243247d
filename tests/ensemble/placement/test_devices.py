"""Experts on several devices, with tensors that have a device and no content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import afa
from tests.ensemble.caching.test_loop import STEPS, arguments_of, at, ensemble_of
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal

pytestmark = pytest.mark.slow


def to(module: nn.Module, device: Any) -> nn.Module:
    """`module.to`, which does not know how to move parameters without content."""
    for part in module.modules():
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in kinds:
            for name, tensor in held.items():
                if tensor is not None:
                    moved = tensor.detach().to(device)
                    held[name] = nn.Parameter(moved, False) if held is part._parameters else moved
    return module


class Clock:
    """The only timestep of a batch, which a tensor without content cannot tell."""

    now = 0

    def tolist(self) -> list[int]:
        return [Clock.now]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(Tensor, "unique", lambda _: Clock())
    # a fake has no values to look at
    monkeypatch.setattr("afa.ensemble.denoiser.is_finite", lambda _: True)
    for module in ("loop", "shortcut"):
        monkeypatch.setattr(f"afa.ensemble.caching.{module}.has_moved", lambda *_: False)
    with FakeTensorMode(), torch.no_grad():
        yield


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, arguments)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("family", "interval"),
    [("unet", 3), pytest.param("sdxl", 1, marks=pytest.mark.nightly), ("sd3", 3), ("pixart", 1)],
)
def test_an_operation_never_sees_two_devices(family: str, interval: int) -> None:
    ensemble, arguments = ensemble_of(family, 3), arguments_of(family, 3)
    ensemble.place_experts(["cpu:0", "cpu:1", "cpu:1"])
    ensemble.acceleration = afa.Acceleration(interval=interval, keep_weights=True)
    assert {p.device.index for p in ensemble.experts[2].parameters()} == {1}
    assert ensemble.device == torch.device("cpu:0")
    arguments = on("cpu:0", arguments)
    for step in STEPS:
        Clock.now = step
        (came,) = ensemble(**arguments, return_dict=False)
        assert came.device == torch.device("cpu:0")


@pytest.mark.usefixtures("devices")
def test_pruned_and_scheduled_experts_stay_where_they_are() -> None:
    ensemble, arguments = ensemble_of("unet", 3), on("cpu:0", arguments_of("unet", 3))
    ensemble.place_experts(["cpu:0", "cpu:1", "cpu:2"])
    ensemble.plan = plan_of(ensemble, {"mid": [1]})
    assert ensemble(**arguments).sample.device.index == 0
    mean = afa.EnsembleDenoiser(list(ensemble.experts), schedule=lambda _: [1, 2])
    mean.place_experts(["cpu:0", "cpu:1", "cpu:2"])
    assert mean(**arguments).sample.device.index == 0


def test_on_one_device_nothing_changes() -> None:
    ensemble, arguments = ensemble_of("unet", 3), arguments_of("unet", 3)
    with torch.no_grad():
        expected = ensemble(**at(arguments, 500)).sample
        ensemble.place_experts(["cpu"] * 3)
        assert torch.equal(ensemble(**at(arguments, 500)).sample, expected)
    assert ensemble.to("cpu").devices is None


def test_what_does_not_go_together_is_refused() -> None:
    ensemble = ensemble_of("unet", 3)
    with refusal("AFA-ENSEMBLE-035", "2", "3"):
        ensemble.place_experts(["cpu", "cpu"])
    ensemble.place_experts(["cpu"] * 3)
    for place in (ensemble.stream_experts, lambda: ensemble.offload_experts("cpu")):
        with refusal("AFA-ENSEMBLE-018"):
            place()
    twice = afa.EnsembleDenoiser([ensemble.experts[0]] * 2)
    with refusal("AFA-ENSEMBLE-044"):
        twice.place_experts(["cpu", "meta"])
