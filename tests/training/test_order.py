"""Which sample comes when, and what is drawn for it: nothing depends on how the work is shared."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import torch

from afa.training.order import Purpose, Shares, draw_at, generator_of, sample_at, successors


def places(shares: Shares, num_steps: int) -> list[list[int]]:
    """The places of each step, of one process."""
    batches = list(shares.batches(0, num_steps))
    count = shares.num_accumulated
    return [list(chain(*batches[n : n + count])) for n in range(0, len(batches), count)]


def test_every_way_of_sharing_has_the_same_places_in_every_step() -> None:
    alone = [sorted(step) for step in places(Shares(8), 5)]
    assert alone == [list(range(8 * n, 8 * n + 8)) for n in range(5)]
    for size, accumulated, processes in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)):
        ranks = [places(Shares(size, accumulated, processes, rank), 5) for rank in range(processes)]
        assert Shares(size, accumulated, processes).total == 8
        assert [sorted(chain(*step)) for step in zip(*ranks, strict=True)] == alone


def test_a_run_goes_on_with_the_places_that_are_left() -> None:
    shares = Shares(3, 2, 2, 1)
    assert list(shares.batches(4, 9)) == list(shares.batches(0, 9))[8:]


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    epochs = [[sample_at(place + 15 * n, 15, 0) for place in range(15)] for n in (0, 1)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [sample_at(place, 15, 1) for place in range(15)]


def test_batches_run_over_the_end_of_an_epoch() -> None:
    seen = [sample_at(place, 3, 1) for place in chain(*Shares(7).batches(0, 7))]
    assert set(Counter(seen[:48]).values()) == {16}


def test_what_is_drawn_depends_on_seed_purpose_and_place() -> None:
    first, again = draw_at(5, (4, 2, 2), 0), draw_at(5, (4, 2, 2), 0)
    assert torch.equal(first.noise, again.noise)
    assert first.time == again.time
    others = [
        draw_at(6, (4, 2, 2), 0),
        draw_at(5, (4, 2, 2), 1),
        draw_at(5, (4, 2, 2), 0, Purpose.VALIDATION),
    ]
    assert len({first.time, *(other.time for other in others)}) == 4
    assert not torch.equal(first.noise, first.posterior)


def test_what_is_drawn_is_spread_as_it_should_be() -> None:
    draws = [draw_at(place, (4, 4, 4), 0) for place in range(2000)]
    for name in ("variant", "caption", "time"):
        numbers = torch.tensor([getattr(draw, name) for draw in draws])
        assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1
        assert abs(float(numbers.mean()) - 0.5) < 0.02
    noise = torch.stack([draw.noise for draw in draws])
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(float(neighbours)) < 0.01


def test_generators_do_not_collide_where_places_end_with_zero() -> None:
    numbers = {
        torch.rand((), generator=generator_of(0, purpose, *place), dtype=torch.float64).item()
        for purpose in Purpose
        for place in ((1,), (2,), (1, 2), (2, 1))
    }
    assert len(numbers) == 12


def test_successors() -> None:
    assert list(successors(2, range(3, 7))) == [5, 6, 3, 4]
    assert list(successors(1, [8, 2, 5])) == [2, 5, 8]
