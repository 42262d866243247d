"""Tiny experts of one family, and the calls that draw pictures with them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import afa
from afa.denoisers import discover_sites, family_of
from afa.denoisers.objective import objective_of
from afa.denoisers.packing import Packing
from afa.denoisers.pixart import PIXART
from afa.denoisers.predictor import Host, Predictor
from afa.denoisers.stable_diffusion import STABLE_DIFFUSION
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.pairs.copies import Template
from tests.pairs.reference import Call, Meaning
from tests.tiny import ODD, TEXT_WIDTH, tiny_unet
from tests.tiny_transformers import POOLED_WIDTH, TEXT_LENGTH, tiny_transformer

NUM_EXPERTS = 3
#: attention in the middle alone, since every call of a module takes time
UNET: dict[str, Any] = {
    **ODD["two levels"],
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SMALL = afa.SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)
#: of the picture that is always drawn
STEPS = (900, 700, 500)


@cache
def _template(name: str) -> Template:
    return Template(made(name))


@cache
def made(name: str) -> EnsembleDenoiser:
    """An ensemble of three experts with trained aggregators, of which all others are copies."""
    if name == "predictions":
        return _of_predictions()
    make = {
        "flux": lambda n: tiny_transformer("flux schnell", n, num_layers=1, num_single_layers=1),
        "unet": lambda n: tiny_unet(n, **UNET),
    }[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = EnsembleDenoiser([make(n) for n in range(NUM_EXPERTS)], SMALL)
        for rule in ensemble.aggregators:
            nn.init.normal_(rule.conv_out.weight)
    return ensemble


def _of_predictions() -> EnsembleDenoiser:
    """A U-Net whose pipeline draws, another U-Net and a transformer, each called alone."""
    unets = [tiny_unet(0, **UNET), tiny_unet(1, **{**UNET, "layers_per_block": 2})]
    transformer = tiny_transformer("pixart", 2, patch_size=1)
    kinds = [STABLE_DIFFUSION, STABLE_DIFFUSION, PIXART.pipelines[0]]
    packing = Packing([partial(_conditions, masked=masked) for masked in (False, True)])
    host = Host(unets[0], family_of(unets[0]), packing)
    objective = objective_of(DDIMScheduler())
    pipelines = [None, *(SimpleNamespace(transformer=transformer, vae_scale_factor=2),) * 2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        experts: list[Any] = [
            Predictor(denoiser, kind, objective, host, pipeline)
            for denoiser, kind, pipeline in zip(
                [*unets, transformer], kinds, pipelines, strict=True
            )
        ]
        ensemble = EnsembleDenoiser(experts, replace(SMALL, hidden_ratio=None, min_scale=1))
        for rule in ensemble.aggregators:
            nn.init.normal_(rule.conv_out.weight)
    return ensemble


def _conditions(captions: list[str], *, masked: bool) -> dict[str, Tensor]:
    """The conditions of some captions, as a pipeline would encode them."""
    seeds = [int(caption or 0) for caption in captions]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    text = [torch.randn((TEXT_LENGTH, TEXT_WIDTH), generator=each) for each in generators]
    found = {"text": torch.stack(text)}
    return {**found, "mask": torch.ones(len(seeds), TEXT_LENGTH)} if masked else found


class World:
    """Tiny experts of one family, their aggregators, and what they are called with.

    Args:
        name: of the family.
        ensemble: of them; None makes one.
    """

    def __init__(self, name: str, ensemble: EnsembleDenoiser | None = None) -> None:
        self.name, self.ensemble = name, ensemble or _template(name).copy()
        self.experts = list(self.ensemble.experts)
        self.family, self.sites = family_of(self.experts[0]), discover_sites(self.experts[0])
        self.highest = 1.0 if name == "flux" else 1000.0
        self.middle = {"flux": "double.0", "unet": "mid", "predictions": "none"}[name]
        self.last = self.sites[-1].name

    def spoil(self, place: str = "middle", value: float = float("nan")) -> None:
        """Let one expert give non-finite values at the first, a middle or the last site."""
        expert: Any = self.experts[1]
        if self.name == "flux":
            layers = {
                "first": expert.x_embedder,
                "middle": expert.transformer_blocks[0].ff.net[2],
                "last": expert.proj_out,
            }
        else:
            layers = {
                "first": expert.conv_in,
                "middle": expert.mid_block.resnets[0].conv1,
                "last": expert.conv_out,
            }
        layers[place].weight.data[0] = value

    def prompt(self, seed: int, length: int = TEXT_LENGTH) -> Tensor:
        """The texts of all experts [B, L, N * D], or packed in that of the first one."""
        if self.name == "predictions":
            shape = (2, length, TEXT_WIDTH)
            own = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            packing = self.experts[0].host.packing
            return torch.cat([own, packing.pack([str(seed), str(seed + 1)], own)], -1)
        shape = (2, length, TEXT_WIDTH * NUM_EXPERTS)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def picture(
        self,
        number: int,
        prompt: Tensor,
        steps: tuple[int, ...] = STEPS,
        size: int = 8,
        odd: int = 0,
    ) -> list[Call]:
        """The calls of one picture, whose latents change little from step to step."""
        height, width = size - 2 * odd, size + odd
        generator = torch.Generator().manual_seed(100 + number)
        shape: tuple[int, ...] = (2, 4, height, width)
        if self.name == "flux":
            rows, columns = height // 2, width // 2
            shape = (2, rows * columns, 16)
        base = torch.randn(shape, generator=generator)
        latent = "hidden_states" if self.name == "flux" else "sample"
        calls = []
        for step in steps:
            moved = 0.9 * base + 0.4 * torch.randn(shape, generator=generator)
            timestep = torch.full((2,), step / 1000 * self.highest)
            own = {latent: moved, "timestep": timestep, "encoder_hidden_states": prompt}
            if self.name == "flux":
                ids = torch.zeros(rows, columns, 3)
                ids[..., 1] += torch.arange(rows)[:, None]
                ids[..., 2] += torch.arange(columns)
                pooled = torch.Generator().manual_seed(7)
                own |= {
                    "pooled_projections": torch.randn(
                        2, POOLED_WIDTH * NUM_EXPERTS, generator=pooled
                    ),
                    "img_ids": ids.flatten(0, 1),
                    "txt_ids": torch.zeros(prompt.shape[1], 3),
                }
            calls.append(Call(number, float(timestep[0]), own))
        return calls

    def meaning(self) -> Meaning:
        """What is computed where nothing is switched on."""
        rules = zip(self.sites, self.ensemble.aggregators, strict=True)
        named = {site.name: rule for site, rule in rules}
        return Meaning(self.family, self.sites, self.experts, named, self.ensemble.widths)
