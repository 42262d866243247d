"""Safetensors files tensor by tensor: the library's format, and little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afa.loading.tensor_files import TensorSpec, header_of, read_header


def test_files_are_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).half(),
        "c": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    content = (tmp_path / "library.safetensors").read_bytes()
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert content.startswith(header_of(specs, {"format": "pt"}))
    for name, stored in read_header(tmp_path / "library.safetensors").items():
        assert torch.equal(stored.read(), tensors[name])


_PEAK = """
import resource, sys
from pathlib import Path
from afa.merging import MergeRecipe, merge_checkpoints
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(folder, output):
    experts = [str(Path(folder) / f'{n}.safetensors') for n in range(3)]
    for _ in merge_checkpoints(MergeRecipe(method='weighted', experts=experts), output):
        pass
run(sys.argv[1], sys.argv[3])
before = peak()
run(sys.argv[2], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.nightly
@pytest.mark.slow
def test_memory_is_of_one_tensor_and_not_of_models(tmp_path: Path) -> None:
    num_tensors, side = 40, 1024  # 4 MB each in float32, 160 MB a model
    for folder, count in (("small", 1), ("large", num_tensors)):
        (tmp_path / folder).mkdir()
        for n in range(3):
            tensors = {f"layer{i}.weight": torch.randn(side, side) for i in range(count)}
            save_file(tensors, tmp_path / folder / f"{n}.safetensors")
    paths = [tmp_path / name for name in ("small", "large", "a.safetensors", "b.safetensors")]
    command = [sys.executable, "-c", _PEAK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # after a model of one tensor, a model of 40 takes next to nothing more: less than half of one
    assert int(done.stdout) < 1.5 * 3 * 4 * side * side, done.stdout
