"""Where experts come from: folders, single files, hub ids; what is refused, before any work."""

from __future__ import annotations

import errno
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import afa
from afa.errors import AfaError
from afa.loading.expert import load_expert
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.sources import locate
from afa.loading.weights import check_safetensors, hash_expert
from afa.machine.hashes import hash_file
from benchmarks.soak.sampling import allocated
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline


def test_hash_of_a_folder_is_of_its_weights_alone(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    assert hash_expert(copy) == hash_expert(experts[0]) != hash_expert(experts[1])
    (copy / "README.md").write_text("# other")
    assert hash_expert(copy) == hash_expert(experts[0])


def test_hash_of_a_file_is_the_one_that_is_published(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".PTH", ".bin", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / f"expert{suffix}"
    torch.save({"bomb": Bomb()}, file)
    with refusal("AFA-LOAD-096"):
        afa.load_pipeline([file])
    assert not (tmp_path / "ran").exists()


def test_pickles_inside_a_folder_are_not_read(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with refusal("AFA-LOAD-101", "unet"):
        afa.load_pipeline([copy])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_refused(experts: list[Path], tmp_path: Path, keep: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with refusal("AFA-LOAD-092"):
        afa.load_pipeline([copy])


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    file = tmp_path / "huge.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with refusal("AFA-LOAD-092"):
        check_safetensors(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./none", "does not exist"),
        ("none.safetensors", "does not exist"),
        ("zoo:cars", "zoo:base, zoo:animals"),
        ("a/b/c", "does not exist"),
    ],
)
def test_nothing_there(source: str, message: str) -> None:
    with pytest.raises(AfaError, match=message):
        locate(source)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("afa.loading.sources.snapshot_download", offline)
    with refusal("AFA-LOAD-080", "'org/name'"):
        locate("org/name")


def test_a_full_disk_is_not_said_to_be_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("afa.loading.sources.snapshot_download", full)
    with refusal("AFA-LOAD-081", "hub's"):
        locate("org/name")


def test_a_hub_id_never_asks_for_pickles(
    monkeypatch: pytest.MonkeyPatch, experts: list[Path]
) -> None:
    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(experts[0])

    monkeypatch.setattr("afa.loading.sources.snapshot_download", fetch)
    pipeline = afa.load_pipeline([afa.ExpertSource("org/name", revision="v1")])
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert not any("bin" in p or "ckpt" in p for p in asked["allow_patterns"])  # type: ignore[attr-defined]
    reference = pipeline.unet.provenance.experts[0]
    assert (reference.source, reference.revision) == ("org/name", "v1")


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with refusal("AFA-LOAD-102"):
        afa.load_pipeline([tmp_path])


def test_another_family_is_refused(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    index = copy / "model_index.json"
    content = {**json.loads(index.read_text()), "_class_name": "KandinskyV22Pipeline"}
    index.write_text(json.dumps(content))
    with refusal("AFA-MODEL-006", "KandinskyV22Pipeline"):
        afa.load_pipeline([copy])


def test_single_files_of_the_original_layout(tmp_path: Path) -> None:
    """A checkpoint as it comes from the web: one file, the original layout of SD 1.x."""
    folders, files = [], []
    for seed in range(2):
        pipeline = tiny_pipeline(tmp_path / "tokenizer", seed)
        folders.append(tmp_path / f"folder{seed}")
        pipeline.save_pretrained(folders[-1])
        files.append(tmp_path / f"file{seed}.safetensors")
        save_file(original_layout(pipeline), files[-1])
    mixed = afa.load_pipeline([files[0], folders[1]])  # the folder lends its configuration
    alone = afa.load_pipeline(files, config=folders[0])
    expected = afa.load_pipeline(folders)
    for loaded in (mixed, alone):
        for n in range(2):
            ours = loaded.unet.experts[n].state_dict()
            for key, tensor in expected.unet.experts[n].state_dict().items():
                assert torch.equal(ours[key], tensor), key
        for key, tensor in expected.vae.state_dict().items():
            assert torch.equal(loaded.vae.state_dict()[key], tensor), key
        arguments = ("a fox", "cpu", 1, False)
        texts = [p.encode_prompt(*arguments)[0] for p in (loaded, expected)]
        torch.testing.assert_close(*texts)
    reference = alone.unet.provenance.experts[0]
    assert (reference.source, reference.sha256) == (str(files[0]), hash_file(files[0]))


def test_a_single_file_without_configuration_or_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.safetensors"
    save_file(original_layout(tiny_pipeline(tmp_path / "tokenizer", 0)), file)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", offline)
    with refusal("AFA-MODEL-012", "config=FOLDER"):
        afa.load_pipeline([file])


def test_a_configuration_folder_is_checked_first(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with refusal("AFA-LOAD-073"):
        afa.load_pipeline([file], config=tmp_path)


def test_autoencoder_from_a_folder_of_its_own(experts: list[Path]) -> None:
    (own, a), (inside, b) = load_vae(experts[0] / "vae"), load_vae(experts[0])
    assert (a.source, b.source) == (str(experts[0] / "vae"), str(experts[0]))
    sample = torch.from_numpy(np.zeros((1, 4, 4, 4), np.float32))
    torch.testing.assert_close(own.decode(sample).sample, inside.decode(sample).sample)


def test_a_variant_beside_the_plain_weights_changes_nothing(
    experts: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    UNet2DConditionModel.from_pretrained(copy, subfolder="unet").half().save_pretrained(
        copy / "unet", variant="fp16"
    )
    assert hash_expert(copy) == hash_expert(experts[0])
    assert afa.load_pipeline([copy]).unet.dtype == torch.float32


def test_a_folder_with_one_variant_only(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    StableDiffusionPipeline.from_pretrained(experts[0], safety_checker=None).to(
        torch.float16
    ).save_pretrained(copy, variant="fp16")
    loaded = afa.load_pipeline([copy])
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.text_encoder.dtype == torch.float32
    original = afa.load_pipeline([experts[0]]).unet.experts[0].conv_in.weight
    assert torch.equal(loaded.unet.experts[0].conv_in.weight, original.half().float())


def test_links_are_kept_as_they_are_named(tmp_path: Path) -> None:
    """As in the hub's cache, where a name with a suffix points to one without."""
    pipeline = tiny_pipeline(tmp_path / "tokenizer", 0)
    pipeline.save_pretrained(tmp_path / "folder")
    save_file(original_layout(pipeline), tmp_path / "blob")
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blob")
    loaded = afa.load_pipeline([link], config=tmp_path / "folder")
    assert loaded.unet.provenance.experts[0].source == str(link)


def test_single_files_are_found_again_with_their_configuration(tmp_path: Path) -> None:
    for seed, name in enumerate(("family", "other")):
        pipeline = tiny_pipeline(tmp_path / "tokenizer", seed)
        pipeline.save_pretrained(tmp_path / name)
    file = tmp_path / "file.safetensors"
    save_file(original_layout(pipeline), file)
    loaded = afa.load_pipeline([file, tmp_path / "other"], config=tmp_path / "family")
    folder = afa.save_ensemble(loaded, tmp_path / "ensemble")
    again = afa.load_ensemble(folder)
    assert again.unet.provenance.config == str(tmp_path / "family")
    assert (
        again.unet.provenance.vae == loaded.unet.provenance.vae == loaded.unet.provenance.experts[0]
    )
    (tmp_path / "family").rename(tmp_path / "moved")
    with refusal("AFA-LOAD-073"):
        afa.load_ensemble(folder)
    afa.load_ensemble(folder, config=tmp_path / "moved")


def test_experts_that_moved_lend_their_configuration_from_where_they_are(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", 0)
    pipeline.save_pretrained(tmp_path / "folder")
    save_file(original_layout(pipeline), tmp_path / "file.safetensors")
    loaded = afa.load_pipeline([tmp_path / "folder", tmp_path / "file.safetensors"])
    folder = afa.save_ensemble(loaded, tmp_path / "ensemble")
    moved = [tmp_path / "new" / name for name in ("folder", "file.safetensors")]
    moved[0].parent.mkdir()
    for path in moved:
        (tmp_path / path.name).rename(path)
    again = afa.load_ensemble(folder, experts=moved)
    assert [r.source for r in again.unet.provenance.experts] == [str(path) for path in moved]
    assert again.unet.provenance.vae.source == str(moved[0])


def test_the_autoencoder_of_another_expert_moves_with_it(
    experts: list[Path], tmp_path: Path
) -> None:
    copies = [tmp_path / "old" / expert.name for expert in experts[:2]]
    for expert, copy in zip(experts, copies, strict=False):
        shutil.copytree(expert, copy)
    loaded = afa.load_pipeline(copies, vae=copies[1])
    folder = afa.save_ensemble(loaded, tmp_path / "a" / "b" / "ensemble")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = [tmp_path / "new" / copy.name for copy in copies]
    again = afa.load_ensemble(folder, experts=moved)
    assert again.unet.provenance.vae.source == str(moved[1])
    with refusal("AFA-LOAD-082", "SHA-256"):
        afa.load_ensemble(folder, experts=moved, vae=experts[2])


def test_an_ensemble_behind_a_link_finds_its_experts(experts: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(experts[0], home / "expert")
    folder = afa.save_ensemble(afa.load_pipeline([home / "expert"]), home / "ensemble")
    (tmp_path / "latest").symlink_to(folder)
    again = afa.load_ensemble(tmp_path / "latest")
    assert again.unet.provenance.experts[0].source == str(home / "expert")


@pytest.mark.parametrize(
    "part", ["cond_stage_model.transformer.", "model.diffusion_model.out.", "first_stage_model."]
)
def test_incomplete_single_files_are_one_line(part: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", 0)
    pipeline.save_pretrained(tmp_path / "folder")
    tensors = original_layout(pipeline)
    lost = next(k for k in tensors if k.startswith(part) and k.endswith("bias"))
    del tensors[lost]
    save_file(tensors, tmp_path / "file.safetensors")
    with refusal("AFA-LOAD-064"):
        afa.load_pipeline([tmp_path / "file.safetensors"], config=tmp_path / "folder")


def test_an_autoencoder_in_a_file_of_its_own(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", 0)
    pipeline.save_pretrained(tmp_path / "folder")
    other = tiny_pipeline(tmp_path / "tokenizer", 1)
    prefix = "first_stage_model."
    tensors = {
        k.removeprefix(prefix): v for k, v in original_layout(other).items() if k.startswith(prefix)
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    loaded = afa.load_pipeline([tmp_path / "folder"], vae=tmp_path / "vae.safetensors")
    for key, tensor in other.vae.state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[key], tensor), key
    folder = afa.save_ensemble(loaded, tmp_path / "ensemble")
    assert afa.load_ensemble(folder).unet.provenance.vae == loaded.unet.provenance.vae
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "vae.safetensors")
    with refusal("AFA-LOAD-082", "SHA-256"):
        afa.load_ensemble(folder)


def test_an_autoencoder_of_the_hub_may_lie_at_the_top(
    monkeypatch: pytest.MonkeyPatch, experts: list[Path]
) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options)
        return str(experts[0] / "vae")

    monkeypatch.setattr("afa.loading.sources.snapshot_download", fetch)
    load_vae(afa.ExpertSource("org/vae", revision="v2"))
    assert asked["revision"] == "v2"
    files = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    assert list(filter_repo_objects(files, allow_patterns=asked["allow_patterns"])) == files[:2]


def test_of_a_hub_repository_only_what_is_needed_is_fetched(
    monkeypatch: pytest.MonkeyPatch, experts: list[Path]
) -> None:
    needed = [file.relative_to(experts[0]).as_posix() for file in experts[0].rglob("*.*")]
    needless = [
        "v1-5-pruned.safetensors",
        "v1-5-pruned-emaonly.ckpt",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "README.md",
    ]
    fetched: set[str] = set()

    def fetch(name: str, **options: Any) -> str:
        fetched.update(
            filter_repo_objects(needed + needless, allow_patterns=options["allow_patterns"])
        )
        return str(experts[0])

    monkeypatch.setattr("afa.loading.sources.snapshot_download", fetch)
    afa.load_pipeline(["org/name"])
    assert fetched == set(needed)


def test_the_commit_of_a_hub_id_is_kept(
    monkeypatch: pytest.MonkeyPatch, experts: list[Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(experts[0], snapshot)
    monkeypatch.setattr("afa.loading.sources.snapshot_download", lambda *_, **__: str(snapshot))
    reference = afa.load_pipeline(["org/name"]).unet.provenance.experts[0]
    assert (reference.source, reference.revision) == ("org/name", "0123abcd")


def _without(part: str) -> Any:
    return lambda folder: shutil.rmtree(folder / part)


def _lacking_a_weight(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "code", "value"),
    [
        (_without("tokenizer"), "AFA-MACHINE-002", "copy'"),
        (_without("scheduler"), "AFA-MACHINE-002", "copy'"),
        (_without("vae"), "AFA-LOAD-101", "copy'"),
        (_without("unet"), "AFA-LOAD-101", "unet'"),
        (lambda f: (f / "model_index.json").write_text("{"), "AFA-FILE-004", "model_index.json"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "AFA-FILE-004", "config.json"),
        (_lacking_a_weight, "AFA-LOAD-017", "1 parameters .first: conv_in.bias."),
    ],
)
def test_damaged_folders_are_one_line(
    damage: Any, code: str, value: str, experts: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(experts[0], copy)
    damage(copy)
    with refusal(code, value):
        afa.load_pipeline([copy])


def test_a_lora_is_no_expert(experts: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, file)
    with refusal("AFA-LOAD-071"):
        afa.load_pipeline([experts[0], file])


def test_nothing_is_left_of_a_tokenizer(experts: list[Path]) -> None:
    """The library beneath would lose its cache: a quarter of a megabyte for so many words."""
    letters = "abcdefghijklm"
    words = [" ".join(a + b + c for b in letters for c in letters) for a in letters]

    def use() -> int:
        tokenizer = load_expert(experts[0]).tokenizers["tokenizer"]
        assert len(tokenizer(words).input_ids) == len(words)
        del tokenizer
        gc.collect()
        return allocated()

    if not allocated():
        pytest.skip("reading the allocated memory requires mallinfo2 (glibc 2.33)")
    before = [use() for _ in range(3)][-1]
    assert [use() for _ in range(8)][-1] - before < 400_000
