"""Ensembles of transformers: the contracts, and a second, independent way to compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import greenlet
import pytest
import torch
from torch import nn

from afa.aggregators import SABW, Condition, SABWConfig, Separate
from afa.aggregators.build import build_sabw
from afa.aggregators.fusion import shell
from afa.denoisers import discover_sites, family_of
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.refusal import refusal
from tests.tiny_transformers import (
    KINDS,
    TEXT_WIDTH,
    call,
    inputs_of,
    stacked,
    tiny_transformer,
    transformer_inputs,
)

SMALL = SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)


def text_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    """The mask of the text alone."""
    names = ("encoder_attention_mask", "attention_mask", "encoder_hidden_states_mask")
    found = next((arguments[name] for name in names if name in arguments), None)
    return None if found is None else found[:, : arguments["encoder_hidden_states"].shape[1]]


def ensemble_of(kind: str, num_experts: int = 3, aggregators: Any = SMALL) -> EnsembleDenoiser:
    experts = [tiny_transformer(kind, n) for n in range(num_experts)]
    ensemble = EnsembleDenoiser(experts, aggregators)
    torch.manual_seed(7)
    for rule in list(ensemble.aggregators):
        if isinstance(rule, SABW):
            nn.init.normal_(rule.conv_out.weight)
    return ensemble


@pytest.mark.parametrize("kind", KINDS)
def test_identical_experts_are_one_expert(kind: str) -> None:
    ensemble = EnsembleDenoiser([tiny_transformer(kind) for _ in range(3)], SMALL)
    for rule in list(ensemble.aggregators):
        if isinstance(rule, SABW):
            nn.init.normal_(rule.conv_out.weight)
    arguments = transformer_inputs(kind)
    expected = call(tiny_transformer(kind), arguments)
    with torch.no_grad():
        torch.testing.assert_close(call(ensemble, arguments), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_in_the_shell_is_that_expert(kind: str, dtype: torch.dtype) -> None:
    experts = [tiny_transformer(kind, n).to(dtype) for n in range(2)]
    ensemble = EnsembleDenoiser(experts, shell(discover_sites(experts[0]), expert=1))
    arguments = transformer_inputs(kind, num_experts=2, dtype=dtype)
    own = inputs_of(arguments, 1, 2)
    assert torch.equal(call(ensemble, arguments), call(experts[1], own))


def predict(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The model's own forward pass, as the prediction that is fused at the last site."""
    interface = family_of(model).interface
    return interface.prediction(model(**arguments, return_dict=False)[0])


def as_the_library_runs_them(names: list[str]) -> list[str]:
    """The sites in the order of the library: Z-Image refines the image first, then the text."""
    refined = [name for name in names if name.startswith("refiner")]
    texts = [name for name in refined if name.endswith(".text")]
    images = [name for name in refined if name not in texts]
    rest = [name for name in names if name not in refined]
    return [*rest[:1], *images, *texts, *rest[1:]]


