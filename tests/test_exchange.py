"""Experts spread over processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from afa.errors import AfaError
from tests.test_ensemble import ensemble_of


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_spread_experts_compute_the_same(count: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={count}", "-m", "tests.spread"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert f"all alike over {count}" in done.stdout, done.stderr[-3000:]


def test_there_must_be_processes() -> None:
    with pytest.raises(AfaError, match="and there are none"):
        ensemble_of().spread_experts()
