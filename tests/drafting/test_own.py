"""Drafts that an ensemble uses by itself, for prompts with words that no training caption has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import afa
from afa.cli.drafts import say_own
from afa.denoisers.kinds import denoiser_of
from afa.drafting import Drafter, DraftsRecipe, OwnDrafts, batches, own_drafts, routed, use_drafts
from afa.drafting.own import keep_drafts
from afa.drawing.pictures import drafts_of, prepare
from afa.ensemble.prompt_syntax import PromptSyntax
from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe, SamplingRecipe
from afa.evaluation.run import evaluate
from afa.evaluation.work import draw
from afa.loading.expert_source import ExpertSource
from afa.loading.inspection import describe
from afa.loading.memory.budget import MemoryPlan
from afa.loading.single_file.load import Companions
from afa.loading.vocabulary import WORDS, read_words
from afa.preflight.inputs import inputs_of_evaluation
from afa.training import Recipe
from tests.refusal import refusal
from tests.training.runs import SMALL, as_written, steps_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

KNOWN, UNKNOWN = "a fox", "a zebra beside a fox"


@pytest.fixture
def saved(experts: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """Save a small ensemble with drafts of its own, judged by a copy of the third expert."""

    def save(words: tuple[str, ...] | None = ("fox", "beside"), **changes: Any) -> Path:
        judge = tmp_path / "judge"
        if not judge.exists():
            shutil.copytree(experts[2], judge)
        pipeline = afa.load_pipeline(experts[:2], SMALL)
        chosen = {"num_steps": 1, "num_levels": 5, "prompts": "unknown_words", **changes}
        drafts = OwnDrafts(judge=ExpertSource(str(judge)), **chosen)
        keep_drafts(pipeline, drafts, Companions(torch.float32))
        ensemble = denoiser_of(pipeline)
        ensemble.provenance = replace(ensemble.provenance, words=words)
        return afa.save_ensemble(pipeline, tmp_path / "ensemble")

    return save


def pictures(pipeline: DiffusionPipeline, prompts: list[str]) -> list[Any]:
    """Pictures that are drawn one by one: batches of another size differ in the last bits."""
    sampling = SamplingRecipe(num_steps=2, guidance=3.0, height=16, width=16)
    return [
        next(iter(draw(pipeline, [prompt], [n], 0, 2, sampling))).tobytes()
        for n, prompt in enumerate(prompts)
    ]


def test_a_folder_keeps_its_drafts(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(sharpness=2.0)
    drafts = own_drafts(folder)
    assert drafts is not None
    assert (drafts.num_steps, drafts.sharpness, drafts.prompts) == (1, 2.0, "unknown_words")
    assert drafts.judge.source == str(tmp_path / "judge")
    assert drafts.judge.sha256 is not None
    again = afa.save_ensemble(afa.load_ensemble(folder), tmp_path / "again")
    assert own_drafts(again) == drafts
    assert (again / WORDS).read_text() == (folder / WORDS).read_text()
    assert json.loads((again / "config.json").read_text())["judge"]["source"] == "./../judge"


def test_only_prompts_with_unknown_words_are_drafted(saved: Callable[..., Path]) -> None:
    folder = saved()
    assert own_drafts(folder, [KNOWN]) is None
    assert own_drafts(folder, [KNOWN, UNKNOWN]) is not None
    plain, own = prepare(str(folder)), prepare(str(folder), drafts=own_drafts(folder))
    assert drafts_of(own, KNOWN) == {}
    assert drafts_of(own, UNKNOWN)["drafts"].prompts == "all"
    fused = pictures(plain, [KNOWN, UNKNOWN])
    found = pictures(own, [KNOWN, UNKNOWN])
    assert found[0] == fused[0]
    assert found[1] != fused[1]
    everything = own_drafts(folder)
    assert everything is not None
    use_drafts(own, everything.model_copy(update={"prompts": "all"}))
    first, second = pictures(own, [KNOWN, UNKNOWN])
    assert first != fused[0]
    assert drafts_of(own, KNOWN) != {}
    assert second == found[1]


def test_the_aggregators_are_kept_for_known_words_alone(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(prompts="all", aggregators="known_words")
    drafts = own_drafts(folder, [KNOWN])
    assert drafts is not None
    for prompts, said in (
        ([KNOWN], "all prompts by drafts, judged"),
        ([KNOWN, UNKNOWN], "all prompts by drafts, without the aggregators for 'zebra', which"),
    ):
        say_own(drafts, str(folder), prompts)
        assert said in " ".join(capsys.readouterr().out.split())
    pipeline = prepare(str(folder), drafts=drafts)
    assert batches(pipeline, [KNOWN, UNKNOWN, "a fox beside"]) == [[0, 2], [1]]
    with refusal("AFA-DRAFT-008"), routed(pipeline, [KNOWN, UNKNOWN], []):
        pass
    found = pictures(pipeline, [KNOWN, UNKNOWN])
    for n, prompt, way in ((0, KNOWN, "keep"), (1, UNKNOWN, "ignore")):
        recorded = drafts_of(pipeline, prompt)["drafts"]
        assert (recorded.prompts, recorded.aggregators) == ("all", way)
        use_drafts(pipeline, drafts.model_copy(update={"aggregators": way}))
        expected = [pictures(pipeline, [KNOWN, UNKNOWN])[n]]
        use_drafts(pipeline, drafts)
        assert [found[n]] == expected
    with pytest.raises(ValidationError, match="prompts: all"):
        DraftsRecipe(judge=drafts.judge, prompts="unknown_words", aggregators="known_words")
    (folder / WORDS).unlink()
    with refusal("AFA-DRAFT-010"):
        own_drafts(folder)
    with refusal("AFA-DRAFT-007", "aggregators: known_words", "words.json"):
        use_drafts(afa.load_ensemble(folder), drafts)


def test_a_batch_is_drafted_or_not(saved: Callable[..., Path]) -> None:
    pipeline = prepare(str(saved()))
    prompts = [KNOWN, UNKNOWN, "a fox beside", "a quagga"]
    assert batches(pipeline, prompts) == [[0, 1, 2, 3]]
    use_drafts(pipeline, own_drafts(saved_folder(pipeline)))
    assert batches(pipeline, prompts) == [[0, 2], [1, 3]]
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    with refusal("AFA-DRAFT-008", "batches"), routed(pipeline, prompts[:2], generators):
        pass
    with routed(pipeline, [KNOWN], generators[:1]):
        assert denoiser_of(pipeline).regions is None


def test_drafts_see_the_words_of_weighted_prompts(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved()
    own = prepare(str(folder), drafts=own_drafts(folder))
    judged: list[str] = []
    bias = Drafter.bias

    def spied(self: Drafter, pipeline: Any, prompts: Any, *args: Any, **call: Any) -> Any:
        judged.extend(prompts)
        return bias(self, pipeline, prompts, *args, **call)

    monkeypatch.setattr(Drafter, "bias", spied)

    def drawn(syntax: PromptSyntax, *prompts: str) -> list[bytes]:
        sampling = SamplingRecipe(
            num_steps=2, guidance=3.0, height=16, width=16, prompt_syntax=syntax
        )
        return [draw(own, [each], [0], 0, 2, sampling)[0].tobytes() for each in prompts]

    assert drawn("weighted", KNOWN, UNKNOWN) == drawn("plain", KNOWN, UNKNOWN)
    assert judged == [UNKNOWN] * 2
    # BREAK is no word, so the last one is not drafted
    found = drawn("weighted", "a (zebra:1.4) BREAK beside a [fox]", "a fox BREAK (beside:1.2)")
    assert judged[2:] == ["a zebra beside a fox"]
    assert found[0] != drawn("weighted", UNKNOWN)[0]


def saved_folder(pipeline: DiffusionPipeline) -> Path:
    judge = denoiser_of(pipeline).provenance.judge
    assert judge is not None
    return Path(judge.source).parent / "ensemble"


def test_what_the_folder_must_have(saved: Callable[..., Path], experts: list[Path]) -> None:
    folder = saved()
    (folder / WORDS).unlink()
    with refusal("AFA-DRAFT-010", "words.json", "--no-drafts"):
        own_drafts(folder, [KNOWN])
    config = json.loads((folder / "config.json").read_text())
    config["drafts"]["num_steps"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with refusal("AFA-DRAFT-009", "num_steps", "config.json"):
        own_drafts(folder)


def test_another_judge_than_that_of_the_training_is_refused(
    saved: Callable[..., Path], experts: list[Path], tmp_path: Path
) -> None:
    folder = saved()
    shutil.rmtree(tmp_path / "judge")
    with refusal("AFA-DRAFT-011", "judge", "--no-drafts"):
        prepare(str(folder), drafts=own_drafts(folder, [UNKNOWN]))
    shutil.copytree(experts[0], tmp_path / "judge")
    with refusal("AFA-DRAFT-011", "SHA-256", "--drafts MODEL"):
        prepare(str(folder), drafts=own_drafts(folder, [UNKNOWN]))
    assert own_drafts(folder, [KNOWN]) is None, "it is not needed"


def test_a_budget_leaves_room_for_the_judge(saved: Callable[..., Path]) -> None:
    folder = saved()
    plans: list[MemoryPlan] = []
    for drafts in (None, own_drafts(folder)):
        budget: dict[str, Any] = {"memory_budget": "100GB", "on_plan": plans.append}
        prepare(str(folder), drafts=drafts, **budget)
    without, with_judge = plans
    assert without.reserved == 0
    judge = denoiser_of(prepare(str(folder), drafts=own_drafts(folder))).drafter.judge
    parts = (judge.unet, judge.vae, judge.text_encoder)
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert with_judge.reserved == pytest.approx(size, rel=0.01)
    assert "the judge of drafts" in with_judge.lines()[0]
    assert "judge" not in without.lines()[0]


@pytest.mark.slow
def test_a_training_keeps_its_drafts(experts: list[Path], tmp_path: Path) -> None:
    scenes = {"scenes": {"num_samples": 4}, "cache": True, "cache_folder": str(tmp_path / "cache")}
    written = as_written(experts[:2], scenes, num_steps=1)
    asked = Recipe.model_validate({**written, "drafts": {"judge": str(experts[2])}})
    assert "drafts" in asked.model_dump()
    assert "drafts" not in Recipe.model_validate(written).model_dump(), "of earlier releases"
    list(steps_of(asked, tmp_path / "run"))
    drafts = own_drafts(tmp_path / "run", ["a quagga"])
    assert drafts is not None
    assert drafts.judge.source == str(experts[2])
    assert own_drafts(tmp_path / "run", ["background"]) is None
    assert (drafts.prompts, drafts.aggregators) == ("unknown_words", "ignore"), "the defaults"
    for given in ({"prompts": "all"}, {"aggregators": "known_words"}):
        asked = Recipe.model_validate({**written, "drafts": {"judge": str(experts[2]), **given}})
        assert asked.drafts is not None
        assert (asked.drafts.prompts, asked.drafts.aggregators) == ("all", "known_words")
    # another judge needs no other training
    changed = {"judge": str(experts[1]), "sharpness": 1.0, "prompts": "unknown_words"}
    again = Recipe.model_validate({**written, "drafts": changed})
    assert not list(steps_of(again, tmp_path / "run"))
    drafts = own_drafts(tmp_path / "run")
    assert drafts is not None
    assert (drafts.judge.source, drafts.sharpness) == (str(experts[1]), 1.0)
    assert drafts.aggregators == "ignore", "of unknown words, the aggregators know nothing"
    assert own_drafts(tmp_path / "run", ["background"]) is None
    assert str(experts[1]) in (tmp_path / "run" / "README.md").read_text()
    assert describe(tmp_path / "run")["judge"] == str(experts[1])

    (tmp_path / "other").mkdir()
    wrong = Recipe.model_validate({**written, "drafts": {"judge": str(tmp_path / "other")}})
    with refusal("AFA-LOAD-102"):
        list(steps_of(wrong, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_captions_without_words_are_refused(experts: list[Path], tmp_path: Path) -> None:
    for n in range(2):
        Image.new("RGB", (32, 32), (80 * n, 9, 9)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("狐")
    data = {"folder": str(tmp_path), "cache_folder": str(tmp_path / "cache")}
    written = as_written(experts[:2], data, num_steps=1)
    asked = Recipe.model_validate({**written, "drafts": {"judge": str(experts[2])}})
    with refusal("AFA-TRAIN-061", "drafts.prompts"):
        list(steps_of(asked, tmp_path / "run"))


@pytest.mark.slow
def test_the_words_of_generated_scenes_are_known(experts: list[Path], tmp_path: Path) -> None:
    """They are not rendered for it: a training reads only some of many scenes."""
    data = {"scenes": {"num_samples": 3_000, "without": ["fox"]}}
    written = as_written(experts[:2], data, num_steps=1)
    asked = Recipe.model_validate({**written, "drafts": {"judge": str(experts[2])}})
    list(steps_of(asked, tmp_path / "run"))
    words = read_words(tmp_path / "run")
    assert words is not None
    assert "pizza" in words
    assert "fox" not in words


@pytest.mark.parametrize("drafts", [{"prompts": "unknown_words"}, {"aggregators": "known_words"}])
def test_before_a_training_no_words_are_known(drafts: dict[str, str]) -> None:
    drafts = {"judge": "zoo:base", **drafts}
    data = {"prompts": {"file": "prompts.txt", "number": 1, "drafts": drafts}}
    with pytest.raises(ValidationError, match="no caption is known"):
        Recipe.model_validate(as_written([Path("a"), Path("b")], data))


@pytest.mark.parametrize("drafts", [{"prompts": "unknown_words"}, {"aggregators": "known_words"}])
def test_a_fusion_has_no_captions(drafts: dict[str, str]) -> None:
    drafts = {"judge": "zoo:base", **drafts}
    with pytest.raises(ValidationError, match="no training captions"):
        MethodRecipe.model_validate(
            {"name": "drafts", "fusion": {"rule": "feature_mean"}, "drafts": drafts}
        )


def test_a_comparison_says_that_it_does_not_use_them(
    saved: Callable[..., Path], experts: list[Path], tmp_path: Path
) -> None:
    folder = saved()
    (tmp_path / "prompts.txt").write_text(f"{KNOWN}\n{UNKNOWN}\n")

    def said(**changes: Any) -> list[str]:
        method = {"name": "mine", "ensemble": str(folder), **changes}
        recipe = EvaluateRecipe.model_validate(
            {
                "experts": [str(expert) for expert in experts[:2]],
                "prompts": {"text": str(tmp_path / "prompts.txt")},
                "methods": [method],
                "sampling": {"height": 16, "width": 16},
                "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
            }
        )
        found = inputs_of_evaluation(recipe, None, lambda *_: None)
        return [each.text for each in found.findings if "drafts" in each.text]

    guess, differs = said()
    assert "'zebra'" in guess
    assert "'mine'" in differs
    assert str(tmp_path / "judge") in differs
    # the advice is complete: with it, the pictures are those of afa generate
    drafts = json.loads(differs[differs.index("{") : differs.rindex("}") + 1])
    assert said(drafts=drafts) == []
    own = own_drafts(folder)
    assert own is not None
    given = DraftsRecipe.model_validate(drafts)
    assert given.model_dump(exclude={"judge"}) == {
        **own.model_dump(exclude={"judge"}),
        "prompts": "unknown_words",
    }


@pytest.mark.slow
def test_a_report_has_the_weights_of_both_kinds_of_prompts(
    saved: Callable[..., Path], experts: list[Path], tmp_path: Path
) -> None:
    folder = saved()
    (tmp_path / "prompts.txt").write_text(f"{KNOWN}\n{UNKNOWN}\na fox beside\n")
    drafts = own_drafts(folder)
    assert drafts is not None
    recipe = EvaluateRecipe.model_validate(
        {
            "experts": [str(expert) for expert in experts[:2]],
            "prompts": {"text": str(tmp_path / "prompts.txt")},
            "methods": [{"name": "mine", "ensemble": str(folder), "drafts": drafts.model_dump()}],
            "sampling": {"num_steps": 2, "height": 16, "width": 16, "device": "cpu"},
            "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
            "num_resamples": 100,
        }
    )
    list(evaluate(recipe, tmp_path / "out"))
    weights = json.loads((tmp_path / "out" / "report.json").read_text())["weights"]["groups"]
    assert weights.keys() == {"all", "all, by drafts"}
    assert all(len(each["shares"]) == 2 for each in weights.values())
