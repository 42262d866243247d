"""Experts whose layers are sharded over processes, while drawing."""

from __future__ import annotations

import pytest

from tests.warm import run_ranks


@pytest.mark.nightly
@pytest.mark.slow
def test_processes_decide_and_stop_together() -> None:
    ranks = run_ranks([], 2, module="tests.shards")
    assert "all alike" in "".join(out for _, out, _ in ranks), ranks
