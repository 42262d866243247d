"""LoHa, LoKr and DoRA of LyCORIS: by their definition, and as the library computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import afa
from afa.denoisers.original_names import Rows
from afa.lora.lycoris import change_of, decomposed
from afa.lora.merge import merged
from tests.lora.models import with_lora, write
from tests.refusal import refusal
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"
POINT = "down_blocks.1.attentions.0.proj_in"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **ODD["two levels"])


def _file(folder: Path, layer: str, tensors: dict[str, Tensor]) -> Path:
    """A file in the layout of kohya's scripts."""
    name = "lora_unet_" + layer.replace(".", "_")
    return write(folder / "l.safetensors", {f"{name}.{k}": t for k, t in tensors.items()})


def _tensors(layer: Any, kind: str, rank: int = 2) -> dict[str, Tensor]:
    """Random tensors of a kind for a layer."""
    out, inner, *kernel = layer.weight.shape
    torch.manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape)

    size = torch.Size(kernel).numel()
    kinds: dict[str, dict[str, tuple[int, ...]]] = {
        "loha": {
            **{f"hada_w{n}_a": (out, rank) for n in (1, 2)},
            **{f"hada_w{n}_b": (rank, inner * size) for n in (1, 2)},
        },
        "loha, tucker": {
            **{f"hada_w{n}_a": (rank, out) for n in (1, 2)},
            **{f"hada_w{n}_b": (rank, inner) for n in (1, 2)},
            **{f"hada_t{n}": (rank, rank, *kernel) for n in (1, 2)},
        },
        "lokr": {"lokr_w1": (2, 4), "lokr_w2": (out // 2, inner // 4, *kernel)},
        "lokr, low rank": {
            "lokr_w1_a": (2, rank),
            "lokr_w1_b": (rank, 4),
            "lokr_w2_a": (out // 2, rank),
            "lokr_w2_b": (rank, inner // 4, *kernel),
        },
        "lokr, tucker": {
            "lokr_w1": (2, 4),
            "lokr_w2_a": (rank, out // 2),
            "lokr_w2_b": (rank, inner // 4),
            "lokr_t2": (rank, rank, *kernel),
        },
        "locon": {"lora_up.weight": (out, rank), "lora_down.weight": (rank, inner, *kernel)},
    }
    found = {name: drawn(*shape) for name, shape in kinds[kind].items()}
    if kernel and kind == "locon":
        found["lora_up.weight"] = found["lora_up.weight"][..., None, None]
    return {**found, "alpha": torch.tensor(3.0)}


# -- by definition ----------------------------------------------------------------------------


def test_loha_is_the_product_of_two_low_rank_products(pipeline: Any, tmp_path: Path) -> None:
    layer = pipeline.unet.get_submodule(LINEAR)
    t = _tensors(layer, "loha")
    new = with_lora(pipeline, _file(tmp_path, LINEAR, t), 0.5).unet.get_submodule(LINEAR).weight
    change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    torch.testing.assert_close(new, layer.weight + 0.5 * 3 / 2 * change)


@pytest.mark.parametrize("where", [LINEAR, CONV])
def test_lokr_is_a_kronecker_product(where: str, pipeline: Any, tmp_path: Path) -> None:
    layer = pipeline.unet.get_submodule(where)
    t = _tensors(layer, "lokr")
    new = with_lora(pipeline, _file(tmp_path, where, t), 0.5).unet.get_submodule(where).weight
    first = t["lokr_w1"].reshape(2, 4, *(1 for _ in layer.weight.shape[2:]))
    # alpha has no effect without a rank
    torch.testing.assert_close(new, layer.weight + 0.5 * torch.kron(first, t["lokr_w2"]))


def test_dora_sets_norms_by_output_or_by_input(pipeline: Any, tmp_path: Path) -> None:
    for where in (LINEAR, CONV):
        layer = pipeline.unet.get_submodule(where)
        t = _tensors(layer, "locon")
        out, inner, *kernel = layer.weight.shape
        ones = [1 for _ in kernel]
        change = (t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)) * 1.5
        whole = layer.weight + change.reshape(layer.weight.shape)
        for shape, dim in (((out, 1, *ones), 0), ((1, inner, *ones), 1)):
            t["dora_scale"] = torch.rand(shape) + 0.5
            ours = with_lora(pipeline, _file(tmp_path, where, t)).unet.get_submodule(where)
            norms = ours.weight.transpose(0, dim).flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, t["dora_scale"].flatten())
            torch.testing.assert_close(
                functional.normalize(ours.weight.transpose(0, dim).flatten(1)),
                functional.normalize(whole.transpose(0, dim).flatten(1)),
            )


def test_joined_layers_get_their_rows() -> None:
    """A product for the joined queries, keys and values of the original code is split by rows."""
    torch.manual_seed(0)
    t = {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(4, 4)}
    t["dora_scale"] = torch.rand(12, 1) + 0.5
    base = {f"{name}.weight": torch.randn(4, 8) for name in "qkv"}
    rows = tuple(map(Rows, "qkv"))
    found = dict(merged(t, rows, base, 1.0, 1.0))  # type: ignore[arg-type]
    joined = torch.cat([*base.values()]) + torch.kron(t["lokr_w1"], t["lokr_w2"])
    expected = decomposed(joined, t["dora_scale"])
    torch.testing.assert_close(torch.cat([*found.values()]), expected)
    assert change_of({"up": torch.ones(1, 1)}) is None


def test_names_of_lycoris_and_of_the_original_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = PIPELINES["flux"](tmp_path / "tokenizer")
    old = pipeline.transformer.transformer_blocks[0].attn
    joined, single = (torch.randn(3, 2), torch.randn(16, 8)), (torch.randn(4, 4), torch.randn(4, 4))
    first = "diffusion_model.double_blocks.0.img_attn.qkv"
    second = "lycoris_single_transformer_blocks_0_attn_to_q"
    tensors = {
        f"{place}.lokr_w{n + 1}": factors[n]
        for place, factors in ((first, joined), (second, single))
        for n in (0, 1)
    }
    tensors[f"{first}.alpha"] = torch.tensor(1e9)  # as trainers write it for complete factors
    ours = with_lora(pipeline, write(tmp_path / "l.safetensors", tensors)).transformer
    attention = ours.transformer_blocks[0].attn
    for name, change in zip(("to_q", "to_k", "to_v"), torch.kron(*joined).chunk(3), strict=True):
        expected = old.get_submodule(name).weight + change
        torch.testing.assert_close(attention.get_submodule(name).weight, expected)
    place = "single_transformer_blocks.0.attn.to_q"
    expected = pipeline.transformer.get_submodule(place).weight + torch.kron(*single)
    torch.testing.assert_close(ours.get_submodule(place).weight, expected)


# -- as the library computes them -------------------------------------------------------------


@pytest.mark.parametrize("where", [LINEAR, CONV, POINT])
@pytest.mark.parametrize(
    "kind", ["loha", "loha, tucker", "lokr", "lokr, low rank", "lokr, tucker", "locon"]
)
@pytest.mark.parametrize("dora", [None, "output", "input"])
def test_as_lycoris_computes_it(
    kind: str, where: str, dora: str | None, pipeline: Any, tmp_path: Path
) -> None:
    general = pytest.importorskip("lycoris.functional.general")
    from lycoris.functional import locon, loha, lokr

    layer = pipeline.unet.get_submodule(where)
    if "tucker" in kind and layer.weight.ndim == 2:
        pytest.skip("a core is for convolutions")
    t = _tensors(layer, kind)
    get = t.get
    factor = 3 / 2 if kind != "lokr" else 1.0
    if kind.startswith("loha"):
        halves = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        change = loha.diff_weight(*(get(f"hada_{name}") for name in halves), gamma=factor)
    elif kind.startswith("lokr"):
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        change = lokr.kron_weight(*(get(f"lokr_{name}") for name in names), scale=factor)
    else:
        change = locon.diff_weight(t["lora_down.weight"], t["lora_up.weight"], None, gamma=factor)
    expected = layer.weight + change.reshape(layer.weight.shape)
    scale = 1.0
    if dora is None:
        scale, expected = 0.7, layer.weight + 0.7 * change.reshape(layer.weight.shape)
    else:
        out, inner, *kernel = layer.weight.shape
        shape = (out, 1) if dora == "output" else (1, inner)
        t["dora_scale"] = torch.rand(*shape, *(1 for _ in kernel)) + 0.5
        expected = general.weight_decompose(expected, t["dora_scale"], 1, dora == "output")
    ours = with_lora(pipeline, _file(tmp_path, where, t), scale).unet.get_submodule(where).weight
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["LohaModule", "LokrModule", "LoConModule"])
def test_files_of_its_modules_give_its_outputs(name: str, pipeline: Any, tmp_path: Path) -> None:
    modules = pytest.importorskip("lycoris.modules")
    for where in (LINEAR, CONV):
        layer = pipeline.unet.get_submodule(where)
        torch.manual_seed(2)
        module = getattr(modules, name)(
            "x", layer, multiplier=1.0, lora_dim=2, alpha=1, weight_decompose=True
        )
        for parameter in module.parameters():
            parameter.data = 0.2 * torch.rand(parameter.shape) + 0.1
        state = {k: v.detach().clone() for k, v in module.custom_state_dict().items()}
        ours = with_lora(pipeline, _file(tmp_path, where, state)).unet.get_submodule(where)
        picture = torch.randn(2, layer.weight.shape[1], 5, 5)
        inputs = picture if where == CONV else picture.permute(0, 2, 3, 1)
        module.eval()
        torch.testing.assert_close(ours(inputs), module(inputs), rtol=1e-4, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "code", "said"),
    [
        ("loha", lambda t: t.pop("hada_w2_b"), "AFA-LORA-016", "hada_w2_b"),
        ("loha, tucker", lambda t: t.pop("hada_t2"), "AFA-LORA-016", "hada_t2"),
        ("lokr", lambda t: t.pop("lokr_w2"), "AFA-LORA-016", "lokr_w2_a"),
        ("lokr, low rank", lambda t: t.pop("lokr_w1_b"), "AFA-LORA-016", "lokr_w1_b"),
        ("loha", lambda t: t.update(hada_w1_a=torch.ones(7, 2)), "AFA-LORA-013", "hada_w1_a"),
        ("lokr", lambda t: t.update(lokr_w1=torch.ones(3, 4)), "AFA-LORA-013", "lokr"),
        ("lokr", lambda t: t.update(lokr_w1=torch.ones(4)), "AFA-LORA-013", "lokr"),
        ("lokr", lambda t: t.update(lokr_w1_a=torch.ones(2, 2)), "AFA-LORA-011", "lokr_w1"),
        ("loha", lambda t: t.update(lokr_w1=torch.ones(2, 4)), "AFA-LORA-0(11|16)", "lokr"),
        ("locon", lambda t: t.update(dora_scale=torch.ones(5, 1)), "AFA-LORA-013", "dora_scale"),
    ],
)
def test_incomplete_and_misfitting_files(
    kind: str, change: Any, code: str, said: str, pipeline: Any, tmp_path: Path
) -> None:
    where = CONV if "tucker" in kind else LINEAR
    t = _tensors(pipeline.unet.get_submodule(where), kind)
    change(t)
    with pytest.raises(afa.AfaError, match=said) as raised:
        with_lora(pipeline, _file(tmp_path, where, t))
    assert raised.match(code)


def test_dora_alone_and_with_a_scale(pipeline: Any, tmp_path: Path) -> None:
    layer = pipeline.unet.get_submodule(LINEAR)
    t = _tensors(layer, "lokr")
    t["dora_scale"] = torch.ones(len(layer.weight), 1)
    with refusal("AFA-LORA-017", "0.7", "scale: 1"):
        with_lora(pipeline, _file(tmp_path, LINEAR, t), 0.7)
    t = {**_tensors(layer, "locon"), "x.dora_scale": torch.ones(2, 1)}
    alone = {"dora_scale": t["x.dora_scale"]}
    whole = {
        **{f"lora_unet_{LINEAR.replace('.', '_')}.{k}": v for k, v in t.items() if "x." not in k},
        **{f"lora_unet_{CONV.replace('.', '_')}.{k}": v for k, v in alone.items()},
    }
    with refusal("AFA-LORA-016", "the product"):
        with_lora(pipeline, write(tmp_path / "a.safetensors", whole))


def test_dora_by_input_of_joined_layers(tmp_path: Path) -> None:
    pipeline = PIPELINES["flux"](tmp_path / "tokenizer")
    place = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{place}.lora_up.weight": torch.ones(48, 2),
        f"{place}.lora_down.weight": torch.ones(2, 16),
        f"{place}.dora_scale": torch.ones(1, 16),
    }
    with refusal("AFA-LORA-018", "to_q", "qkv.dora_scale"):
        with_lora(pipeline, write(tmp_path / "l.safetensors", tensors))
    tensors[f"{place}.dora_scale"] = torch.ones(48, 1)
    ours = with_lora(pipeline, write(tmp_path / "l.safetensors", tensors)).transformer
    weight = ours.transformer_blocks[0].attn.to_k.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(16))
