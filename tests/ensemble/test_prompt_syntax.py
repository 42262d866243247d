"""The syntax of weighted prompts: what is read, and that everything else is named."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afa.ensemble.prompt_syntax import read_weighted, weights_in, words_of_prompt
from afa.errors import AfaError
from tests.refusal import refusal

Parts = list[list[tuple[str, float]]]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [[("", 1)]]),
        ("a fox: red, 12:30 | a", [[("a fox: red, 12:30 | a", 1)]]),
        ("a (fox:1.3)", [[("a ", 1), ("fox", 1.3)]]),
        ("(fox), [pizza] ((bee))", [[("fox", 1.1), (", ", 1), ("pizza", 1 / 1.1), (" ", 1)]]),
        ("(a (b:1.2) c:1.5)", [[("a ", 1.5), ("b", 1.8), (" c", 1.5)]]),
        ("(Re:Zero: .5 )(a:0)", [[("Re:Zero", 0.5), ("a", 0)]]),
        (r"\(a\) (\[b\:\]:1.2) \m/ \\", [[("(a) ", 1), ("[b:]", 1.2), (" \\m/ \\", 1)]]),
        ("a BREAK b BREAK", [[("a ", 1)], [(" b ", 1)]]),
        ("(a BREAK b:0.5) BREAKFAST", [[("a ", 0.5)], [(" b", 0.5), (" BREAKFAST", 1)]]),
        ("low-key, C\\+\\+, -_-, ^__^, a::b", [[("low-key, C++, -_-, ^__^, a::b", 1)]]),
        ("a\n(b\nc:2)", [[("a\n", 1), ("b\nc", 2)]]),
    ],
)
def test_what_is_read(prompt: str, parts: Parts) -> None:
    found = read_weighted(prompt).parts
    if "((bee))" in prompt:
        parts[0].append(("bee", 1.1 * 1.1))
    assert [[each.text for each in part] for part in found] == [[t for t, _ in p] for p in parts]
    weights = [each.weight for part in found for each in part]
    assert weights == pytest.approx([weight for part in parts for _, weight in part])


def test_the_words_are_without_weights() -> None:
    prompt = r"a (red:1.2), [blue\] \(dark\)] fox BREAK in (the snow)"
    assert words_of_prompt(prompt, "weighted") == "a red, blue] (dark) fox in the snow"
    assert words_of_prompt(prompt, "plain") == prompt


@pytest.mark.parametrize(
    ("prompt", "code", "named"),
    [
        ("a fox <lora:ink:0.7>", "AFA-DRAW-035", ("<lora:ink:0.7>",)),
        ("(<hypernet:ink:0.7>:1.2)", "AFA-DRAW-035", ("<hypernet:ink:0.7>",)),
        ("a fox AND a pizza", "AFA-DRAW-035", ("AND",)),
        ("a fox ADDCOL a pizza", "AFA-DRAW-035", ("ADDCOL",)),
        ("a __color__ fox", "AFA-DRAW-035", ("__color__",)),
        ("a {red|blue} fox", "AFA-DRAW-035", ("{",)),
        ("a fox++", "AFA-DRAW-035", ("fox++",)),
        ("a fox- in the snow", "AFA-DRAW-035", ("fox-",)),
        ("a (red fox)1.3", "AFA-DRAW-035", (")1.3",)),
        ('("a fox", "a pizza").and()', "AFA-DRAW-035", (".and(",)),
        ("a fox::2 a pizza", "AFA-DRAW-035", ("fox::2",)),
        ("a fox --ar 16:9", "AFA-DRAW-035", ("--ar",)),
        ("embedding:ink", "AFA-DRAW-035", ("embedding:ink",)),
        ("a fox\n# a comment", "AFA-DRAW-035", ("# a comment",)),
        (
            "a (fox",
            "AFA-DRAW-036",
            (
                "'('",
                "character 3",
            ),
        ),
        ("a fox :)", "AFA-DRAW-036", ("')'",)),
        ("a [fox)", "AFA-DRAW-036", ("')'",)),
        ("(a [fox)]", "AFA-DRAW-036", ("')'",)),
        (
            "a (fox:red)",
            "AFA-DRAW-037",
            (
                "(fox:red)",
                "'red'",
            ),
        ),
        ("a (fox:)", "AFA-DRAW-037", ("''",)),
        ("a (fox:-1)", "AFA-DRAW-037", ("'-1'",)),
        ("a (fox:nan)", "AFA-DRAW-037", ("'nan'",)),
        ("a (fox:13)", "AFA-DRAW-037", ("'13'",)),
        ("a (fox:1_0)", "AFA-DRAW-037", ("'1_0'",)),
        (
            "a [fox:pizza:0.5]",
            "AFA-DRAW-038",
            (
                "prompt editing",
                "[fox:pizza:0.5]",
            ),
        ),
        ("a [fox::0.5]", "AFA-DRAW-038", ("prompt editing",)),
        (
            "a [fox|pizza]",
            "AFA-DRAW-038",
            (
                "alternating words",
                "[fox|pizza]",
            ),
        ),
        ("a () fox", "AFA-DRAW-039", ("()",)),
        ("a ( :1.2) fox", "AFA-DRAW-039", ("( :1.2)",)),
        ("[BREAK]", "AFA-DRAW-039", ("[BREAK]",)),
    ],
)
def test_what_is_not_understood_is_named(prompt: str, code: str, named: tuple[str, ...]) -> None:
    with refusal(code, *map(re.escape, named)):
        read_weighted(prompt)


def test_every_other_syntax_can_be_written_as_text() -> None:
    text = r"\{a\|b\} C\+\+ \-\-ar \(cat\)1.3 \_\_x\_\_ a\:\:2 \<lora:a> \# a"
    assert read_weighted(text).words == "{a|b} C++ --ar (cat)1.3 __x__ a::2 <lora:a> # a"


@pytest.mark.parametrize(
    ("prompt", "example"),
    [
        ("a (red:1.3) fox", "(red:1.3)"),
        ("a ((red)) fox", "((red))"),
        ("a fox BREAK a pizza", "BREAK"),
        ("a fox <lora:ink:1>", "<lora:ink:1>"),
        ("a fox (the red one), at (12:30), [sic]", None),
        (r"a \(red:1.3\) fox", None),
    ],
)
def test_weights_in_plain_text_are_found(prompt: str, example: str | None) -> None:
    assert weights_in(prompt) == example


@pytest.mark.parametrize(
    "text", [each * (20_000 // len(each)) for each in ("(", "_", "(:", "a", "+", ":: ", "[[a")]
)
def test_long_prompts_of_strangers_take_no_time(text: str) -> None:
    """Patterns that backtrack would not return within the test's lifetime."""
    weights_in(text)
    with suppress(AfaError):
        read_weighted(text)


@given(st.text(alphabet='ab :.|()[]\\\\<>{}_-+"1B\n', max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = read_weighted(text)
    except AfaError as error:
        named = error.code
        assert named.startswith("AFA-DRAW-03")
        return
    assert all(part for part in read.parts)
    assert all(0 <= each.weight < 1e6 for part in read.parts for each in part)
    if not set(text) & set("()[]\\"):
        assert read.words == text.strip()
