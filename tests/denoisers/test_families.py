"""Which family a denoiser is of, where one class is a subclass of another's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import afa
from afa.denoisers import FAMILIES, discover_sites, family_of, register_family
from afa.denoisers.unet import UNET
from tests.refusal import refusal
from tests.tiny import SD1, inputs, tiny_unet

if TYPE_CHECKING:
    from collections.abc import Iterator


class Derived(UNet2DConditionModel):
    """A U-Net of somebody else."""


class DerivedAgain(Derived):
    """One of that."""


@pytest.fixture
def family() -> Iterator[Any]:
    """A family of `Derived`, which negates what its U-Net predicts."""

    def blocks(unet: Any, **arguments: Any) -> Any:
        return -(yield from UNET.blocks(unet, **arguments))

    derived = replace(UNET, name="derived", model_class=Derived, blocks=blocks)
    register_family(derived)
    yield derived
    FAMILIES.remove(derived)


def test_the_most_specific_class_wins(family: Any) -> None:
    assert family_of(Derived(**SD1)) is family
    assert family_of(DerivedAgain(**SD1)) is family
    assert family_of(tiny_unet()) is UNET
    assert [site.name for site in discover_sites(Derived(**SD1))] == [
        site.name for site in discover_sites(tiny_unet())
    ]


def test_an_ensemble_runs_its_own_coroutine(family: Any) -> None:
    plain = tiny_unet()
    derived = Derived(**SD1).eval()
    derived.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(**inputs()).sample
        assert torch.equal(afa.EnsembleDenoiser([derived])(**inputs()).sample, -expected)
        assert torch.equal(afa.EnsembleDenoiser([plain])(**inputs()).sample, expected)


def test_a_subclass_that_nobody_registered_is_of_its_base() -> None:
    assert family_of(DerivedAgain(**SD1)) is UNET
    with refusal("AFA-MODEL-010", "UNet2DConditionModel"):
        family_of(torch.nn.Linear(1, 1))


def test_experts_of_two_families_with_one_configuration(family: Any) -> None:
    with refusal("AFA-MODEL-001", "1", "'derived'", "'unet'"):
        afa.EnsembleDenoiser([tiny_unet(), Derived(**SD1)])
