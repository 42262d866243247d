"""What is refused where it is switched on; tests/pairs tries every feature with every other."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

import afa
from afa.aggregators import Mean, Only
from afa.baselines.fusion.magic_fusion import MagicFusion
from afa.errors import AfaError
from afa.locks import Lock
from tests.acceleration.test_loop import arguments_of, at, draw, ensemble_of
from tests.tiny import inputs, tiny_unet


def with_rules(rule: Any, count: int = 3) -> Any:
    experts = [tiny_unet(n) for n in range(count)]
    sites = afa.EnsembleDenoiser(experts[:1]).sites
    return afa.EnsembleDenoiser(experts, [rule() for _ in sites])


def test_a_schedule_beside_rules_that_need_all_experts() -> None:
    with pytest.raises(
        AfaError, match="A schedule cannot be combined with MagicFusion, which needs"
    ):
        with_rules(MagicFusion).schedule = lambda _: [0]


@pytest.mark.parametrize("picked", [[], [3], [-1], [1, 1]], ids=str)
def test_a_schedule_that_picks_what_is_not_there(picked: list[int]) -> None:
    ensemble = with_rules(Mean)
    ensemble.schedule = lambda _: picked
    with torch.no_grad(), pytest.raises(AfaError, match=r"by numbers from 0 to 2\. Correct the"):
        ensemble(**at(inputs(), 500))


def test_experts_are_meant_by_number_whichever_run() -> None:
    """`Only(1)` is the second expert, also where it is the only one that runs."""
    ensemble = with_rules(lambda: Only(1))
    with torch.no_grad():
        expected = ensemble(**at(inputs(), 500)).sample
        ensemble.schedule = lambda _: [1]
        assert torch.equal(ensemble(**at(inputs(), 500)).sample, expected)
        ensemble.schedule = lambda _: [0, 2]
        with pytest.raises(AfaError, match=r"Only\(1\) needs the features of that expert"):
            ensemble(**at(inputs(), 500))


def test_recorded_weights_are_of_all_experts_under_a_schedule() -> None:
    ensemble = with_rules(Mean)
    ensemble.schedule = lambda timestep: [2] if timestep > 500 else [0, 1]
    with afa.record_weights(ensemble) as record:
        draw(ensemble, inputs())
    shares = record.mean_share()
    assert shares.shape[-1] == 3
    assert shares[0, 0].tolist() == [0, 0, 1]
    assert shares[-1, 0].tolist() == [0.5, 0.5, 0]


def test_offloaded_experts_stay_where_they_are_kept() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    expected = draw(ensemble, arguments)
    ensemble.offload_experts("cpu")
    ensemble.to("cpu")  # as a pipeline moves all of its parts
    assert ensemble.execution.device == torch.device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), expected, strict=True))
    with pytest.raises(
        AfaError, match=r"offloaded and run on cpu cannot be moved to meta\. Call stop"
    ):
        ensemble.to("meta")
    ensemble.to(torch.bfloat16)
    assert ensemble.dtype == torch.bfloat16
    assert ensemble.execution.device == torch.device("cpu")


def test_layers_in_a_file_are_not_changed() -> None:
    ensemble = ensemble_of("unet")
    ensemble.stream_experts()
    for change in ("fuse_lora", "unfuse_lora", "unload_lora", "fuse_qkv_projections"):
        with pytest.raises(
            AfaError, match=f"to be changed by {change}; their layers are in a file"
        ):
            getattr(ensemble, change)()
    with pytest.raises(AfaError, match="to be changed by load_lora_adapter"):
        ensemble.load_lora_adapter({})


def test_a_record_is_of_its_own_thread_alone() -> None:
    ensemble = ensemble_of("unet")
    mine, theirs = arguments_of("unet"), arguments_of("unet")
    begun, over = threading.Event(), threading.Event()
    lengths = []

    def other() -> None:
        with afa.record_weights(ensemble) as record:
            begun.set()
            draw(ensemble, theirs)
            over.wait()
            lengths.append(len(record.steps))

    thread = threading.Thread(target=other)
    with afa.record_weights(ensemble) as record:
        thread.start()
        begun.wait()
        draw(ensemble, mine)
        draw(ensemble, mine)
    over.set()
    thread.join()
    assert (len(record.steps), lengths) == (10, [5])
    assert not ensemble.observers


def test_a_lock_is_not_shared_by_copies() -> None:
    lock = Lock()
    with lock, lock:
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            done = threading.Event()

            def enter(other: Lock = other, done: threading.Event = done) -> None:
                with other:
                    done.set()

            thread = threading.Thread(target=enter)
            thread.start()
            thread.join(5)
            assert done.is_set()
