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
from afa.aggregators.fusion.magic_fusion import MagicFusion
from afa.ensemble.locks import Lock
from afa.ensemble.placement.exchange import fingerprint, is_close
from tests.ensemble.caching.test_graphs import Replays
from tests.ensemble.caching.test_loop import arguments_of, at, draw, ensemble_of
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal
from tests.tiny import inputs, tiny_unet


def with_rules(rule: Any, count: int = 3) -> Any:
    experts = [tiny_unet(n) for n in range(count)]
    sites = afa.EnsembleDenoiser(experts[:1]).sites
    return afa.EnsembleDenoiser(experts, [rule() for _ in sites])


def test_a_schedule_beside_rules_that_need_all_experts() -> None:
    with refusal("AFA-ENSEMBLE-019"):
        with_rules(MagicFusion).schedule = lambda _: [0]


@pytest.mark.parametrize("picked", [[], [3], [-1], [1, 1]], ids=str)
def test_a_schedule_that_picks_what_is_not_there(picked: list[int]) -> None:
    ensemble = with_rules(Mean)
    ensemble.schedule = lambda _: picked
    with torch.no_grad(), refusal("AFA-ENSEMBLE-050", "0", "2"):
        ensemble(**at(inputs(), 500))


def test_experts_are_meant_by_number_whichever_run() -> None:
    """`Only(1)` is the second expert, also where it is the only one that runs."""
    ensemble = with_rules(lambda: Only(1))
    with torch.no_grad():
        expected = ensemble(**at(inputs(), 500)).sample
        ensemble.schedule = lambda _: [1]
        assert torch.equal(ensemble(**at(inputs(), 500)).sample, expected)
        ensemble.schedule = lambda _: [0, 2]
        with refusal("AFA-FUSION-016", r"Only\(1\)"):
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
    with refusal("AFA-ENSEMBLE-045"):
        ensemble.to("meta")
    ensemble.to(torch.bfloat16)
    assert ensemble.dtype == torch.bfloat16
    assert ensemble.execution.device == torch.device("cpu")


def test_layers_in_a_file_are_not_changed() -> None:
    ensemble = ensemble_of("unet")
    ensemble.stream_experts()
    for change in ("fuse_lora", "unfuse_lora", "unload_lora", "fuse_qkv_projections"):
        with refusal("AFA-ENSEMBLE-046", f"{change}"):
            getattr(ensemble, change)()
    with refusal("AFA-ENSEMBLE-046"):
        ensemble.load_lora_adapter({})


def test_a_module_may_be_a_schedule() -> None:
    """Modules are registered by the library before properties are asked."""

    class Router(torch.nn.Module):
        def forward(self, timestep: float) -> list[int]:
            del timestep
            return [1]

    ensemble = with_rules(lambda: Only(1))
    ensemble.schedule = Router()
    assert isinstance(ensemble.schedule, Router)
    with torch.no_grad(), afa.record_weights(ensemble) as record:
        ensemble(**at(inputs(), 500))
    assert record.mean_share()[0, 0].tolist() == [0, 1, 0]
    ensemble.schedule = None
    assert ensemble.schedule is None


def test_other_settings_begin_a_loop_anew() -> None:
    """What was kept under earlier settings is of other sites."""
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    with torch.no_grad():
        expected = ensemble(**at(arguments, 700)).sample
        for before, after in ((1, 2), (2, 1), (0, 1)):
            ensemble.acceleration = afa.Acceleration(interval=4, fresh=before)
            ensemble(**at(arguments, 900))
            ensemble.acceleration = afa.Acceleration(interval=4, fresh=after)
            assert torch.equal(ensemble(**at(arguments, 700)).sample, expected)


def test_two_threads_with_one_prompt_have_loops_of_their_own() -> None:
    """Pictures of one image, whose latents are close; calls in turns."""
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    other = {**arguments, "sample": arguments["sample"] + 0.1}
    alone = ensemble_of("unet")
    for each in (ensemble, alone):
        each.acceleration = afa.Acceleration(interval=3)
    mine = [{**arguments, "timestep": torch.tensor([t, t])} for t in (300, 280, 260)]
    theirs = [{**other, "timestep": torch.tensor([t, t])} for t in (290, 270, 250)]
    with torch.no_grad():
        expected = [alone(**call).sample for call in mine]
        came = []
        for own, foreign in zip(mine, theirs, strict=True):
            came.append(ensemble(**own).sample)
            thread = threading.Thread(target=torch.no_grad()(ensemble), kwargs=foreign)
            thread.start()
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))


def test_a_record_of_another_thread_alone_is_refused() -> None:
    ensemble = ensemble_of("unet")

    def elsewhere() -> None:
        with afa.record_weights(ensemble):
            thread = threading.Thread(target=draw, args=(ensemble, arguments_of("unet")))
            thread.start()
            thread.join()

    with refusal("AFA-ENSEMBLE-048"):
        elsewhere()
    assert not ensemble.observers


def test_a_plan_that_leaves_a_site_to_whoever_is_masked() -> None:
    ensemble = ensemble_of("unet", 3)
    ensemble.experts[1].conv_in.weight.data[0] = torch.nan
    ensemble.on_nonfinite = "mask"
    ensemble.plan = plan_of(ensemble, {"conv_in": [1]})
    with (
        torch.no_grad(),
        refusal("AFA-ENSEMBLE-034", "conv_i"),
    ):
        ensemble(**at(arguments_of("unet", 3), 500))


def test_processes_see_what_differs() -> None:
    classes = torch.tensor([207, 1000])
    assert not is_close(fingerprint(classes), fingerprint(classes + torch.tensor([1, 0])))
    assert is_close(fingerprint(classes), fingerprint(classes.clone()))
    latent = torch.randn(2, 4, 8, 8)
    assert is_close(fingerprint(latent), fingerprint(latent.bfloat16()))
    assert not is_close(fingerprint(latent), fingerprint(torch.randn(2, 4, 8, 8)))
    assert not is_close(fingerprint(latent), fingerprint(2 * latent))


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


def test_a_copy_has_no_observers() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    with afa.record_weights(ensemble) as record:
        draw(ensemble, arguments)
        count = len(record.steps)
        twin = copy.deepcopy(ensemble)
        draw(twin, arguments)
    assert (len(record.steps), len(twin.observers)) == (count, 0)
    with afa.record_weights(twin) as own:
        draw(twin, arguments)
    assert (len(record.steps), len(own.steps)) == (count, count)


def test_a_copy_begins_loops_anew() -> None:
    """A graph that was recorded of the original's steps would compute with the original."""
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.graphs = Replays()
    with torch.no_grad():
        for step in (900, 700):
            ensemble(**at(arguments, step))
        twin = copy.deepcopy(ensemble)
        twin.experts[0].conv_out.bias.data += 1
        came = twin(**at(arguments, 500)).sample
        twin.graphs = None
        twin.reset_loops()
        assert torch.equal(came, twin(**at(arguments, 500)).sample)


def test_layers_in_a_file_are_not_copied() -> None:
    ensemble = ensemble_of("unet")
    ensemble.stream_experts()
    with refusal("AFA-ENSEMBLE-041"):
        copy.deepcopy(ensemble)
    ensemble.stop_offloading()
    copy.deepcopy(ensemble)
