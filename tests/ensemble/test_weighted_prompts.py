"""Weighted prompts: compel's own result, for every expert's encoder, in any pipeline."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from compel.embeddings_provider import EmbeddingsProvider
from torch import Tensor

import afa
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.splitting import split_joined
from afa.ensemble.weighted_prompts import of_equal_length, prompt_call
from afa.loading.pipeline import load_single
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts

#: prompts in our syntax and in that of compel; the tokenizer reads 24 tokens
WEIGHTED = [
    ("a fox", "a fox"),
    ("a (red:1.3) fox, (pizza:0.6)", "a (red)1.3 fox, (pizza)0.6"),
    ("a ((red) fox:1.2) on [the left]", "a (red)1.32 (fox)1.2 on (the left)0.9090909090909091"),
    ("a fox, a (bee:1.5). " * 8, "a fox, a (bee)1.5. " * 8),
    ("a fox BREAK (a pizza:0.5)", '("a fox", "(a pizza)0.5").and()'),
]
WORDS = [
    "a fox",
    "a red fox, pizza",
    "a red fox on the left",
    "a fox, a bee. " * 8,
    "a fox a pizza",
]
NEGATIVE, ITS = "(blurry:1.2)", "(blurry)1.2"
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_experts("xl", tmp_path_factory.mktemp("xl"))


@pytest.fixture(params=["sd", "xl"])
def folders(request: pytest.FixtureRequest, experts: list[Path], xl: list[Path]) -> list[Path]:
    return experts if request.param == "sd" else xl


def alone(folder: Path) -> Any:
    return load_single(str(folder))[0]


@cache
def stock(folder: Path) -> Any:
    """As `alone`, for tests that do not change it."""
    return alone(folder)


@cache
def fused(*folders: Path) -> Any:
    """Their ensemble, for tests that do not change it."""
    pipeline = afa.load_pipeline(list(folders), afa.SABWConfig(norm_num_groups=4, min_scale=1))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, prompt: str, negative: str | None) -> dict[str, Tensor]:
    """The library's own result, without the pooled embedding, which has its syntax as words."""
    if hasattr(pipeline, "text_encoder_2"):
        found = CompelForSDXL(pipeline)(prompt, negative_prompt=negative)
    else:
        found = CompelForSD(pipeline)(prompt, negative_prompt=negative)
    return {"prompt_embeds": found.embeds, "negative_prompt_embeds": found.negative_embeds}


