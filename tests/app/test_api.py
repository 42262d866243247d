"""What the endpoint for programs takes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.refusal import refusal

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")

GOOD: dict[str, Any] = {
    **{"prompt": "a fox", "drawn_by": "AFA", "negative_prompt": "", "seed": 0, "steps": 3},
    **{"guidance": 3, "speed": "exact", "height": 64, "width": 64, "bias": {}},
    **{"scheduler": None, "prompt_syntax": "plain"},
}
WRONG: dict[str, list[Any]] = {
    "steps": ["3", 0, 151, 3.5, True, None],
    "seed": [-1, 2**32, "random", [1]],
    "guidance": ["7", -1, 21, float("nan"), float("inf")],
    "height": [0, 4096, "64"],
    "prompt": ["", None, 3, "a" * 20_001],
    "bias": [[], "animals", {"animals": "1"}, {"animals": {"top": 1}}, {"animals": float("nan")}],
    "colour": [1],
}


def read(**changes: Any) -> Any:
    from afa.app.api import read_request  # imports gradio, which takes seconds

    return read_request({**GOOD, **changes}, ["animals", "food", "AFA"], ["animals", "food"])


def test_what_is_right_is_read() -> None:
    assert read().model_dump() == {**GOOD, "guidance": 3.0}
    bias = {"animals": 1, "food": {"up": -0.5}}
    assert read(bias=bias).bias == bias


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
)
def test_wrong_types_and_values_are_refused_by_name(name: str, value: Any) -> None:
    with refusal("AFA-APP-012", f"'{name}", "got ") as caught:
        read(**{name: value})
    assert len(str(caught.value)) < 300


def test_names_that_there_are_not_are_refused() -> None:
    for changes in ({"drawn_by": "cats"}, {"speed": "cats"}, {"bias": {"cats": 1.0}}):
        with refusal("AFA-APP-013", "cats", "one of"):
            read(**changes)
    with refusal("AFA-APP-014", "'food'"):
        read(drawn_by="food", bias={"animals": 1.0})
