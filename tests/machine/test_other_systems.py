"""Windows and macOS, as far as they can be simulated here; docs/compatibility.md says what is."""

from __future__ import annotations

import ast
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import afa
from afa.drawing.recorded import read_picture
from afa.ensemble.placement.streaming import LayerStream, _read_at, _read_from
from afa.evaluation.recipe import slug
from afa.evaluation.search import _open_study
from afa.files import put_in_place, staged
from afa.loading import quantization
from afa.loading.sources import absolute_source, locate, relative_source
from afa.machine import devices
from afa.machine.devices import may_overlap, place_for_float64, widest_float
from afa.training.data import FolderImages, Joined, SceneImages
from afa.training.examples import LiveExamples
from afa.training.transform import Transform
from tests.refusal import refusal
from tests.training.runs import SMALL, recipe, steps_of
from tests.training.test_cache import folder_of

SOURCE = Path(__file__).parents[2] / "src" / "afa"
CPU, METAL = torch.device("cpu"), torch.device("mps")


# -- files and paths --------------------------------------------------------------------------


def test_texts_are_read_and_written_as_utf_8() -> None:
    """Otherwise Windows uses the encoding of its language."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_method = isinstance(node.func, ast.Attribute)
            modes = [value.value for value in node.args if isinstance(value, ast.Constant)]
            is_text = (is_method and name in ("read_text", "write_text")) or (
                name in ("open", "fdopen", "NamedTemporaryFile")
                and any(mode in ("r", "w", "a", "x", "r+", "w+") for mode in modes)
            )
            if is_text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"{file.name}:{node.lineno}")
    assert found == []


def test_a_folder_takes_the_place_of_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def as_on_windows(source: Any, target: Any) -> None:
        if Path(target).is_dir():
            raise PermissionError(5, "Access is denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", as_on_windows)
    output = tmp_path / "output"
    output.mkdir()
    with staged(output) as partial:
        partial.mkdir()
        (partial / "file").write_text("new")
    assert (output / "file").read_text() == "new"
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match="empty"):
        put_in_place(tmp_path / "other", output)
    assert (output / "file").read_text() == "new"
    (tmp_path / "a file").write_text("")
    with pytest.raises(PermissionError):
        put_in_place(tmp_path / "a file", output)


def test_a_search_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    study = _open_study(tmp_path / "study.log")
    study.tell(study.ask(), 1.0)
    assert _open_study(tmp_path / "study.log").best_value == 1.0


def test_the_drive_of_a_path_is_no_name_at_the_hub() -> None:
    for path in ("C:/models", "C:/x.safetensors", r"C:\models\x", r"models\x.safetensors"):
        with refusal("AFA-LOAD-079", "does not exist"):
            locate(path)


def test_paths_in_an_ensemble_are_the_same_on_every_system(tmp_path: Path) -> None:
    folder = tmp_path / "ensembles" / "first"
    source = str(tmp_path / "ensembles" / "experts" / "a.safetensors")
    assert relative_source(source, folder) == "./../experts/a.safetensors"
    assert absolute_source("./../experts/a.safetensors", folder) == source


def test_no_folder_has_a_name_of_a_device() -> None:
    for name in ("con", "NUL", "Aux", "com1", "LPT9"):
        assert slug(name) == f"{name.lower()}-method"
    assert slug("console") == "console"


def test_a_file_is_read_at_a_place_without_preadv() -> None:
    stream = LayerStream()
    stream.file.write(bytes(range(100)))
    stream.file.flush()
    for offset, size in ((0, 10), (90, 20), (100, 5), (7, 1)):
        one, other = bytearray(size), bytearray(size)
        count = _read_at(stream.file, stream._reading, memoryview(one), offset)
        assert _read_from(stream.file, stream._reading, memoryview(other), offset) == count
        assert one == other


# -- processes and terminals ------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.slow
def test_all_of_it_can_be_imported_without_posix() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.machine.no_posix"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.stdout.splitlines()[-1:] == ["works"], done.stderr


@pytest.fixture
def _spawned() -> Iterator[None]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.usefixtures("_spawned")
def test_pictures_are_read_by_spawned_processes(experts: list[Path], tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(experts[:1], SMALL)
    folder = FolderImages(folder_of(tmp_path / "data", 6, broken=(4,)))
    options: Any = {"seed": 0, "max_broken": 0.5}
    sources: Any = (folder, SceneImages(4), Joined(folder, SceneImages(4)))
    for data in sources:
        here = LiveExamples(pipeline, data, Transform(16), **options)
        there = LiveExamples(pipeline, data, Transform(16), num_workers=1, **options)
        rows = [[0, 1], [2, 3]]
        for ours, theirs in zip(there.batches(rows), here.batches(rows), strict=True):
            assert torch.equal(ours.clean, theirs.clean)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_text_can_be_printed(encoding: str, tmp_path: Path) -> None:
    """On a terminal without the characters of a prompt."""
    words = "a \N{FOX FACE} \N{RIGHTWARDS ARROW} fox"
    begin = [sys.executable, "-m", "afa"]
    settings = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    output = tmp_path / words
    more = ["--steps", "1", "--output", str(output)]
    for rest in (["generate", "zoo:ensemble", words, *more], ["generate", "--help"]):
        done = subprocess.run(
            [*begin, *rest], capture_output=True, env=settings, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (rest[1] == "--help") or b"a ? ? fox" in done.stdout
    (file,) = output.iterdir()
    assert read_picture(file).recipe.prompt == words


# -- Metal, which has no float64 --------------------------------------------------------------


def test_what_metal_cannot_do() -> None:
    assert (widest_float(METAL), widest_float(CPU)) == (torch.float32, torch.float64)
    assert (place_for_float64(METAL), place_for_float64(CPU)) == (CPU, CPU)
    assert may_overlap(CPU, torch.device("cuda"))
    assert not may_overlap(CPU, METAL)
    assert not may_overlap(METAL, CPU)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"torch_dtype": torch.bfloat16}, "bfloat16"), ({"quantize": "float8"}, "float8_e4m3fn")],
)
def test_a_type_that_the_device_lacks_is_refused(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], name: str
) -> None:
    zeros = torch.zeros

    def as_metal(*shape: Any, dtype: Any = None, **options: Any) -> Any:
        if dtype in (torch.bfloat16, torch.float8_e4m3fn):
            raise TypeError("It is not supported on MPS.\nmore")
        return zeros(*shape, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", as_metal)
    monkeypatch.setattr(quantization, "find_spec", lambda _: True)
    with refusal("AFA-MACHINE-005", name, "'cpu'", "float32"):
        afa.load_pipeline(experts[:2], SMALL, **changes)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors that code of afa makes, except where it is on the CPU anyway.

    What libraries make is theirs: they know Metal.
    """

    #: draws random numbers; computes timesteps at `place_for_float64`
    ON_CPU = (
        *("training/order.py", "training/transform.py", "denoisers/forward_process.py"),
        *("denoisers/objective.py", "drafting/recognition.py", "metrics/distances.py"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen += 1
        if any(leaf.dtype == torch.float64 for leaf in leaves):
            place = self._place()
            assert place is None or place.endswith(self.ON_CPU), f"{func} in {place}"
        return result

    def _place(self) -> str | None:
        """The file of afa that called torch; None if another library did."""
        frame = sys._getframe(2)
        library = str(Path(torch.__file__).parent)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(library) and file != __file__:
                return file if file.startswith(str(SOURCE)) else None
            assert frame.f_back is not None
            frame = frame.f_back
        return None


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the CPU had none."""
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64() as mode:
        yield
    assert mode.seen > 1000


def test_float64_is_seen() -> None:
    code = compile("torch.zeros(1, dtype=torch.float64)", str(SOURCE / "watch.py"), "exec")
    with NoFloat64(), pytest.raises(AssertionError, match=r"watch\.py"):
        exec(code, {"torch": torch})


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("cache", [True, False])
def test_training_needs_no_float64(experts: list[Path], tmp_path: Path, cache: bool) -> None:
    data = {"folder": str(folder_of(tmp_path / "data", 8)), "cache": cache}
    asked = recipe(experts[:2], data)
    changes = {"validation": {"num_samples": 2, "every": 2}}
    asked = type(asked).model_validate(asked.model_dump(mode="json") | changes)
    assert len(list(steps_of(asked, tmp_path / "run"))) == 4


@pytest.mark.usefixtures("no_float64")
def test_drawing_needs_no_float64() -> None:
    pipeline = afa.load_ensemble("zoo:ensemble")
    pipeline.set_progress_bar_config(disable=True)
    afa.steer(pipeline, {"animals": 1.0})
    with afa.record_weights(pipeline.unet) as record:
        pipeline("a fox", num_inference_steps=2)
    assert record.steps
