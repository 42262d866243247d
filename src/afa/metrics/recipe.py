"""How a recipe names a metric and its weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afa.recipe import Section

MetricName = Literal[
    "clip_t", "clip_i", "aes", "pickscore", "hpsv2", "imagereward", "fid", "kid", "is", "cmmd"
]
_CLIP_L = "openai/clip-vit-large-patch14"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
#: what the literature uses for each
PUBLIC_WEIGHTS: dict[str, str] = {
    "clip_t": _CLIP_L,
    "clip_i": _CLIP_L,
    "aes": "sac+logos+ava1-l14-linearMSE.pth of "
    "github.com/christophschuhmann/improved-aesthetic-predictor",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "xswu/HPSv2",
    "imagereward": "zai-org/ImageReward",
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "cmmd": "openai/clip-vit-large-patch14-336",
}
PUBLIC_PROCESSORS: dict[str, str] = {
    "pickscore": _CLIP_H,
    "hpsv2": _CLIP_H,
    "imagereward": "google-bert/bert-base-uncased",
}
_ZOO_CAN = ("clip_t", "clip_i", "fid", "kid", "is", "cmmd")
PUBLIC_CLIP = _CLIP_L  # what the aesthetic predictor was trained on


class MetricRecipe(Section):
    """One metric of an evaluation.

    `weights` are a local path or a hub id; for `fid`, `kid` and `is` the default is the Inception
    network of torch-fidelity. The zoo's own judges are `zoo:clip` (clip_t, clip_i, fid, kid, cmmd)
    and `zoo:classifier` (is). `processor` is where tokenizer and `preprocessor_config.json` lie if
    not beside the weights. `clip` is the CLIP below the aesthetic predictor. `subset_size` makes
    KID the mean over random subsets. Weights that are published as `.pt` or `.pth` alone are read
    where the user allows pickles, see `afa.trusting`; a recipe cannot allow them.
    """

    name: MetricName
    weights: str | None = None
    processor: str | None = None
    clip: str | None = None
    subset_size: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _allows_nothing_itself(cls, content: Any) -> Any:
        if isinstance(content, dict) and "allow_pickle" in content:
            raise ValueError(
                f"it has allow_pickle: {str(content['allow_pickle']).lower()}; whether pickles are "
                "read is for the user to say, not for a recipe. Remove that key and pass "
                "--allow-pickle (Python: afa.trusting(allow_pickle=True))"
            )
        return content

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> MetricRecipe:
        needed = {
            "weights": None if PUBLIC_WEIGHTS[self.name] == "inception" else PUBLIC_WEIGHTS,
            "processor": PUBLIC_PROCESSORS if self.name in ("hpsv2", "imagereward") else None,
            "clip": {"aes": PUBLIC_CLIP} if self.name == "aes" else None,
        }
        for key, public in needed.items():
            if public is not None and getattr(self, key) is None:
                raise ValueError(
                    f"the metric {self.name} needs {key}, a local path or a hub id such as "
                    f"{public[self.name]}"
                )
        of_the_zoo = "zoo:classifier" if self.name == "is" else "zoo:clip"
        is_offered = self.name in _ZOO_CAN and self.weights == of_the_zoo
        if (self.weights or "").startswith("zoo:") and not is_offered:
            offer = f"it has {of_the_zoo}" if self.name in _ZOO_CAN else "it has none for it"
            raise ValueError(
                f"the metric {self.name} has no weights {self.weights} in the zoo, {offer}"
            )
        is_inception = self.weights in (None, "inception")
        brings_processor = self.name == "aes" or is_inception or is_offered
        idle = {
            "processor": self.processor is not None and brings_processor,
            "clip": self.clip is not None and self.name != "aes",
            "subset_size": self.subset_size is not None and self.name != "kid",
        }
        for key, is_idle in idle.items():
            if is_idle:
                raise ValueError(f"the metric {self.name} has no use for {key}; leave it out")
        return self