def _embedded_timestep(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The embedding of the timestep, from a forward of its own before anything is fused."""
    alone: list[Any] = []
    names = ["distilled_guidance_layer", "time_text_embed", "time_guidance_embed"]
    names += ["adaln_single", "t_embedder"]
    timer = next((getattr(model, k) for k in names if hasattr(model, k)), None)
    timer = timer or model.transformer_blocks[0].norm1.emb
    noting = timer.register_forward_hook(lambda module, args, output: alone.append(output))
    with torch.no_grad():
        call(model, arguments)
    noting.remove()
    found = alone[0] if isinstance(alone[0], torch.Tensor) else alone[0][1]
    return found.mean(1) if found.ndim == 3 else found


class _Cutter:
    """N unmodified library forwards in greenlets; hooks hand every block's output to the rule.

    Shares nothing with the coroutines but the aggregators.
    """

    def __init__(self, ensemble: EnsembleDenoiser) -> None:
        self.ensemble = ensemble
        self.main = greenlet.getcurrent()

    def fuse(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        batch, count, channels = tokens.shape
        feature = tokens.transpose(1, 2).reshape(batch, channels, *size)
        fused = self.main.switch(feature)
        return fused.reshape(batch, channels, count).transpose(1, 2)

    def hook(self, model: Any, size: tuple[int, int]) -> list[Any]:
        """Hooks on all sites of one model but the last."""

        def embedded(module: Any, args: Any, output: Any) -> Any:
            return self.fuse(output, size)

        def block(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                length = output.shape[1] - size[0] * size[1]
                text, image = output[:, :length], self.fuse(output[:, length:], size)
                if length and module is not layers[-1]:  # both streams in one
                    text = self.fuse(text, (length, 1))
                return torch.cat([text, image], dim=1)
            text, image = output
            image = self.fuse(image, size)
            is_last = module is layers[-1]
            return text if is_last else self.fuse(text, (text.shape[1], 1)), image

        if hasattr(model, "noise_refiner"):
            return self.hook_z_image(model, size)
        layers = [
            *model.transformer_blocks,
            *getattr(model, "single_transformer_blocks", []),
        ]
        names = ("x_embedder", "img_in", "pos_embed")
        first = next(getattr(model, name) for name in names if hasattr(model, name))
        return [
            first.register_forward_hook(embedded),
            *(layer.register_forward_hook(block) for layer in layers),
        ]

    def hook_z_image(self, model: Any, size: tuple[int, int]) -> list[Any]:
        """The same for Z-Image, for as many image tokens as it does not pad."""
        count = size[0] * size[1]

        def embedded(module: Any, args: Any, output: Any) -> Any:
            return self.fuse(output.unflatten(0, (-1, count)), size).flatten(0, 1)

        def text(module: Any, args: Any, output: Any) -> Any:
            return self.fuse(output, (output.shape[1], 1))

        def block(module: Any, args: Any, output: Any) -> Any:
            rest, image = output[:, count:], self.fuse(output[:, :count], size)
            if rest.shape[1] and module is not model.layers[-1]:
                rest = text(module, args, rest)
            return torch.cat([image, rest], dim=1)

        images = [*model.noise_refiner, *model.layers]
        return [
            model.all_x_embedder["2-1"].register_forward_hook(embedded),
            *(layer.register_forward_hook(block) for layer in images),
            *(layer.register_forward_hook(text) for layer in model.context_refiner),
        ]

    def __call__(self, arguments: dict[str, Any], size: tuple[int, int]) -> torch.Tensor:
        experts, interface = list(self.ensemble.experts), self.ensemble.family.interface
        tembs: list[torch.Tensor] = []
        hooks, workers = [], []
        texts: list[Any] = []
        for n, model in enumerate(experts):
            own = inputs_of(arguments, n, len(experts))
            texts.append(interface.arguments(dict(own)).get("encoder_hidden_states"))
            tembs.append(_embedded_timestep(model, own))
            hooks += self.hook(model, size)
            workers.append(greenlet.greenlet(lambda model=model, own=own: predict(model, own)))
        text = None if texts[0] is None else torch.stack(texts).mean(0)
        given = interface.arguments(dict(arguments))
        condition = Condition(
            given["timestep"],
            torch.stack(tembs).mean(0),
            text,
            given["hidden_states"],
            text_mask(given),
        )
        features = [worker.switch() for worker in workers]
        *names, out = [site.name for site in self.ensemble.sites]
        last = self.ensemble.rule_at(out)
        for rule in map(self.ensemble.rule_at, as_the_library_runs_them(names)):
            fused = rule(features, condition).feature
            features = [worker.switch(fused) for worker in workers]
        for hook in hooks:
            hook.remove()
        if features[0].ndim == 3:  # packed
            grids = [f.transpose(1, 2).unflatten(-1, size) for f in features]
            return last(grids, condition).feature.flatten(2).transpose(1, 2)
        return stacked(interface.output(last(features, condition).feature))


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [(kind, 8, 8) for kind in KINDS if kind != "z-image"]
    + [(kind, 8, 4) for kind in KINDS if kind not in ("dit", "z-image")]
    + [("z-image", 16, 8)],  # 32 tokens
)
def test_an_independent_cutter_agrees(kind: str, height: int, width: int) -> None:
    ensemble = ensemble_of(kind)
    arguments = transformer_inputs(kind, height=height, width=width, num_experts=3)
    ours = call(ensemble, arguments)
    theirs = _Cutter(ensemble)(arguments, (height // 2, width // 2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    parameters = list(ensemble.aggregators.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.square().mean(), parameters),
        torch.autograd.grad(theirs.square().mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_moves_the_aggregators_only(kind: str) -> None:
    ensemble = ensemble_of(kind)
    before = {k: v.clone() for k, v in ensemble.experts.state_dict().items()}
    moved = {k: v.clone() for k, v in ensemble.aggregators.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in ensemble.parameters() if p.requires_grad), lr=0.1)
    ensemble.train()
    call(ensemble, transformer_inputs(kind, num_experts=3)).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in ensemble.experts.parameters())
    assert all(p.grad is not None for p in ensemble.aggregators.parameters())
    for key, value in ensemble.experts.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(not torch.equal(v, moved[k]) for k, v in ensemble.aggregators.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    plain, checkpointed = ensemble_of(kind), ensemble_of(kind)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.enable_gradient_checkpointing()
    for ensemble in (plain, checkpointed):
        call(ensemble, transformer_inputs(kind, num_experts=3)).square().mean().backward()
    for a, b in zip(
        plain.aggregators.parameters(), checkpointed.aggregators.parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_a_text_is_fused_by_weights_of_its_own() -> None:
    ensemble = ensemble_of("flux")
    seen: dict[str, torch.Tensor] = {}
    ensemble.on_weights = lambda _, site, weights: seen.update({site: weights})
    with torch.no_grad():
        call(ensemble, transformer_inputs("flux", num_experts=3))
    assert seen["double.0"].shape == (2, 3, 4, 4)
    assert seen["double.0.text"].shape == (2, 3, 5, 1)
    rules = dict(zip((s.name for s in ensemble.sites), ensemble.aggregators, strict=True))
    text: Any = rules["double.0.text"]
    image: Any = rules["double.0"]
    assert not text.config.prompt, "its features are the prompt"
    assert image.config.text_channels == TEXT_WIDTH


def test_padding_is_not_attended_to() -> None:
    ensemble = ensemble_of("pixart")
    arguments = transformer_inputs("pixart", num_experts=3)
    with torch.no_grad():
        before = call(ensemble, arguments)
        arguments["encoder_hidden_states"][0, 3:] += 100  # masked
        after = call(ensemble, arguments)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
        arguments["encoder_hidden_states"][1, 3:] += 100
        assert not torch.allclose(call(ensemble, arguments), before, atol=1e-3)


def test_a_stride_leaves_blocks_alone() -> None:
    ensemble = ensemble_of("flux", aggregators=replace(SMALL, stride=2))
    fused = [
        site.name
        for site, rule in zip(ensemble.sites, ensemble.aggregators, strict=True)
        if not isinstance(rule, Separate)
    ]
    assert fused == ["embed", "double.1", "double.1.text", "single.1", "single.1.text", "out"]
    with torch.no_grad():
        assert call(ensemble, transformer_inputs("flux", num_experts=3)).isfinite().all()


def test_flux_fits_into_a_hundred_million_parameters() -> None:
    """Of three experts of Flux's size, 57 blocks of width 3072, with the paper's aggregators."""
    with torch.device("meta"):
        sites = discover_sites(tiny_transformer("flux"))
        wide = [replace(s, channels=3072, temb_channels=3072) for s in sites]
        embed, double, double_text, single, single_text, out = (
            wide[0],
            wide[1],
            wide[2],
            wide[5],
            wide[6],
            replace(wide[-1], channels=64),
        )
        blocks = []
        for k in range(19):
            blocks += [
                replace(double, name=f"double.{k}"),
                replace(double_text, name=f"double.{k}.text"),
            ]
        for k in range(38):
            blocks += [
                replace(single, name=f"single.{k}"),
                replace(single_text, name=f"single.{k}.text"),
            ]
        sizes = {}
        for stride in (1, 4, 5, 6):
            rules = build_sabw(SABWConfig(stride=stride), [embed, *blocks[:-1], out], 3, 4096)
            sizes[stride] = sum(p.numel() for rule in rules for p in rule.parameters())
    assert sizes[1] > 300e6
    assert sizes[5] < 100e6, sizes


def test_another_picture_in_the_tokens_is_refused() -> None:
    ensemble = ensemble_of("flux", 2)
    arguments = transformer_inputs("flux", num_experts=2)
    arguments["img_ids"] = arguments["img_ids"].clone()
    arguments["img_ids"][8:, 0] = 1
    with refusal("AFA-MODEL-014"):
        call(ensemble, arguments)
