"""Properties that hold for whatever hypothesis comes up with: recipes, sites, merges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afa.aggregators import SABWConfig
from afa.aggregators.build import fused_sites, site_configs
from afa.denoisers import Site
from afa.ensemble.steering import parse_bias, stages_of
from afa.errors import AfaError
from afa.evaluation.recipe import load_evaluate_recipe
from afa.loading.memory.budget import parse_size, size_text
from afa.loading.sources import absolute_source, relative_source
from afa.merging.method import MergeMethod
from afa.merging.recipe import MergeRecipe
from afa.policy import trusting
from afa.recipe import read_yaml
from afa.training.recipe import load_recipe

settings.register_profile(
    "afa",
    deadline=None,  # machines differ; what is slow is for benchmarks
    max_examples=60,
    derandomize=True,  # the same examples in every run: a red test stays red
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("afa")

#: PyYAML writes a line break of Unicode (NEL) as it is, which is read as a space
TEXTS = st.text(st.characters(exclude_characters="\x85"), max_size=40)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.dates(),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
TRAIN: dict[str, Any] = {
    "experts": ["./a", {"base": "./b", "lora": "./l.safetensors"}],
    "data": {"scenes": {"num_samples": 3}},
    "aggregator": {"hidden_size": 64},
    "training": {"num_steps": 2, "batch_size": 3},
    "validation": {"num_samples": 2},
    "previews": {"prompts": ["a"]},
}
EVALUATE: dict[str, Any] = {
    "experts": ["./a", "./b"],
    "prompts": {"zoo": {"kinds": {"mixed": 2}}},
    "methods": [{"name": "m", "merge": {"method": "weighted"}}],
    "sampling": {"num_steps": 2},
    "metrics": ["scenes"],
}


def write(folder: Path, content: Any) -> Path:
    place = folder / "recipe.yaml"
    place.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return place


def refused_in_one_line(error: AfaError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 20_000


# -- recipes ----------------------------------------------------------------------------------


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a recipe, by the keys and numbers that lead there."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in pairs:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a recipe with another value at a place."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = with_value(content[path[0]], path[1:], value)
    return copy


@given(data=st.data(), value=JSON)
@pytest.mark.parametrize(
    ("recipe", "load"), [(TRAIN, load_recipe), (EVALUATE, load_evaluate_recipe)]
)
def test_a_recipe_with_anything_anywhere(
    recipe: dict[str, Any], load: Any, data: Any, value: Any, tmp_path: Path
) -> None:
    """It is read, or refused in one line that names the file."""
    changed = with_value(recipe, data.draw(st.sampled_from(places(recipe))), value)
    place = write(tmp_path, changed)
    with trusting(folders=(Path("/"),)):
        try:
            load(place)
        except AfaError as error:
            refused_in_one_line(error)


@given(key=st.text(min_size=1, max_size=30), value=JSON)
def test_an_unknown_key_is_named(key: str, value: Any, tmp_path: Path) -> None:
    assume(key not in TRAIN and key not in ("vae", "config", "parts", "allow_duplicates"))
    place = write(tmp_path, {**TRAIN, key: value})
    with pytest.raises(AfaError) as error:
        load_recipe(place)
    refused_in_one_line(error.value)


@given(content=JSON)
def test_what_is_written_is_read(content: Any, tmp_path: Path) -> None:
    place = write(tmp_path, content)
    try:
        found = read_yaml(place)
    except AfaError as error:
        refused_in_one_line(error)
        return
    assert yaml.safe_dump(found, allow_unicode=True) == yaml.safe_dump(content, allow_unicode=True)


@given(text=st.binary(max_size=200))
def test_bytes_are_read_or_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    try:
        read_yaml(tmp_path / "recipe.yaml")
    except AfaError as error:
        refused_in_one_line(error)


@given(source=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_a_relative_source_never_leads_out_and_comes_back(source: str, tmp_path: Path) -> None:
    """What an ensemble's folder keeps of a source is found again as what it was."""
    folder = tmp_path / "runs" / "ensemble"
    inside = str(tmp_path / "runs" / "models" / source.replace("/", "_").strip(". ")) + "x"
    kept = relative_source(inside, folder)
    assert kept.startswith(".")
    assert absolute_source(kept, folder) == inside
    if not source.startswith("."):
        assert absolute_source(source, folder) == source


# -- sites ------------------------------------------------------------------------------------

