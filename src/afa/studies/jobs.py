"""Run trainings in parallel: one process per core, with one thread each."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import read_json, write_atomic

if TYPE_CHECKING:
    from afa.training.recipe import Recipe

_DONE, _LOG = "finished.json", "log.jsonl"
_events: Any = None  # the queue of a worker to its parent
_stop: Any = None  # set when a job has failed, so that the others stop after their step
_parent = 0  # the process that started this worker


@dataclass(frozen=True)
class Job:
    """A named function of picklable arguments that runs in a worker process."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class JobProgress:
    """Progress of one job."""

    name: str
    done: int
    total: int


def run_jobs(jobs: Sequence[Job], num_processes: int) -> Iterator[JobProgress]:
    """Run jobs in the given order in several processes, and yield their progress.

    Raises:
        AfaError: the error of the first job that fails; the others stop after their step, and
            their checkpoints are kept.
    """
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    pool = worker_pool(num_processes, events, stop)
    try:
        pending = {pool.submit(_run, job) for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            yield from _drain(events)
            for future in finished:
                future.result()
        yield from _drain(events)
    except BrokenProcessPool as error:
        raise AfaError(
            "AFA-STUDY-001",
            "A training process was killed, possibly because memory ran out. Run the same command "
            "again to resume.",
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def worker_pool(num_processes: int, events: Any = None, stop: Any = None) -> ProcessPoolExecutor:
    """Processes with one thread each, which compute with torch; see `run_jobs` for the others."""
    return ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(events, stop),
    )


def _drain(events: Any) -> Iterator[JobProgress]:
    while True:
        try:
            yield events.get_nowait()
        except queue.Empty:
            return


def _start_worker(events: Any, stop: Any) -> None:
    import torch

    from afa.machine.quiet import quieten, quieten_loading

    global _events, _stop, _parent
    _events, _stop, _parent = events, stop, os.getppid()
    quieten()
    quieten_loading()
    torch.set_num_threads(1)


def _run(job: Job) -> None:
    try:
        job.function(job.name, *job.arguments)
    except AfaError as error:
        raise AfaError("AFA-STUDY-002", f"{job.name}: {error}") from None


def report_progress(name: str, done: int, total: int) -> None:
    """Send a job's progress to the parent; stops the job if another one has failed."""
    if _events is not None:
        if os.getppid() != _parent:
            os._exit(1)  # the parent was killed; do not interfere with the next run
        if _stop.is_set():
            raise KeyboardInterrupt
        _events.put(JobProgress(name, done, total))


# -- the jobs ---------------------------------------------------------------------------------


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished training, such as its median `seconds_per_step`; else None."""
    path = folder / _DONE
    return read_json(path) if path.exists() else None


def train_aggregators_job(name: str, recipe: Recipe, folder: Path) -> None:
    """Train one ensemble, or resume its training."""
    from afa.training import train
    from afa.training.run import require_same_recipe

    if finished(folder) is None:
        finish(name, train(recipe, folder), folder)
    else:
        require_same_recipe(recipe, folder)


def search_job(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """Search block weights, or resume the search."""
    from afa.evaluation.search import require_same_search, search_block_weights
    from afa.evaluation.search_recipe import SearchRecipe

    checked = SearchRecipe.model_validate(recipe)
    if finished(folder) is None:
        for trial in search_block_weights(checked, folder):
            report_progress(name, trial.number, trial.num_trials)
            log(folder, {"trial": trial.number, "seconds": trial.seconds})
        record_finished(folder, {"seconds": sum(logged(folder))})
    else:
        require_same_search(checked, folder)


def finish(name: str, events: Iterator[Any], folder: Path) -> None:
    """Run a training, and record its median time per step."""
    from afa.training import TrainStep

    for step in events:
        if not isinstance(step, TrainStep):  # progress of the cache
            continue
        report_progress(name, step.step, step.num_steps)
        log(folder, {"step": step.step, "loss": step.loss, "seconds": step.seconds})
    record_finished(folder, {"seconds_per_step": statistics.median(logged(folder))})


def log(folder: Path, line: dict[str, float]) -> None:
    """Append a line, with its `seconds`, to the log of a job."""
    with (folder / _LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def logged(folder: Path) -> list[float]:
    """The seconds of all lines of the log of a job."""
    return [
        json.loads(line)["seconds"]
        for line in (folder / _LOG).read_text(encoding="utf-8").splitlines()
    ]


def record_finished(folder: Path, content: dict[str, Any]) -> None:
    """Mark a job as finished, with its measured costs; see `finished`."""
    from afa.provenance import commit

    content = {**content, "commit": commit()}
    write_atomic(folder / _DONE, json.dumps(content) + "\n")
