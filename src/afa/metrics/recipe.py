"""The recipe of a metric and its weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afa.recipe import Section

MetricName = Literal[
    "clip_t", "clip_i", "aes", "pickscore", "hpsv2", "imagereward", "fid", "kid", "is", "cmmd"
]
_CLIP_L = "openai/clip-vit-large-patch14"
_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
#: the weights that the literature uses
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
_IN_ZOO = ("clip_t", "clip_i", "fid", "kid", "is", "cmmd")
PUBLIC_CLIP = _CLIP_L  # the CLIP that the aesthetic predictor was trained on


class MetricRecipe(Section):
    """One metric of an evaluation.

    `weights`: a local path or a hub id; for `fid`, `kid` and `is` the default is the Inception
    network of torch-fidelity. The zoo provides `zoo:clip` (clip_t, clip_i, fid, kid, cmmd) and
    `zoo:classifier` (is). `processor`: the tokenizer and `preprocessor_config.json`, if they are
    not in the folder of the weights. `clip`: the CLIP of the aesthetic predictor. `subset_size`:
    computes KID as the mean over random subsets. `.pt` and `.pth` files are only read if the user
    allows pickles, see `afa.trusting`; a recipe cannot allow them.
    """

    name: MetricName
    weights: str | None = None
    processor: str | None = None
    clip: str | None = None
    subset_size: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _refuse_permissions(cls, content: Any) -> Any:
        if isinstance(content, dict) and "allow_pickle" in content:
            raise ValueError(
                f"a recipe must not have allow_pickle; got {str(content['allow_pickle']).lower()}. "
                "Remove that key and pass --allow-pickle (Python: afa.trusting(allow_pickle=True))"
            )
        return content

    @model_validator(mode="after")
    def _consistent(self) -> MetricRecipe:
        needed = {
            "weights": None if PUBLIC_WEIGHTS[self.name] == "inception" else PUBLIC_WEIGHTS,
            "processor": PUBLIC_PROCESSORS if self.name in ("hpsv2", "imagereward") else None,
            "clip": {"aes": PUBLIC_CLIP} if self.name == "aes" else None,
        }
        for key, public in needed.items():
            if public is not None and getattr(self, key) is None:
                raise ValueError(
                    f"the metric {self.name} requires {key}, a local path or a hub id such as "
                    f"{public[self.name]}"
                )
        zoo_weights = "zoo:classifier" if self.name == "is" else "zoo:clip"
        in_zoo = self.name in _IN_ZOO and self.weights == zoo_weights
        if (self.weights or "").startswith("zoo:") and not in_zoo:
            offer = f"use {zoo_weights}" if self.name in _IN_ZOO else "the zoo has none for it"
            raise ValueError(f"the metric {self.name} has no weights {self.weights}; {offer}")
        has_processor = self.name == "aes" or self.weights in (None, "inception") or in_zoo
        unused = {
            "processor": self.processor is not None and has_processor,
            "clip": self.clip is not None and self.name != "aes",
            "subset_size": self.subset_size is not None and self.name != "kid",
        }
        for key, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"the metric {self.name} does not use {key}. Remove it")
        return self
