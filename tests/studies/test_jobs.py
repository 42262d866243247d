"""Jobs of studies: in processes of their own, which end with their parent, and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afa.studies.jobs import Job, JobProgress, run_jobs, train_aggregators_job
from tests.refusal import refusal
from tests.studies.work import fail, write_name
from tests.training.runs import recipe as small_recipe

pytestmark = pytest.mark.processes


@pytest.mark.nightly
@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own(tmp_path: Path) -> None:
    listed = [Job(f"job{n}", write_name, (tmp_path,)) for n in range(3)]
    assert all(isinstance(event, JobProgress) for event in run_jobs(listed, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job0", "job1", "job2"]
    with refusal("AFA-STUDY-002", "bad: It must not be so"):
        list(run_jobs([Job("bad", fail, (tmp_path,))], 1))


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_was_killed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from afa.studies.jobs import Job, run_jobs\n"
        "from tests.studies.work import count_forever\n"
        "if __name__ == '__main__':\n"
        f"    list(run_jobs([Job('count', count_forever, (Path({str(tmp_path)!r}),))], 1))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker goes on without its parent"
        time.sleep(0.1)


def test_a_finished_job_of_another_recipe_is_not_taken(experts: list[Path], tmp_path: Path) -> None:
    """As it would be after a change of the study's own settings in the code."""
    asked = small_recipe(experts[:1], num_steps=1)
    train_aggregators_job("one", asked, tmp_path / "one")
    train_aggregators_job("one", asked, tmp_path / "one")
    changed = small_recipe(experts[:1], num_steps=1, weight_decay=0.5)
    with refusal("AFA-TRAIN-046", "training.weight_decay"):
        train_aggregators_job("one", changed, tmp_path / "one")
