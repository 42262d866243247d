"""Hooks of a step: what each sees, in which order, and that the documentation lists them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import afa
import afa.ensemble
from afa.aggregators import Condition, Fused, Mean, weighted_sum
from afa.ensemble.bias import Steering
from afa.ensemble.caching.loop import Loop
from afa.ensemble.caching.shortcut import Shortcut
from afa.ensemble.conversion import Conversion
from afa.ensemble.guard import Guard
from afa.ensemble.hook import Arguments, Features, Hook, Inputs
from afa.ensemble.hooks import HOOKS, in_order
from afa.ensemble.placement.devices import Devices
from afa.ensemble.running import Running
from afa.ensemble.step import run_step
from tests.ensemble.caching.test_loop import arguments_of, at, ensemble_of

ROOT = Path(__file__).parents[2]
#: as `afa.ensemble.step` documents them
BEFORE, AT_A_SITE, AT_LAST = (
    ["begin", "arguments"],
    ["features", "look", "condition", "fuse", "fused", "send"],
    ["end"],
)
#: what leads to the experts
INWARD = {"arguments", "send"}


class Noting(Hook):
    """Notes which methods are called, and of which site."""

    def __init__(self, name: str, seen: list[tuple[str, str, str]]) -> None:
        self.name, self.seen, self.site = name, seen, ""

    def note(self, method: str, site: str = "") -> None:
        self.seen.append((self.name, method, site))

    def begin(self, inputs: Inputs) -> Collection[int]:
        self.note("begin")
        assert sorted(inputs.arguments) == list(inputs.running.experts)
        return super().begin(inputs)

    def arguments(self, arguments: Arguments) -> Arguments:
        self.note("arguments")
        return super().arguments(arguments)

    def features(self, site: str, features: Features) -> Features:
        self.site = site
        self.note("features", site)
        return super().features(site, features)

    def look(self, site: str, features: Features) -> Collection[int]:
        self.note("look", site)
        return super().look(site, features)

    def condition(self, site: str, condition: Condition) -> Condition:
        self.note("condition", site)
        return super().condition(site, condition)

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        self.note("fuse", site)
        return super().fuse(site, hidden)

    def fused(self, site: str, fused: Fused) -> None:
        self.note("fused", site)
        return super().fused(site, fused)

    def send(self, sent: dict[int, Tensor]) -> dict[int, Tensor]:
        self.note("send", self.site)
        return super().send(sent)

    def end(self, prediction: Tensor) -> None:
        self.note("end")
        return super().end(prediction)


def stepped(ensemble: Any, *hooks: Hook, running: Running | None = None) -> Tensor:
    count = len(ensemble.experts)
    arguments = at(arguments_of("unet", count), 500)
    with torch.no_grad():
        return run_step(ensemble, arguments, running or Running(range(count)), hooks)


def test_a_hook_sees_each_site_once_in_the_documented_order() -> None:
    ensemble, seen = ensemble_of("unet"), list[tuple[str, str, str]]()
    expected = stepped(ensemble)
    assert torch.equal(stepped(ensemble, Noting("a", seen), Noting("b", seen)), expected)
    methods = [(method, "") for method in BEFORE]
    methods += [(method, site.name) for site in ensemble.sites for method in AT_A_SITE]
    methods += [(method, "") for method in AT_LAST]
    assert seen == [
        (name, method, site)
        for method, site in methods
        for name in ("ba" if method in INWARD else "ab")
    ]


def test_every_method_is_documented_and_called() -> None:
    own = {name for name, _ in inspect.getmembers(Hook, inspect.isfunction)}
    assert own == {*BEFORE, *AT_A_SITE, *AT_LAST}
    text = inspect.getdoc(inspect.getmodule(run_step)) or ""
    listed = [re.findall(r"`(\w+)`", line) for line in text.splitlines() if line.startswith("- ")]
    assert listed == [BEFORE, AT_A_SITE, AT_LAST]


def test_the_list_of_hooks_and_the_documentation_agree() -> None:
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `src/(afa/[\w/]+)\.py` \| (.*?) \|", text, re.MULTILINE)
    assert [name for name, *_ in rows] == [kind.__name__ for kind in HOOKS]
    for (_, file, methods), kind in zip(rows, HOOKS, strict=True):
        assert file.replace("/", ".") == kind.__module__
        own = [name for name in (*BEFORE, *AT_A_SITE, *AT_LAST) if name in vars(kind)]
        assert re.findall(r"`(\w+)`", methods) == own


def test_every_hook_of_the_package_is_in_the_list() -> None:
    for module in pkgutil.walk_packages(afa.ensemble.__path__, "afa.ensemble."):
        importlib.import_module(module.name)
    found = {kind for kind in Hook.__subclasses__() if kind.__module__.startswith("afa.")}
    assert found == set(HOOKS)


def test_hooks_are_put_in_their_order() -> None:
    guard, steering = Guard(["0"], torch.float32, masks=False), Steering({})
    devices = Devices(["cpu"], 1, "encoder_hidden_states")
    cache = Shortcut(afa.Acceleration(), [], False, Loop(1, torch.zeros(1)), torch.zeros(1))
    assert in_order(cache, None, steering, guard, devices) == (devices, guard, steering, cache)


class Excluding(Hook):
    """Excludes an expert everywhere."""

    def look(self, site: str, features: Features) -> Collection[int]:
        del site
        assert sorted(features) == [0, 2]
        return {2}


def test_experts_are_meant_by_number() -> None:
    """Expert 2 is the second of those that run."""
    ensemble = ensemble_of("unet", 3)
    ensemble.aggregators = torch.nn.ModuleList(Mean() for _ in ensemble.sites)
    expected = stepped(ensemble, running=Running([0]))
    came = stepped(ensemble, Excluding(), running=Running([0, 2]))
    torch.testing.assert_close(came, expected)  # texts and timesteps play no part in a mean


class First(Hook):
    """Fuses by taking the expert with the lowest number."""

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        del site
        feature = hidden[min(hidden)]
        return Fused(weighted_sum([feature], feature.new_ones(len(feature), 1, 1, 1)))


def test_a_hook_fuses_instead_of_the_rule() -> None:
    ensemble = ensemble_of("unet")
    alone = stepped(ensemble, running=Running([0], {}))
    for rule in ensemble.aggregators:
        rule.forward = None  # it must not be asked
    assert torch.equal(stepped(ensemble, First()), alone)


class Skipping(Hook):
    """Skips a site, and does not say what is there instead."""

    skipped = frozenset({"mid"})

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        assert all((own is None) == (site == "mid") for own in hidden.values())
        return None if site != "mid" else Fused(torch.zeros(2, 16, 4, 4))


def test_what_leads_to_a_skipped_site_is_not_run() -> None:
    ensemble = ensemble_of("unet")
    for expert in ensemble.experts:
        expert.mid_block.forward = None
        for part in (*expert.mid_block.resnets, *expert.mid_block.attentions):
            part.forward = None
    assert stepped(ensemble, Skipping()).isfinite().all()


def test_steps_with_hooks_that_do_not_allow_it_are_no_graphs() -> None:
    assert [kind for kind in HOOKS if kind.is_recordable] == [Conversion, Steering]
    assert not Hook.is_recordable


@pytest.mark.parametrize("picked", [[0, 1, 2], [1], [2, 0]], ids=str)
def test_left_out_where_a_plan_says_so(picked: list[int]) -> None:
    running = Running(range(3), {"mid": picked})
    assert running.at("mid") == picked
    assert list(running.at("conv_in")) == [0, 1, 2]
    for expert in range(3):
        assert running.left_out(expert) == ({"mid"} if expert not in picked else set())