SITES = st.lists(
    st.builds(
        Site,
        name=st.sampled_from(
            [f"{part}.{b}.{n}" for part in ("down", "up") for b in (0, 1) for n in (0, 1)]
        ),
        channels=st.sampled_from([4, 8, 64, 320]),
        scale=st.sampled_from([1, 2, 4, 8]),
        temb_channels=st.just(16),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda site: site.name,
).map(
    lambda middle: [
        Site("conv_in", 64, 1, 16),
        *middle,
        Site("mid", 64, 8, 16),
        Site("conv_out", 4, 1, 16),
    ]
)


@given(sites=SITES, stride=st.integers(1, 12), only_last=st.booleans())
def test_the_first_and_the_last_site_are_fused(
    sites: list[Site], stride: int, only_last: bool
) -> None:
    config = SABWConfig(stride=stride, sites="conv_out" if only_last else "all")
    fused = fused_sites(config, sites)
    assert fused[-1] == sites[-1]
    assert only_last or fused[0] == sites[0]
    assert fused == [site for site in sites if site in fused]  # in their order
    if stride == 1 and not only_last:
        assert fused == sites


@given(
    sites=SITES,
    ratio=st.one_of(st.none(), st.floats(0.01, 8)),
    hidden=st.sampled_from([64, 128, 256]),
    scale=st.integers(1, 8),
)
def test_every_site_gets_an_aggregator_that_can_be(
    sites: list[Site], ratio: float | None, hidden: int, scale: int
) -> None:
    config = SABWConfig(
        hidden_size=hidden, hidden_ratio=ratio, min_scale=scale, num_experts=3, text_channels=16
    )
    for site, found in zip(sites, site_configs(config, sites), strict=True):
        assert found is not None
        assert 0 < found.channels <= hidden
        assert found.channels % found.heads == 0
        assert found.channels % found.groups == 0
        assert found.channels > found.groups  # or the norm would cancel the timestep
        assert found.in_channels == site.channels


@given(sites=SITES)
def test_every_site_has_a_stage(sites: list[Site]) -> None:
    stages = stages_of(sites)
    assert len(stages) == len(sites)
    assert set(stages) <= {"down", "mid", "up"}


@given(
    fields=st.dictionaries(
        st.sampled_from(["hidden_size", "num_layers", "num_heads", "norm_num_groups", "stride"]),
        st.integers(-3, 300),
    )
)
def test_a_shape_is_taken_or_its_remedy_is(fields: Any) -> None:
    """Where a number of groups is proposed, it is one that is taken."""
    try:
        SABWConfig(**fields)
    except AfaError as error:
        refused_in_one_line(error)
        if "Choose norm_num_groups = " in str(error):
            groups = int(str(error).split("Choose norm_num_groups = ")[1].split(" ")[0])
            again = {**fields, "norm_num_groups": groups}
            if fields.get("hidden_size", 128) > 1:
                SABWConfig(**again)


@given(words=st.lists(st.text(max_size=20), max_size=4))
def test_a_bias_is_finite_or_refused(words: list[str]) -> None:
    try:
        found = parse_bias(words)
    except AfaError:
        return
    assert all(math.isfinite(value) for parts in found.values() for value in parts.values())


@given(size=st.integers(10**6, 10**15))
def test_a_size_as_it_is_said_is_read_again(size: int) -> None:
    assert parse_size(size_text(size)) == pytest.approx(size, rel=0.06)


# -- merges -----------------------------------------------------------------------------------

VALUES = st.floats(-100, 100, width=32)


def tensors(count: int, size: int) -> Any:
    return st.lists(
        st.lists(VALUES, min_size=size, max_size=size).map(torch.tensor),
        min_size=count,
        max_size=count,
    )


def method(**recipe: Any) -> MergeMethod:
    return MergeRecipe(experts=["a", "b", "c"][: recipe.pop("count", 3)], **recipe).build()


@given(values=tensors(3, 6))
def test_a_uniform_merge_lies_between(values: list[Tensor]) -> None:
    merged = method(method="weighted").merge("x", values, None)
    stacked = torch.stack(values)
    assert (merged >= stacked.amin(0) - 1e-3).all()
    assert (merged <= stacked.amax(0) + 1e-3).all()


@given(value=tensors(1, 6), name=st.sampled_from(["weighted", "slerp"]))
def test_a_model_merged_with_itself_is_itself(value: list[Tensor], name: str) -> None:
    count = 2
    merged = method(method=name, count=count).merge("x", value * count, None)
    torch.testing.assert_close(merged, value[0], rtol=1e-4, atol=1e-4)


@given(values=tensors(3, 6))
def test_order_does_not_matter_where_weights_are_alike(values: list[Tensor]) -> None:
    one = method(method="weighted").merge("x", values, None)
    other = method(method="weighted").merge("x", values[::-1], None)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(
    values=tensors(3, 6),
    base=tensors(1, 6),
    name=st.sampled_from(["add_difference", "ties", "dare"]),
    density=st.floats(0.05, 1),
)
def test_merges_onto_a_base(
    values: list[Tensor], base: list[Tensor], name: str, density: float
) -> None:
    """Finite; and where no expert differs from the base, the base."""
    options: dict[str, Any] = {"method": name, "base": "b"}
    if name != "add_difference":
        options["density"] = density
    built = method(**options)
    assert built.merge("x", values, base[0]).isfinite().all()
    torch.testing.assert_close(built.merge("x", base * 3, base[0]), base[0], rtol=1e-4, atol=1e-4)


@given(weights=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3))
def test_weights_of_a_merge_are_finite_or_refused(weights: list[float]) -> None:
    try:
        built = method(method="weighted", weights=weights)
    except ValueError:  # of pydantic, which a recipe's reader turns into a line
        assert not all(map(math.isfinite, weights)) or abs(sum(weights) - 1) > 1e-6
        return
    assert built.merge("x", [torch.ones(2)] * 3, None).isfinite().all()