def latents(pipeline: Any, **call: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(generator=torch.Generator().manual_seed(1), **CALL, **call).images


@pytest.mark.parametrize(("ours", "compels"), WEIGHTED)
def test_each_expert_gets_the_librarys_embedding_of_its_own_encoder(
    folders: list[Path], ours: str, compels: str
) -> None:
    joined = fused(*folders)
    found = afa.encode_prompt(joined, ours, NEGATIVE)
    widths = denoiser_of(joined).widths
    for number, folder in enumerate(folders):
        own = stock(folder)
        single = afa.encode_prompt(own, ours, NEGATIVE)
        for name, expected in theirs(own, compels, ITS).items():
            assert torch.equal(single[name], expected)
            split = split_joined("text", found[name], widths.text, len(folders))
            assert torch.equal(split[number], expected)
        for name in [name for name in found if "pooled" in name]:
            split = split_joined("pooled", found[name], widths.pooled, len(folders))
            assert torch.equal(split[number], single[name])


@pytest.mark.parametrize("n", range(len(WEIGHTED)))
def test_the_pooled_embedding_is_that_of_the_words(xl: list[Path], n: int) -> None:
    """Compel would encode its own brackets and numbers."""
    pipeline = stock(xl[0])
    found = afa.encode_prompt(pipeline, WEIGHTED[n][0], "[a] pizza")
    plain = pipeline.encode_prompt(WORDS[n], negative_prompt="a pizza")
    assert torch.equal(found["pooled_prompt_embeds"], plain[2])
    assert torch.equal(found["negative_pooled_prompt_embeds"], plain[3])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("n", [1, 3])
def test_an_ensemble_of_one_draws_as_the_stock_pipeline(
    folders: list[Path], n: int, guidance: float
) -> None:
    own, one = stock(folders[0]), fused(folders[0])
    call = afa.encode_prompt(own, WEIGHTED[n][0], NEGATIVE)
    assert torch.equal(
        latents(own, **{**call, **theirs(own, WEIGHTED[n][1], ITS)}, guidance_scale=guidance),
        latents(one, **prompt_call(one, WEIGHTED[n][0], NEGATIVE, guidance, "weighted")),
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negative", ["", "a pizza"])
def test_without_brackets_it_is_the_plain_picture(
    folders: list[Path], guidance: float, negative: str
) -> None:
    pipeline = fused(*folders)
    calls = [
        prompt_call(pipeline, prompt, negative, guidance, syntax)
        for syntax in ("plain", "weighted")
        for prompt in ("a fox", ["a fox"])
    ]
    drawn = [latents(pipeline, **call) for call in calls]
    assert all(torch.equal(drawn[0], other) for other in drawn)


def test_prompts_of_a_batch_are_padded_by_the_empty_prompt(folders: list[Path]) -> None:
    pipeline = stock(folders[0])
    long, short = WEIGHTED[3][0], "a (fox:1.2)"
    both = afa.encode_prompt(pipeline, [long, short], "a pizza")
    each = [afa.encode_prompt(pipeline, prompt, "a pizza") for prompt in (long, short)]
    empty = afa.encode_prompt(pipeline, "", "")["prompt_embeds"]
    length = empty.shape[1]
    assert torch.equal(both["prompt_embeds"][0], each[0]["prompt_embeds"][0])
    assert torch.equal(both["prompt_embeds"][1, :length], each[1]["prompt_embeds"][0])
    assert torch.equal(both["prompt_embeds"][1, length : 2 * length], empty[0])
    assert torch.equal(both["negative_prompt_embeds"][1, -length:], empty[0])
    assert both["prompt_embeds"].shape == both["negative_prompt_embeds"].shape


def test_longer_prompts_are_batches_of_their_own(folders: list[Path]) -> None:
    pipeline = stock(folders[0])
    prompts = ["a fox", WEIGHTED[3][0], "a (bee:1.2)", "a BREAK b"]
    assert of_equal_length(pipeline, prompts, "", "plain") == [[0, 1, 2, 3]]
    assert of_equal_length(pipeline, prompts, "", "weighted") == [[0, 2], [1], [3]]
    assert of_equal_length(pipeline, prompts, "a BREAK b", "weighted") == [[0, 2, 3], [1]]
    for batch in ([0, 2], [1], [3]):
        lengths = {afa.encode_prompt(pipeline, prompts[n])["prompt_embeds"].shape[1] for n in batch}
        assert len(lengths) == 1


def test_more_tokens_mean_the_same_to_experts_and_aggregators(folders: list[Path]) -> None:
    """All attention is over tokens, so a text twice is the text."""
    pipeline = fused(*folders)
    call = afa.encode_prompt(pipeline, "a (fox:1.3)", "")
    twice = {k: v if "pooled" in k else torch.cat([v, v], 1) for k, v in call.items()}
    drawn = [latents(pipeline, guidance_scale=3.0, **each) for each in (call, twice)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-4)


def test_textual_inversions_of_several_vectors_are_as_in_the_stock_pipeline(
    experts: list[Path],
) -> None:
    pipeline = alone(experts[0])
    width = pipeline.text_encoder.config.hidden_size
    torch.manual_seed(3)
    pipeline.load_textual_inversion({"<toy>": torch.randn(2, width)}, token="<toy>")
    plain = pipeline.encode_prompt(["a <toy> fox"], "cpu", 1, False)[0]
    assert torch.equal(afa.encode_prompt(pipeline, "a <toy> fox")["prompt_embeds"], plain)
    weighted = afa.encode_prompt(pipeline, "a (<toy>:1.3) fox")["prompt_embeds"]
    changed = (weighted != plain).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [2, 3]  # both of its vectors


def test_encoders_with_a_mask_get_it(experts: list[Path]) -> None:
    pipeline = alone(experts[0])
    pipeline.text_encoder.config.use_attention_mask = True
    plain = pipeline.encode_prompt(["a fox"], "cpu", 1, False)[0]
    assert torch.equal(afa.encode_prompt(pipeline, "a fox")["prompt_embeds"], plain)


def test_half_precision_stays(experts: list[Path]) -> None:
    pipeline = alone(experts[0]).to(torch.bfloat16)
    found = afa.encode_prompt(pipeline, "a (fox:1.3)", "a [pizza]")
    assert {each.dtype for each in found.values()} == {torch.bfloat16}


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_other_text_encoders_are_refused(kind: str, tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts(kind, tmp_path, 2))
    with refusal("AFA-ENSEMBLE-074"):
        afa.encode_prompt(pipeline, "a (fox:1.3)")


def test_fused_predictions_are_refused(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(
        [experts[0], experts[0]], fuse="predictions", allow_duplicates=True
    )
    with refusal("AFA-ENSEMBLE-075"):
        prompt_call(pipeline, "a fox", "", 3.0, "weighted")
    assert "prompt" in prompt_call(pipeline, "a fox", "", 3.0, "plain")


def test_what_compel_cannot_align_is_said(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = stock(experts[0])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("token sequence mismatch for fragment at index 0")

    monkeypatch.setattr(EmbeddingsProvider, "get_embeddings_for_weighted_prompt_fragments", fail)
    with refusal("AFA-ENSEMBLE-076", "red fox", "index 0"):
        afa.encode_prompt(pipeline, "a (red:0.5) fox")


def test_as_many_negative_prompts_or_one(experts: list[Path]) -> None:
    pipeline = stock(experts[0])
    with refusal("AFA-ENSEMBLE-077", "2", "3"):
        afa.encode_prompt(pipeline, ["a", "b"], ["c", "d", "e"])
    with refusal("AFA-ENSEMBLE-077", "0"):
        afa.encode_prompt(pipeline, [])
    own = afa.encode_prompt(pipeline, ["a", "b"], ["c", "d"])["negative_prompt_embeds"]
    assert torch.equal(own[1:], afa.encode_prompt(pipeline, "b", "d")["negative_prompt_embeds"])
