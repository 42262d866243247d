"""The pages are true: every block runs, every message in Trouble is one, the site builds."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from afa.loading.single_file import load as single_file
from afa.loading.single_file.layout import kind_name
from tests.documentation import (
    DOCS,
    ROOT,
    Block,
    Runner,
    blocks_of,
    commands_of,
    make_ensemble,
    make_world,
    shortened,
)

pytestmark = pytest.mark.slow

ALL = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [page for page in ALL if blocks_of(page)]
#: where an ensemble is trained that the others find
TRAIN = ("checkpoints.md", "README.md")
#: pages whose blocks take longest: `make nightly` runs them
LONG = (
    *("app.md", "checkpoints.md", "compare.md", "distillation.md", "training.md"),
    "README.md",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("world")
    return root, make_world(root)


@pytest.fixture
def folder(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, in which the shipped configurations are those of tiny models."""
    root, configs = world
    folder = tmp_path / "here"
    shutil.copytree(root, folder)
    monkeypatch.chdir(folder)
    told = single_file.config_of

    def config_of(shapes: Any, *args: Any, **options: Any) -> Any:
        name = kind_name(shapes)
        return name if name in configs else told(shapes, *args, **options)

    monkeypatch.setattr(single_file, "config_of", config_of)
    monkeypatch.setattr(single_file, "config_folder", configs.__getitem__)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.nightly if page.name in LONG else ()) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_every_block_runs(page: Path, folder: Path, world: Any) -> None:
    if page.name not in TRAIN:
        make_ensemble(folder, world[1]["Stable Diffusion"])
    runner = Runner(folder)
    for block in blocks_of(page):
        try:
            runner.run(block)
        except Exception as error:
            pytest.fail(f"{page.name}, line {block.line}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_fenced_and_have_a_language(page: Path) -> None:
    text = page.read_text()
    assert all(block.language for block in blocks_of(page))
    assert not re.search(r"\n\n {4}(?:afa|make|import|experts:)", text), "an indented block"


def test_what_is_cut_short() -> None:
    recipe = {"training": {"num_steps": 9, "batch_size": 8}, "curve": {"num_steps": [5, 50]}}
    assert shortened(recipe) == {
        "training": {"num_steps": 2, "batch_size": 2},
        "curve": {"num_steps": [1, 2]},
    }
    assert list(commands_of("afa x \\\n  --y 'a b'  # why\n\nafa z\n")) == [
        ["afa", "x", "--y", "a b"],
        ["afa", "z"],
    ]


def test_a_block_that_fails_is_seen(folder: Path) -> None:
    runner = Runner(folder)
    with pytest.raises(AssertionError, match="ended with 2"):
        runner.run(Block("bash", None, "afa inspect nothing\n", 1))
    with pytest.raises(AssertionError):
        runner.run(Block("bash", None, "make nothing\n", 1))
    with pytest.raises(ZeroDivisionError):
        runner.run(Block("python", None, "1 / 0\n", 1))


# -- messages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages() -> list[str]:
    spec = importlib.util.spec_from_file_location("messages", DOCS / "hooks" / "messages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PLACE in (DOCS / "messages.md").read_text()
    return [text for by_code in module.messages().values() for text in by_code.values()]


def test_all_messages_are_found(messages: list[str]) -> None:
    """As many as the source raises with words of their own."""
    raised = sum(
        len(re.findall(r'\bAfaError\(\s*"AFA-', file.read_text()))
        for folder in ("src/afa", "integrations")
        for file in (ROOT / folder).rglob("*.py")
    )
    assert raised * 0.9 < len(messages) <= raised * 1.1
    assert "A speed must be one of <PRESETS>; got '<given>'." in messages


def test_troubleshooting_is_keyed_by_codes() -> None:
    """Sections about something that is no error of ours say so in their first words."""
    text = (DOCS / "trouble.md").read_text()
    sections = re.findall(r"^### (.+)\n\n(.+)$", text, flags=re.MULTILINE)
    assert len(sections) > 30
    for heading, first in sections:
        if not first.startswith(("torch's own", "No message", "A note", "`afa generate --from")):
            assert re.match(r"Codes: \[AFA-[A-Z]+-\d{3}\]\(messages\.md#", first), heading


# -- the site ---------------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    site = "\n".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert "A speed must be one of" in (tmp_path / "messages.html").read_text()
    assert "fonts.googleapis" not in site
    assert "unpkg.com" not in site
    for page in ("ensembles", "pictures", "denoisers", "training", "comparing", "speed"):
        assert len((tmp_path / "api" / f"{page}.html").read_text()) > 20_000, page
