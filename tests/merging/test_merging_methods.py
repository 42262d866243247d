"""Static merges against numbers worked out by hand, and against the reference library."""

from __future__ import annotations

import math

import peft.utils.merge_utils as reference
import pytest
import torch
from torch import Tensor

from afa.merging import (
    AddDifference,
    BlockWeights,
    Dare,
    MergeMethod,
    Slerp,
    Ties,
    WeightedSum,
    merge_tensor,
)
from afa.merging.dare import tensor_seed
from tests.refusal import refusal

A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
B = torch.tensor([[5.0, -2.0], [1.0, 0.0]])
BASE = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
NAME = "unet.conv_in.weight"
ALL: list[MergeMethod] = [
    WeightedSum(),
    AddDifference(),
    Slerp(),
    Ties(density=1),
    Dare(density=1),
    BlockWeights({"default": [1.0]}),
]


def random_tensors(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape) for _ in range(count)]


def test_weighted_sum() -> None:
    assert WeightedSum().merge(NAME, [A, B], None).tolist() == [[3, 0], [2, 2]]
    merged = WeightedSum([0.25, 0.75]).merge(NAME, [A, B], None)
    assert merged.tolist() == [[4, -1], [1.5, 1]]


def test_add_difference() -> None:
    # A - BASE = [[0, 2], [2, 2]], B - BASE = [[4, -2], [0, -2]]
    merged = AddDifference([1.0, 0.5]).merge(NAME, [A, B], BASE)
    assert merged.tolist() == [[3, 1], [3, 3]]
    assert AddDifference().merge(NAME, [A, B], BASE).tolist() == [[3, 0], [2, 2]]


def test_slerp_is_the_textbooks_for_two() -> None:
    # (2, 0) and (0, 3) are at a right angle: 2 cos(30), 3 sin(30) at a third of the way
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    merged = Slerp([2 / 3, 1 / 3]).merge(NAME, [east, north], None)
    torch.testing.assert_close(merged, torch.tensor([[math.sqrt(3), 1.5]]))


def test_slerp_at_any_angle() -> None:
    angle, t = 2.0, 0.3
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    merged = Slerp([1 - t, t]).merge(NAME, [a, b], None)
    expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_slerp_of_three_keeps_to_the_sphere_and_to_no_order() -> None:
    axes = list(torch.eye(3))
    torch.testing.assert_close(Slerp().merge(NAME, axes, None), torch.full((3,), 3**-0.5))
    weights, tensors = [0.5, 0.3, 0.2], random_tensors(3, 4, 5)
    there = Slerp(weights).merge(NAME, tensors, None)
    back = Slerp(weights[::-1]).merge(NAME, tensors[::-1], None)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "tensors",
    [
        [A, 3 * A],  # parallel
        [A, A + 1e-7],  # nearly
        [A, torch.zeros_like(A)],
        [torch.zeros_like(A), torch.zeros_like(A)],
        [A, -A],  # opposite: every great circle is as good
        [torch.empty(0), torch.empty(0)],
    ],
)
def test_slerp_is_the_mean_where_directions_say_nothing(tensors: list[Tensor]) -> None:
    merged = Slerp([0.25, 0.75]).merge(NAME, tensors, None)
    assert torch.equal(merged, WeightedSum([0.25, 0.75]).merge(NAME, tensors, None))


def test_ties_by_hand() -> None:
    base = torch.ones(4)
    # kept by half: [4, -3, ., .], [., 1, 2, .], [-2, -1, ., .]
    tasks = [
        torch.tensor([4.0, -3.0, 1.0, 0.5]),
        torch.tensor([0.5, 1.0, 2.0, -0.1]),
        torch.tensor([-2.0, -1.0, 0.1, 0.5]),
    ]
    merged = Ties(density=0.5).merge(NAME, [base + task for task in tasks], base)
    # elected: + (4 - 2), - (-3 + 1 - 1), +, none; means of those who agree: 4, -2, 2, 0
    assert merged.tolist() == [5, -1, 3, 1]


def test_ties_majority_by_number() -> None:
    tasks = [torch.tensor([[5.0]]), torch.tensor([[-1.0]]), torch.tensor([[-2.0]])]
    base = torch.zeros(1, 1)
    assert Ties(density=1).merge(NAME, tasks, base).item() == 5
    assert Ties(density=1, majority_sign="frequency").merge(NAME, tasks, base).item() == -1.5


def test_equal_weights_are_the_papers_scale() -> None:
    tasks, base = random_tensors(3, 6, 7), torch.zeros(6, 7)
    plain = Ties(density=0.3).merge(NAME, tasks, base)
    torch.testing.assert_close(Ties([0.5] * 3, density=0.3).merge(NAME, tasks, base), plain / 2)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_the_reference_librarys(sign: str) -> None:
    base, *tensors = random_tensors(4, 31, 17)
    tasks, weights = [tensor - base for tensor in tensors], torch.tensor([0.5, 1.0, 0.7])
    expected = base + reference.ties(tasks, weights, 0.3, sign)
    method = Ties(weights.tolist(), density=0.3, majority_sign=sign)  # type: ignore[arg-type]
    assert torch.equal(method.merge(NAME, tensors, base), expected)


