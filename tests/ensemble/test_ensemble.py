"""The ensemble's contracts, and a second, independent way to compute the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import greenlet
import pytest
import torch
from torch import nn

from afa.aggregators import SABW, Condition, SABWConfig, Separate
from afa.aggregators.fusion import noise_mean, shell
from afa.denoisers import Feature, Widths, discover_sites, run_lockstep
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.refusal import refusal
from tests.tiny import (
    POOLED_WIDTH,
    SDXL,
    TEXT_WIDTH,
    inputs,
    tiny_unet,
    xl_inputs,
)

SMALL = SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)


def ensemble_of(num_experts: int = 3, aggregators: Any = SMALL, **config: Any) -> EnsembleDenoiser:
    ensemble = EnsembleDenoiser([tiny_unet(n, **config) for n in range(num_experts)], aggregators)
    rules: Any = ensemble.aggregators
    for rule in rules:
        if hasattr(rule, "conv_out"):
            nn.init.normal_(rule.conv_out.weight)
    return ensemble


def call(num_experts: int = 3, **size: int) -> dict[str, Any]:
    return inputs(text_width=TEXT_WIDTH * num_experts, **size)


@torch.no_grad()
def test_identical_experts_are_one_expert() -> None:
    expert = tiny_unet()
    ensemble = EnsembleDenoiser([expert, tiny_unet(), tiny_unet()], SMALL)
    rules: Any = ensemble.aggregators
    for rule in rules:
        nn.init.normal_(rule.conv_out.weight)
    arguments = inputs()
    torch.testing.assert_close(
        ensemble(**arguments).sample, expert(**arguments).sample, rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_expert_in_the_shell_is_that_expert(dtype: torch.dtype) -> None:
    experts = [tiny_unet(n).to(dtype) for n in range(2)]
    ensemble = EnsembleDenoiser(experts, shell(discover_sites(experts[0]), expert=1))
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call(2).items()}
    text = arguments["encoder_hidden_states"][..., TEXT_WIDTH:]
    expected = experts[1](**{**arguments, "encoder_hidden_states": text}).sample
    assert torch.equal(ensemble(**arguments).sample, expected)


@torch.no_grad()
def test_experts_of_stable_diffusion_xl_get_their_own_texts() -> None:
    """From two text encoders each, concatenated encoder by encoder."""
    experts = [tiny_unet(n, **SDXL) for n in range(2)]
    ensemble = EnsembleDenoiser(
        experts, shell(discover_sites(experts[0]), expert=1), widths=Widths((6, TEXT_WIDTH - 6))
    )
    call = xl_inputs(num_experts=2)
    text, added = call["encoder_hidden_states"], call["added_cond_kwargs"]
    own = {
        **call,
        "encoder_hidden_states": torch.cat([text[..., 6:12], text[..., 22:]], dim=-1),
        "added_cond_kwargs": {**added, "text_embeds": added["text_embeds"][:, POOLED_WIDTH:]},
    }
    assert torch.equal(ensemble(**call).sample, experts[1](**own).sample)
    shared = xl_inputs()  # one embedding for both
    assert torch.equal(ensemble(**shared).sample, experts[1](**shared).sample)


@torch.no_grad()
def test_untrained_equals_the_mean() -> None:
    arguments = call()
    experts = [tiny_unet(n) for n in range(3)]
    untrained = EnsembleDenoiser(experts, SMALL)(**arguments).sample
    mean = EnsembleDenoiser(experts)(**arguments).sample
    torch.testing.assert_close(untrained, mean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sites_of_one_width_can_share_an_aggregator() -> None:
    ensemble = ensemble_of(aggregators=replace(SMALL, sharing="width"))
    by_width: dict[tuple[int, int], set[int]] = {}
    rules: Any = ensemble.aggregators
    for site, rule in zip(ensemble.sites, rules, strict=True):
        by_width.setdefault((site.channels, rule.config.pool), set()).add(id(rule))
    assert sorted(by_width) == [(4, 2), (8, 1), (8, 2), (16, 1), (16, 2)]
    assert all(len(shared) == 1 for shared in by_width.values())
    assert len(ensemble.sites) > 3
    separate = ensemble_of()
    assert sum(p.numel() for p in ensemble.parameters() if p.requires_grad) < sum(
        p.numel() for p in separate.parameters() if p.requires_grad
    )


def test_fusion_of_the_predictions_only() -> None:
    ensemble = ensemble_of(aggregators=replace(SMALL, sites="conv_out"))
    assert [type(rule) for rule in ensemble.aggregators[:-1]] == [Separate] * (
        len(ensemble.sites) - 1
    )
    assert isinstance(ensemble.aggregators[-1], SABW)
    torch.nn.init.zeros_(ensemble.aggregators[-1].conv_out.weight)
    mean = ensemble_of(aggregators=noise_mean(ensemble.sites))
    torch.testing.assert_close(ensemble(**call()).sample, mean(**call()).sample, rtol=0, atol=1e-6)


def test_separate_ways_to_the_end_is_noise_averaging() -> None:
    experts = [tiny_unet(n) for n in range(3)]

    ensemble = EnsembleDenoiser(experts)
    ensemble = EnsembleDenoiser(experts, noise_mean(ensemble.sites))
    arguments = call()
    texts = arguments["encoder_hidden_states"].chunk(3, dim=-1)
    alone = [
        expert(**{**arguments, "encoder_hidden_states": text}).sample
        for expert, text in zip(experts, texts, strict=True)
    ]
    torch.testing.assert_close(
        ensemble(**arguments).sample, torch.stack(alone).mean(0), rtol=0, atol=1e-6
    )


class _Cutter:
    """N unmodified library forwards in greenlets; hooks hand every site's feature to the rule.

    Shares nothing with the coroutine but the aggregators: the sites are found by hooking the
    library's own modules.
    """

    def __init__(self, ensemble: EnsembleDenoiser) -> None:
        self.ensemble = ensemble
        self.main = greenlet.getcurrent()

    def hooked(self, unet: Any) -> list[tuple[nn.Module, bool]]:
        """Modules whose output is a site, in order of execution; true where it is a tuple."""
        found: list[tuple[nn.Module, bool]] = [(unet.conv_in, False)]
        for block in unet.down_blocks:
            attentions = getattr(block, "attentions", None)
            found += (
                [(m, True) for m in attentions]
                if attentions
                else [(m, False) for m in block.resnets]
            )
            found += [(m, False) for m in block.downsamplers or ()]
        found.append((unet.mid_block, False))
        for b, block in enumerate(unet.up_blocks):
            attentions = getattr(block, "attentions", None)
            layers = (
                [(m, True) for m in attentions]
                if attentions
                else [(m, False) for m in block.resnets]
            )
            if block.upsamplers:
                layers[-1] = (block.upsamplers[0], False)
            elif b == len(unet.up_blocks) - 1:
                layers.pop()
            found += layers
        return [*found, (unet.conv_out, False)]

    def __call__(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> torch.Tensor:
        texts = encoder_hidden_states.chunk(len(self.ensemble.experts), dim=-1)
        hooks, workers = [], []

        def stop(module: nn.Module, args: Any, output: Any, is_tuple: bool) -> Any:
            fused = self.main.switch(output[0] if is_tuple else output)
            return (fused,) if is_tuple else fused

        for unet, text in zip(self.ensemble.experts, texts, strict=True):
            for module, is_tuple in self.hooked(unet):
                hooks.append(
                    module.register_forward_hook(
                        lambda m, a, o, is_tuple=is_tuple: stop(m, a, o, is_tuple)
                    )
                )
            workers.append(
                greenlet.greenlet(lambda unet=unet, text=text: unet(sample, timestep, text).sample)
            )
        temb = sum(
            unet.time_embedding(unet.get_time_embed(sample, timestep))
            for unet in self.ensemble.experts
        ) / len(workers)

        condition = Condition(timestep, temb, sum(texts) / len(texts), sample)
        features = [worker.switch() for worker in workers]
        for rule in self.ensemble.aggregators:
            fused = rule(features, condition).feature
            features = [worker.switch(fused) for worker in workers]
        for hook in hooks:
            hook.remove()
        return features[0]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6)])
def test_an_independent_cutter_agrees(height: int, width: int) -> None:
    ensemble = ensemble_of()
    arguments = call(height=height, width=width)
    ours = ensemble(**arguments).sample
    theirs = _Cutter(ensemble)(**arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    parameters = list(ensemble.aggregators.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.square().mean(), parameters),
        torch.autograd.grad(theirs.square().mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_gradients_reach_the_aggregators_only() -> None:
    ensemble = ensemble_of()
    before = {k: v.clone() for k, v in ensemble.experts.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in ensemble.parameters() if p.requires_grad), lr=0.1)
    ensemble.train()
    ensemble(**call()).sample.square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in ensemble.experts.parameters())
    assert all(p.grad is not None for p in ensemble.aggregators.parameters())
    for key, value in ensemble.experts.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = ensemble_of(), ensemble_of()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.enable_gradient_checkpointing()
    for ensemble in (plain, checkpointed):
        ensemble.train()
        ensemble(**call()).sample.square().mean().backward()
    assert checkpointed.is_gradient_checkpointing
    for a, b in zip(
        plain.aggregators.parameters(), checkpointed.aggregators.parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_experts_stay_in_evaluation_mode() -> None:
    ensemble = ensemble_of().train()
    assert not any(module.training for module in ensemble.experts.modules())
    assert ensemble.aggregators.training


def test_casting_leaves_the_aggregators_in_float32() -> None:
    ensemble = ensemble_of().to(torch.bfloat16)
    assert ensemble.dtype == torch.bfloat16
    assert {p.dtype for p in ensemble.experts.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ensemble.aggregators.parameters()} == {torch.float32}
    arguments = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call().items()}
    assert ensemble(**arguments).sample.dtype == torch.bfloat16


@torch.no_grad()
def test_freeu_and_fused_projections_reach_the_experts() -> None:
    ensemble, arguments = ensemble_of(2), call(2)
    plain = ensemble(**arguments).sample
    ensemble.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert not torch.equal(ensemble(**arguments).sample, plain)
    # the library scales features in place; a fused feature is every expert's
    expert = tiny_unet()
    expert.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    copies = EnsembleDenoiser([expert, copy.deepcopy(expert), copy.deepcopy(expert)])
    torch.testing.assert_close(
        copies(**inputs()).sample, expert(**inputs()).sample, rtol=0, atol=1e-5
    )
    picked = EnsembleDenoiser([expert, copy.deepcopy(expert)], shell(copies.sites, expert=1))
    assert torch.equal(picked(**inputs()).sample, expert(**inputs()).sample)
    ensemble.disable_freeu()
    assert torch.equal(ensemble(**arguments).sample, plain)
    ensemble.fuse_qkv_projections()
    torch.testing.assert_close(ensemble(**arguments).sample, plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_residuals_are_not_used_up_by_the_first_expert() -> None:
    residuals = [torch.randn(2, c, s, s) for c, s in [(8, 8), (16, 4), (16, 2)]]
    expert = tiny_unet()
    ensemble = EnsembleDenoiser([expert, tiny_unet()], None)
    came = ensemble(**inputs(), down_intrablock_additional_residuals=residuals).sample
    assert len(residuals) == 3
    expected = expert(**inputs(), down_intrablock_additional_residuals=residuals).sample
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-5)


def test_returns_what_a_denoiser_returns() -> None:
    ensemble = ensemble_of(2)
    with torch.no_grad():
        output = ensemble(**call(2))
        (sample,) = ensemble(**call(2), return_dict=False)
    assert type(output).__name__ == "UNet2DConditionOutput"
    assert torch.equal(sample, output.sample)
    assert ensemble.config.in_channels == 4


@pytest.mark.parametrize(
    ("build", "code", "said"),
    [
        (lambda: EnsembleDenoiser([]), "AFA-ENSEMBLE-025", []),
        (
            lambda: EnsembleDenoiser([tiny_unet(), tiny_unet(block_out_channels=(8, 16, 32))]),
            "AFA-MODEL-002",
            ["expert 1", "block_out_channels", r"\(8, 16, 32\)", r"\(8, 16, 16\)"],
        ),
        (
            lambda: EnsembleDenoiser([tiny_unet()], [Separate()]),
            "AFA-ENSEMBLE-026",
            ["19 sites", "1 aggregators"],
        ),
        (lambda: ensemble_of(3)(**call(2)), "AFA-MODEL-003", ["16", "3 x 16", "32"]),
    ],
)
def test_errors(build: Any, code: str, said: list[str]) -> None:
    with refusal(code, *said):
        build()


def test_saving_the_experts_again_is_refused(tmp_path: Any) -> None:
    with refusal("AFA-ENSEMBLE-020"):
        ensemble_of(2).save_pretrained(tmp_path)


def test_stable_diffusion_15_has_25_sites_and_45_million() -> None:
    with torch.device("meta"):
        experts = [tiny_unet_like_sd15() for _ in range(3)]
        ensemble = EnsembleDenoiser(experts, SABWConfig())
    assert len(ensemble.sites) == 25
    count = sum(p.numel() for p in ensemble.aggregators.parameters())
    assert round(count / 1e6, 2) == 45.13


def tiny_unet_like_sd15() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@torch.no_grad()
def test_features_of_different_sizes_are_refused() -> None:
    ensemble = ensemble_of(3)
    block = ensemble.experts[1].down_blocks[0].resnets[0]
    block.register_forward_hook(lambda _, __, feature: feature[..., ::2, ::2])
    with refusal("AFA-ENSEMBLE-064", "down.0.0", "expert 1"):
        ensemble(**call(3))


def test_experts_out_of_step_are_refused() -> None:
    def blocks(*sites: str) -> Any:
        for site in sites:
            yield Feature(site, torch.zeros(1), torch.zeros(1))

    for other, said in ((("a", "c"), "'b', another at 'c'"), (("a",), "1 of 2")):
        with refusal("AFA-MODEL-020", said):
            run_lockstep([blocks("a", "b"), blocks(*other)], lambda features: features[0].hidden)
