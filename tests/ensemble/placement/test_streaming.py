"""Experts in a file: what they compute, what is in memory, what is left behind."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.ensemble.placement import streaming
from afa.ensemble.placement.streaming import LayerStream
from tests.ensemble.caching.test_loop import FAMILIES, arguments_of, draw, ensemble_of
from tests.refusal import refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_experts_compute_the_same(family: str, dtype: torch.dtype) -> None:
    ensemble = ensemble_of(family).to(dtype)
    arguments = arguments_of(family, dtype=dtype)
    expected = draw(ensemble, arguments)
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    ensemble.stream_experts()
    for came in (draw(ensemble, arguments), draw(ensemble, arguments)):  # learned by then
        assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))
    ensemble.stop_offloading()
    after = ensemble.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), expected, strict=True))


def test_layers_are_not_in_memory() -> None:
    ensemble = ensemble_of("unet")
    ensemble.stream_experts()
    layers = {
        p for e in ensemble.experts for m in ensemble.family.layers(e) for p in m.parameters()
    }
    assert layers
    assert all(parameter.is_meta for parameter in layers)
    rest = [p for p in ensemble.experts.parameters() if p not in layers]
    assert rest
    assert not any(parameter.is_meta for parameter in rest)
    assert ensemble.device.type == "cpu"
    assert not any(p.requires_grad for p in ensemble.experts.parameters())


def test_it_goes_together_with_what_is_left_out() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=2, keep_weights=True)
    expected = draw(ensemble, arguments)
    ensemble.stream_experts(ahead=1)
    assert all(torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), expected, strict=True))


def test_what_comes_next_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(4)]
    stream = LayerStream(ahead=2)
    stream.add(layers)
    asked: list[int] = []
    read = LayerStream.read

    def note(self: LayerStream, layer: Any) -> Any:
        asked.append(layers.index(layer))
        return read(self, layer)

    monkeypatch.setattr(LayerStream, "read", note)
    for layer in layers:
        stream(layer)
    assert asked == [0, 1, 2, 3]
    asked.clear()
    stream(layers[0])  # 3 is followed by 0 from now on
    stream.reader.submit(lambda: None).result()
    assert asked == [0, 1, 2]
    stream(layers[1])
    stream.reader.submit(lambda: None).result()
    assert asked == [0, 1, 2, 3]
    stream(layers[0])  # another way: what was read ahead is let go of
    stream.reader.submit(lambda: None).result()
    assert set(stream.reading) == {layers[1]}
    stream.close()


def test_a_layer_s_own_tensors_come_back() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    stream = LayerStream()
    stream.add([layer, layer])
    came = stream(layer)
    assert all(torch.equal(came[name], tensor) for name, tensor in before.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in came.values())
    outside = torch.nn.Linear(2, 2)
    assert torch.equal(stream(outside)["weight"], outside.weight)
    stream.close()
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_file_has_no_name(tmp_path: Path) -> None:
    stream = LayerStream(folder=tmp_path)
    stream.add([torch.nn.Linear(8, 8)])
    assert not list(tmp_path.iterdir())
    assert os.fstat(stream.file.fileno()).st_size >= 8 * 8 * 4


def test_the_reader_itself_may_be_the_last_to_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a picture is broken off while the next layers are being read."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    layer, go_on = torch.nn.Linear(2, 2), threading.Event()
    stream = LayerStream()
    stream.add([layer])
    file, reader = stream.file, stream.reader
    reader.submit(lambda kept: go_on.wait(10) and None, stream)
    del stream
    assert not file.closed
    go_on.set()
    reader.shutdown()
    assert file.closed
    assert not said


def test_layers_can_be_handed_over_one_expert_after_another() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    expected, stream = draw(ensemble, arguments), LayerStream()
    for expert in ensemble.experts:
        stream.add(ensemble.family.layers(expert))
    ensemble.use_stream(stream, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), expected, strict=True))


def test_what_is_in_a_file_is_not_moved_or_cast() -> None:
    ensemble = ensemble_of("unet")
    ensemble.stream_experts()
    for move in (ensemble.half, lambda: ensemble.to("cpu")):
        with refusal("AFA-ENSEMBLE-046"):
            move()
    ensemble.stop_offloading()
    ensemble.to(torch.bfloat16)


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: Usage)
    layer = torch.nn.Linear(8, 8)
    with refusal("AFA-ENSEMBLE-042", r"0\.00"):
        LayerStream(folder=tmp_path).add([layer])
    assert not layer.weight.is_meta


def test_a_stock_pipeline_draws_with_streamed_experts() -> None:
    pipeline = afa.load_ensemble("zoo:ensemble")
    pipeline.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 3, "output_type": "latent", "generator": generator}
        return pipeline("a fox on the left and a pizza on the right", **settings).images

    expected = latents()
    pipeline.unet.stream_experts()
    assert torch.equal(latents(), expected)
