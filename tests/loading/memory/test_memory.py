"""What an ensemble will take, told before it is loaded, and the choice of where to keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import afa
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.loading.memory import needs as needs_module
from afa.loading.memory.bits import EIGHT
from afa.loading.memory.budget import choose, parse_size
from afa.loading.memory.live import measure
from afa.loading.memory.needs import Needs, needs_of
from afa.loading.pipeline import load_pipeline
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES, saved_experts

SMALL = afa.SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    names = [tmp_path / name for name in ("one", "two")]
    for seed, name in enumerate(names):
        tiny_pipeline(name, seed).save_pretrained(name)
    return names


def draw(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a fox", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("900mb", 9e8), ("2TB", 2e12), ("1000", 1000)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 XB", "-1GB", "0GB", "8GB 1"])
def test_what_is_no_size(text: str) -> None:
    with refusal("AFA-MEMORY-001", "8GB"):
        parse_size(text)


def test_attention_is_measured_however_it_is_called() -> None:
    """Flux names its arguments; two products of 4 queries with 6 keys, in 2 heads of 8."""
    query, other = (torch.empty(1, 2, length, 8, device="meta") for length in (4, 6))
    attention = functional.scaled_dot_product_attention
    by_place = measure(lambda: attention(query, other, other))
    by_name = measure(lambda: attention(query=query, key=other, value=other))
    assert by_place == by_name == (4 * 2 * 4 * 8, 2 * 2 * (2 * 4 * 6 * 8))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_lives_at_once(device: str) -> None:
    kilobyte = torch.empty(256, device=device)

    def chain() -> torch.Tensor:
        kept = kilobyte + 1  # 1
        passing = torch.cat([kept, kept])  # 3
        passing = passing * 2  # 5, then 3
        return kept + passing[:256]  # a view takes nothing: 4

    assert measure(chain)[0] == 5 * 1024
    assert measure(lambda: kilobyte.view(2, 128).add_(1))[0] == 0  # nothing is made
    assert measure(lambda: nn.functional.relu(kilobyte))[0] == 1024


def test_attention_is_counted_without_its_scores() -> None:
    query = torch.empty(1, 1, 1000, 8, device="meta")
    taken = measure(lambda: functional.scaled_dot_product_attention(query, query, query))[0]
    assert taken == query.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_that_are_loaded(folders: list[Path], dtype: torch.dtype) -> None:
    needs = needs_of(folders[0], 2, SMALL, encoder_sets=2, dtype=dtype)
    ensemble = denoiser_of(load_pipeline(folders, SMALL, torch_dtype=dtype))
    experts = sum(p.numel() * p.element_size() for p in ensemble.experts.parameters())
    assert needs.layers + needs.rest == experts
    layers = [layer for e in ensemble.experts for layer in ensemble.family.layers(e)]
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    assert needs.largest == max(sizes)
    assert needs.layers == sum(sizes)
    aggregators = sum(p.numel() for p in ensemble.aggregators.parameters())
    copies = aggregators * dtype.itemsize if dtype == torch.bfloat16 else 0
    pipeline = tiny_pipeline(folders[0].parent / "three")
    decoder = sum(p.numel() for p in pipeline.vae.parameters()) * dtype.itemsize
    assert needs.others == decoder + aggregators * 4 + copies
    encoder = sum(p.numel() for p in pipeline.text_encoder.parameters()) * dtype.itemsize
    assert encoder <= needs.encoders / 2 < 1.1 * encoder + 1000  # and buffers
    assert needs.work > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind not in ("dit", "refiner")])
def test_models_of_every_kind_are_measured(kind: str, tmp_path: Path) -> None:
    folders = saved_experts(kind, tmp_path, count=2)
    needs = needs_of(folders[0], 2, SMALL, encoder_sets=2, dtype=torch.float32)
    pipeline = load_pipeline(folders, SMALL)
    ensemble = denoiser_of(pipeline)
    tensors = [*ensemble.experts.parameters(), *ensemble.experts.buffers()]
    assert needs.layers + needs.rest == sum(t.nbytes for t in tensors)
    others = [*pipeline.vae.parameters(), *pipeline.vae.buffers()]
    assert needs.others == sum(t.nbytes for t in [*others, *ensemble.aggregators.parameters()])
    assert min(needs.layers, needs.encoders, needs.work, needs.flops) > 0


def test_more_pixels_take_more(folders: list[Path]) -> None:
    small, large = (
        needs_of(folders[0], 2, SMALL, encoder_sets=1, dtype=torch.float32, pixels=pixels)
        for pixels in (64 * 64, 128 * 128)
    )
    assert large.work == pytest.approx(4 * small.work, rel=0.01)
    assert large.layers == small.layers


def test_quantised_linear_layers_take_less(folders: list[Path]) -> None:
    whole, packed = (
        needs_of(folders[0], 2, None, encoder_sets=1, dtype=torch.float32, weight_bits=bits)
        for bits in (None, EIGHT)
    )
    assert packed.layers < whole.layers
    assert packed.encoders == whole.encoders


GB = 1_000_000_000
NEEDS = Needs(
    num_experts=3, layers=9 * GB, largest=GB // 10, rest=0, encoders=GB, others=0, work=GB
)


@pytest.mark.parametrize(
    ("budget", "device", "place"),
    [
        (13, "cpu", "memory"),
        (6, "cpu", "stream"),
        (13, "cuda", "memory"),
        (4, "cuda", "offload"),
    ],
)
def test_the_fastest_that_fits(budget: int, device: str, place: str) -> None:
    plan = choose(NEEDS, budget * GB, device)
    assert plan.place == place
    (chosen,) = (line for line in plan.lines() if line.endswith("fits, chosen"))
    assert {"memory": "in memory", "stream": "in a file", "offload": "CPU's"}[place] in chosen


def test_nothing_fits() -> None:
    with refusal("AFA-MEMORY-002", r"1\.00"):
        choose(NEEDS, GB, "cpu")


def test_the_same_is_drawn_wherever_experts_are(folders: list[Path]) -> None:
    expected = draw(load_pipeline(folders))
    places: tuple[Any, ...] = ("stream", "offload")
    for place in places:
        pipeline = load_pipeline(folders, place=place)
        assert denoiser_of(pipeline).execution.device is not None
        assert torch.equal(draw(pipeline), expected)


def test_what_cannot_be_planned_or_placed(folders: list[Path]) -> None:
    with refusal("AFA-LOAD-042", "'disk'"):
        load_pipeline(folders, place="disk")  # type: ignore[arg-type]
    (folders[0] / "vae" / "config.json").unlink()
    with refusal("AFA-MEMORY-003"):
        load_pipeline(folders, vae=folders[1], memory_budget="8GB")


def test_a_budget_decides_and_says_so_first(folders: list[Path], monkeypatch: Any) -> None:
    seen: list[Any] = []
    pipeline = load_pipeline(folders, memory_budget="100GB", on_plan=seen.append)
    assert seen[0].place == "memory"
    assert denoiser_of(pipeline).execution.device is None
    # experts of this size would take as much streamed as not: a file costs nothing here
    monkeypatch.setattr("afa.loading.memory.needs.Needs.streamed", lambda *_: 0)
    monkeypatch.setattr("afa.loading.memory.budget.program_bytes", lambda _: 0)
    pipeline = load_pipeline(folders, memory_budget=1, on_plan=seen.append)
    assert seen[1].place == "stream"
    assert denoiser_of(pipeline).execution.source is not None
    monkeypatch.undo()
    monkeypatch.setattr(
        "afa.loading.pipeline.load_described", lambda *_, **__: pytest.fail("was loaded")
    )
    with refusal("AFA-MEMORY-002", r"\)\. Raise it, draw smaller pictures, or load"):
        load_pipeline(folders, memory_budget="1KB")
    with refusal("AFA-MEMORY-002", r"200\.0 MB|0\.20 GB of it for the judge.*--no-drafts"):
        load_pipeline(folders, memory_budget="1KB", reserved=200_000_000)


def test_equal_text_encoders_are_one(folders: list[Path], tmp_path: Path) -> None:
    pipeline: Any = load_pipeline(folders)
    assert len(pipeline.text_encoder.encoders) == 2
    tiny_pipeline(tmp_path / "twin", 0).save_pretrained(tmp_path / "twin")
    twin: Any = load_pipeline([folders[0], tmp_path / "twin"], allow_duplicates=True)
    assert len(twin.text_encoder.encoders) == 1


def test_quantising_needs_torchao(folders: list[Path], monkeypatch: Any) -> None:
    with refusal("AFA-LOAD-058", "int8, float8", "'int3'"):
        load_pipeline(folders, quantize="int3")  # type: ignore[arg-type]
    monkeypatch.setattr("afa.loading.quantization.find_spec", lambda _: None)
    with refusal("AFA-LOAD-059"):
        load_pipeline(folders, quantize="int8")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_quantised_experts_draw_nearly_the_same(folders: list[Path], weights: Any) -> None:
    pytest.importorskip("torchao")
    expected = draw(load_pipeline(folders))
    pipeline = load_pipeline(folders, quantize=weights)
    with pytest.raises(AfaError, match="must be in memory"):
        load_pipeline(folders, quantize=weights, place="stream")
    came = draw(pipeline)
    assert not torch.equal(came, expected)
    assert (came - expected).abs().mean() < 0.02


def test_an_estimate_is_measured_once_and_damage_of_what_is_kept_is_harmless(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    real = needs_module.measure_models

    def measure_noted(*given: Any) -> Any:
        measured.append(given)
        return real(*given)

    monkeypatch.setattr(needs_module, "measure_models", measure_noted)

    def again() -> Needs:
        needs_module.measure_cached.cache_clear()  # as in another process
        return needs_of(folders[0], 2, SMALL, encoder_sets=2, dtype=torch.float32)

    first = again()
    assert again() == first
    assert len(measured) == 1
    (kept,) = tmp_path.rglob("estimates/*.json")
    for damaged in ("{", "[]", '{"layers": 1}'):
        kept.write_text(damaged)
        assert again() == first
    assert len(measured) == 4
    needs_module.measure_cached.cache_clear()
    needs_of(folders[0], 3, SMALL, encoder_sets=2, dtype=torch.float32)  # another question
    assert len(measured) == 5
