"""What processes say of each other, and what they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afa.machine.processes import Processes, fixed_threads
from tests.refusal import refusal


class Waits:
    """Takes the place of accelerate's state: waiting for the others fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def wait_for_everyone(self) -> None:
        raise self.error


def waiting(error: Exception) -> Processes:
    made: Any = Processes()
    made._state = Waits(error)
    return made


def test_a_process_that_stopped_is_told_from_the_own_devices_failure() -> None:
    with refusal("AFA-MACHINE-004"):
        waiting(RuntimeError("Connection closed by peer")).wait()
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ):
        with pytest.raises(type(error)) as raised:
            waiting(error).wait()
        assert raised.value is error


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail() -> None:
        seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError), fixed_threads(before + 1):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    with fixed_threads(None):
        assert torch.get_num_threads() == before