def test_dare_is_the_reference_librarys() -> None:
    base, *tensors = random_tensors(4, 31, 17)
    tasks, weights = [tensor - base for tensor in tensors], torch.tensor([0.5, 1.0, 0.7])
    torch.manual_seed(tensor_seed(3, NAME) % 2**63)
    generator = torch.Generator().manual_seed(tensor_seed(3, NAME))
    torch.set_rng_state(generator.get_state())
    expected = base + reference.dare_linear(tasks, weights, 0.3)
    merged = Dare(weights.tolist(), density=0.3, seed=3).merge(NAME, tensors, base)
    torch.testing.assert_close(merged, expected)


def test_dare_keeps_the_expectation() -> None:
    merges = [Dare([0.5, 0.5], density=0.5, seed=s).merge(NAME, [A, B], BASE) for s in range(4000)]
    # a kept entry counts double: a standard deviation of at most 2.9 over 4000 draws
    mean = torch.stack(merges).mean(0)
    torch.testing.assert_close(mean, AddDifference().merge(NAME, [A, B], BASE), rtol=0, atol=0.15)


def test_dare_depends_on_seed_and_name_alone() -> None:
    tensors, base = random_tensors(2, 8, 8), torch.zeros(8, 8)
    first = Dare(density=0.5).merge(NAME, tensors, base)
    state = torch.get_rng_state()
    assert torch.equal(Dare(density=0.5).merge(NAME, tensors, base), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(Dare(density=0.5).merge("unet.other", tensors, base), first)
    assert not torch.equal(Dare(density=0.5, seed=1).merge(NAME, tensors, base), first)
    # each expert loses other entries
    halves = Dare([1.0, -1.0], density=0.5).merge(NAME, [tensors[0], tensors[0]], base)
    assert halves.count_nonzero() > 0


def test_dare_that_keeps_all_is_task_arithmetic() -> None:
    base, *tensors = random_tensors(4, 5, 6)
    expected = AddDifference([1.0, 0.5, 0.2]).merge(NAME, tensors, base)
    assert torch.equal(Dare([1.0, 0.5, 0.2], density=1).merge(NAME, tensors, base), expected)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("count", [1, 3])
def test_one_expert_or_copies_of_it_give_it_back(method: MergeMethod, count: int) -> None:
    expert, base = random_tensors(2, 9, 4)
    if isinstance(method, BlockWeights):
        method = BlockWeights({"default": [1 / count] * count})
    merged = method.fit([NAME], count).merge(NAME, [expert] * count, base)
    if count == 1 and not method.needs_base:
        assert torch.equal(merged, expert)
    torch.testing.assert_close(merged, expert, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_inputs_are_not_changed(method: MergeMethod) -> None:
    expert, base = random_tensors(2, 9, 4)
    before = expert.clone(), base.clone()
    method.fit([NAME], 1).merge(NAME, [expert], base)
    assert torch.equal(expert, before[0])
    assert torch.equal(base, before[1])


def test_arithmetic_is_float32() -> None:
    # in bfloat16 256 + 1 is 256
    values = [torch.full((2,), v).bfloat16() for v in (256.0, 1.0, 1.0)]
    merged = merge_tensor(WeightedSum(), NAME, values, None)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, torch.full((2,), 86.0), rtol=1e-6, atol=0)


def test_integers_and_positions_are_the_first_experts() -> None:
    for name, tensor in (
        ("norm.num_batches_tracked", torch.tensor(7)),
        ("text_encoder.embeddings.position_ids", torch.arange(5.0)),  # some store them as floats
    ):
        assert torch.equal(merge_tensor(WeightedSum(), name, [tensor, tensor + 1], None), tensor)


@pytest.mark.parametrize(
    ("make", "code", "value"),
    [
        (lambda: WeightedSum([0.5, 0.6]), "AFA-MERGE-016", r"\[0.5, 0.6\]"),
        (lambda: WeightedSum([math.nan, 1.0]), "AFA-MERGE-015", "nan"),
        (lambda: WeightedSum([0.5, 0.5]).fit([NAME], 3), "AFA-MERGE-017", r"3 .* \[0.5, 0.5\]"),
        (lambda: Slerp([1.5, -0.5]), "AFA-MERGE-037", r"\[1.5, -0.5\]"),
        (lambda: Ties(density=0), "AFA-MERGE-018", "got 0"),
        (lambda: Dare(density=1.5), "AFA-MERGE-018", "got 1.5"),
        (
            lambda: Ties(majority_sign="loudest"),  # type: ignore[arg-type]
            "AFA-MERGE-040",
            "'total' or 'frequency'.* 'loudest'",
        ),
        (lambda: AddDifference().merge(NAME, [A], None), "AFA-MERGE-019", "AddDifference"),
        (lambda: AddDifference([math.inf]), "AFA-MERGE-015", "inf"),
    ],
)
def test_settings_that_cannot_be(make: object, code: str, value: str) -> None:
    assert callable(make)
    with refusal(code, value):
        make()
