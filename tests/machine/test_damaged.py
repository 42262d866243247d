"""What is wrong when a library raises: the file, the machine's memory, or afa itself."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from diffusers.models import model_loading_utils
from safetensors.torch import save_file

import afa
from afa.denoisers.unet import UNET
from afa.errors import AfaError
from afa.loading import components, facts, inspection
from afa.loading import expert as experts
from afa.loading.expert import load_expert
from afa.loading.facts import read_facts
from afa.loading.inspection import describe
from afa.loading.planned import Group, Plan
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.single_file.load import Companions, Described
from afa.machine.damaged import Unreadable, is_own_bug, loading
from afa.preflight.run import look
from afa.training.cache.files import Shards, read_header, write_shard
from afa.training.checkpoints import Checkpoints
from tests.refusal import refusal
from tests.tiny import SD1, tiny_unet

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = Path(diffusers.__file__).parent / "made_up.py"
OWN = Path(afa.__file__).parent / "made_up.py"
BUGS = (AttributeError, TypeError, RuntimeError, KeyError, IndexError, ValueError, AssertionError)


def raising_at(file: Path, error: BaseException) -> Callable[..., Any]:
    """A function in a file that raises this, whatever it is called with."""
    space: dict[str, Any] = {"error": error}
    exec(compile("def fail(*_, **__):\n    raise error", str(file), "exec"), space)
    return space["fail"]


@pytest.mark.parametrize("kind", BUGS)
def test_a_bug_of_ours_is_a_traceback_and_a_librarys_word_a_line(kind: type[Exception]) -> None:
    with pytest.raises(kind) as bug, loading("'x' must be whole", "Get it."):
        raising_at(OWN, kind("mine"))()
    assert not isinstance(bug.value, AfaError)
    with pytest.raises(AfaError) as said, loading("'x' must be whole", "Get it."):
        raising_at(LIBRARY, kind("theirs"))()
    assert said.value.code == "AFA-MACHINE-002"
    assert f"{kind.__name__}: " in str(said.value)
    assert "theirs" in str(said.value)


def test_what_is_called_back_by_a_library_is_ours() -> None:
    def called_back(_: Any) -> None:
        raising_at(OWN, TypeError("mine"))()

    with pytest.raises(TypeError, match="mine"), loading("'x' must be whole", "Get it."):
        torch.utils._pytree.tree_map(called_back, [1])


@pytest.mark.parametrize(
    "error", [OSError("gone"), EOFError("short"), Unreadable("it has no step")], ids=repr
)
def test_some_errors_are_about_files_whoever_raises_them(error: Exception) -> None:
    said = "^'x' must be whole", r"Get it\.$"
    with refusal("AFA-MACHINE-002", *said), loading("'x' must be whole", "Get it."):
        raising_at(OWN, error)()
    assert not is_own_bug(error)


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("unable to mmap 123 bytes from file <x>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def wrapped(error: BaseException) -> Callable[..., Any]:
    """Raise an error as diffusers does: any failure to read a file becomes one OSError."""

    def fail(*_: Any, **__: Any) -> None:
        try:
            raise error
        except Exception:  # diffusers catches every exception there, too
            raising_at(LIBRARY, OSError("Unable to load weights from checkpoint file"))()

    return fail


@pytest.mark.parametrize("where", ["library", "afa", "wrapped"])
@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_memory_that_ran_out_is_no_damage(error: Exception, where: str) -> None:
    fail = {
        "library": raising_at(LIBRARY, error),
        "afa": raising_at(OWN, error),
        "wrapped": wrapped(error),
    }[where]
    with pytest.raises(AfaError) as said, loading("'org/model' must be complete", "Download."):
        fail()
    text = str(said.value)
    assert said.value.code == "AFA-MACHINE-001"
    assert text.startswith("'org/model' ")
    assert "--memory-budget" in text
    assert "Download" not in text
    assert ("2.00 GiB" in text) == ("2.00 GiB" in str(error))


# -- the places where models are read -----------------------------------------------------------


def every_way(expert: Path) -> list[Any]:
    """Calls that read a model, each with one function of a library or of afa that fails."""
    return [
        (experts, "latents_of", lambda: load_expert(expert)),
        (components, "require_complete", lambda: load_expert(expert)),
        (components, "require_complete", lambda: afa.load_pipeline([expert])),
        (components, "require_complete", lambda: load_vae(expert)),
        (facts, "with_defaults", lambda: read_facts("x", Described(expert))),
    ]


@pytest.mark.parametrize("number", range(5))
def test_bugs_of_ours_while_a_model_is_read(
    number: int, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (AttributeError, TypeError, RuntimeError):
        error = kind("a bug")
        module, name, call = every_way(experts[0])[number]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, raising_at(OWN, error))
            with pytest.raises(kind, match="a bug") as raised:
                call()
        assert not isinstance(raised.value, AfaError)


def test_memory_runs_out_while_a_folder_is_read(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(
        model_loading_utils.safetensors.torch, "load_file", raising_at(LIBRARY, short)
    )
    with pytest.raises(AfaError) as raised:
        afa.load_pipeline(experts[:1])
    assert raised.value.code == "AFA-MACHINE-001"
    assert "2.00 GiB" in str(raised.value)
    assert "Download" not in str(raised.value)


def test_a_damaged_folder_is_still_said_to_be_that(experts: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(experts[0], tmp_path / "folder"))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "x"}')
    with refusal("AFA-MACHINE-002"):
        load_expert(folder)


# -- configurations that describe no model ------------------------------------------------------


def unet_folder(tmp_path: Path, **changes: Any) -> Path:
    config = {"_class_name": "UNet2DConditionModel", **SD1, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", ["discover_sites", "build_sabw"])
def test_inspect_does_not_blame_the_configuration_for_our_bugs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, name, raising_at(OWN, AttributeError("a bug")))
    with pytest.raises(AttributeError, match="a bug"):
        describe(unet_folder(tmp_path))
    monkeypatch.setattr(inspection, name, raising_at(LIBRARY, AttributeError("theirs")))
    assert "does not describe a UNet2D" in describe(tmp_path)["refused"]


def test_inspect_blames_a_configuration_that_the_library_cannot_run(tmp_path: Path) -> None:
    said = describe(unet_folder(tmp_path, norm_num_groups=3))["refused"]
    assert "does not describe a UNet2D" in said
    model = tiny_unet().to("meta")
    assert inspection.runs_by_itself(UNET, model)
    assert not inspection.runs_by_itself(replace(UNET, example=lambda _: {"sample": 1}), model)


@pytest.mark.parametrize("kind", [AttributeError, RuntimeError])
def test_check_does_not_blame_the_configuration_for_our_bugs(
    kind: type[Exception], experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group("x", experts[:1], Companions(torch.float32))
    for file, is_ours in ((OWN, True), (LIBRARY, False)):
        fail = raising_at(file, kind("a bug"))
        monkeypatch.setattr(UNET.model_class, "from_config", fail)
        if is_ours:
            with pytest.raises(kind, match="a bug"):
                look(Plan([group]), with_weights=False)
        else:
            (finding,) = look(Plan([group]), with_weights=False).errors
            assert (finding.code, "a bug" in finding.text) == ("AFA-CHECK-003", True)


# -- files of afa itself ------------------------------------------------------------------------


def test_a_shard_of_something_else(tmp_path: Path) -> None:
    place = tmp_path / "000000.safetensors"
    save_file({"a": torch.zeros(2, 3)}, place)
    with refusal("AFA-MACHINE-002"):
        read_header(place)
    save_file({"a": torch.zeros(2, 3)}, place, metadata={"afa": "{"})
    with refusal("AFA-MACHINE-002", "'afa'"):
        read_header(place)
    write_shard(place, {"a": torch.zeros(2, 3)}, [1])
    assert read_header(place) == [1]
    assert Shards().row(place, 1)["a"].shape == (3,)
    with refusal("AFA-MACHINE-002", "'a'", r"\(2, 3\)", "2"):
        Shards().row(place, 2)


@pytest.mark.parametrize("notes", [None, "[]", "{}", '{"step": "x"}'])
def test_a_checkpoint_without_its_step(notes: str | None, tmp_path: Path) -> None:
    metadata = None if notes is None else {"afa": notes}
    save_file({"a": torch.zeros(1)}, tmp_path / "step-00000001.safetensors", metadata=metadata)
    with refusal("AFA-MACHINE-002"):
        Checkpoints(tmp_path, 1).read()
