"""Who has a permission, and until when: the process, a thread, a nested block."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from torch.utils.data import DataLoader, Dataset

from afa.cli.trust import with_trust
from afa.policy import FOLDERS_VARIABLE, Policy, grant_to_process, policy, trusting
from tests.refusal import refusal

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_overlapping_threads_leave_nothing_behind() -> None:
    first_inside, second_inside, first_left = (threading.Event() for _ in range(3))
    seen: dict[str, Policy] = {}

    def first() -> None:
        with trusting(allow_pickle=True):
            first_inside.set()
            second_inside.wait(30)
            seen["first"] = policy()
        first_left.set()

    def second() -> None:
        first_inside.wait(30)
        with trusting(offline=True):
            seen["second"] = policy()
            second_inside.set()
            first_left.wait(30)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": Policy(allow_pickle=True), "second": Policy(offline=True)}
    assert policy() == Policy()


def test_a_new_thread_starts_with_what_the_process_was_granted() -> None:
    with trusting(allow_pickle=True):
        assert in_a_thread(policy) == Policy()
        assert in_a_thread(lambda: contextvars.copy_context().run(policy)) == Policy()
        context = contextvars.copy_context()
        assert in_a_thread(lambda: context.run(policy)).allow_pickle
        with grant_to_process(offline=True):
            assert in_a_thread(policy) == Policy(offline=True)
            assert policy() == Policy(allow_pickle=True, offline=True)
    assert policy() == in_a_thread(policy) == Policy()


def test_a_thread_that_is_there_already_sees_what_the_process_is_granted() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(policy).result() == Policy()
        with grant_to_process(allow_pickle=True):
            assert pool.submit(policy).result() == Policy(allow_pickle=True)
        assert pool.submit(policy).result() == Policy()


def test_an_asyncio_task_keeps_to_itself() -> None:
    async def task() -> Policy:
        with trusting(allow_pickle=True):
            await asyncio.sleep(0)
            return await asyncio.to_thread(policy)

    async def both() -> list[Policy]:
        async def other() -> Policy:
            await asyncio.sleep(0)
            return policy()

        return list(await asyncio.gather(task(), other()))

    assert asyncio.run(both()) == [Policy(allow_pickle=True), Policy()]


class Asks(Dataset[Policy]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Policy:
        return policy()


def _tell(queue: Any) -> None:
    queue.put(policy())


@pytest.mark.parametrize("allowing", [trusting, grant_to_process])
def test_forks_and_workers_of_loaders_keep_it(allowing: Any) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    with allowing(allow_pickle=True, folders=["/data"]):
        worker = fork.Process(target=_tell, args=(queue,))
        worker.start()
        assert queue.get(timeout=60) == Policy(True, False, (Path("/data"),))
        worker.join()
        loader = DataLoader(Asks(), batch_size=None, num_workers=1, timeout=60)
        assert list(loader) == [Policy(True, False, (Path("/data"),))]


@pytest.mark.parametrize("allowing", [trusting, grant_to_process])
def test_nested_blocks_add_up(allowing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDERS_VARIABLE, os.pathsep.join(["/env", "/a"]))
    with allowing(folders=["/a"], offline=True):
        with allowing(folders=[Path("/b"), "/a"], allow_pickle=True):
            assert policy() == Policy(True, True, (Path("/a"), Path("/b"), Path("/env")))
        assert policy() == Policy(False, True, (Path("/a"), Path("/env")))
    assert policy() == Policy(folders=(Path("/env"), Path("/a")))


def test_an_exception_ends_it() -> None:
    for allowing in (trusting, grant_to_process):
        with pytest.raises(KeyError), allowing(allow_pickle=True):
            raise KeyError
        assert policy() == Policy()


def test_one_path_is_no_list_of_letters() -> None:
    with refusal("AFA-POLICY-002", "'/data'", r"folders=\['/data'\]"):
        trusting(folders="/data").__enter__()
    with refusal("AFA-POLICY-002"):
        grant_to_process(folders=Path("/data")).__enter__()  # type: ignore[arg-type]
    assert policy() == Policy()


def test_an_unknown_permission_is_an_error() -> None:
    with pytest.raises(TypeError, match="allow_everything"):
        trusting(allow_everything=True)  # type: ignore[call-arg]


def test_a_command_has_it_in_all_its_threads_and_the_next_one_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen: list[tuple[Policy, str | None]] = []

    @with_trust
    def command() -> None:
        seen.append((in_a_thread(policy), os.environ.get("HF_HUB_OFFLINE")))

    app = typer.Typer()
    app.command()(command)
    options = ["--allow-pickle", "--offline", "--allow-folder", "/a", "--allow-folder", "/b"]
    for arguments in (options, []):
        app(arguments, standalone_mode=False)
    assert seen == [(Policy(True, True, (Path("/a"), Path("/b"))), "1"), (Policy(), None)]
