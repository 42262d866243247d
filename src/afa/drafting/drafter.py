"""Draw drafts with all experts, and make a bias by region from what a judge recognises in them."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import Separate
from afa.denoisers.autoencoders import autoencoder_of
from afa.denoisers.forward_process import forward_process
from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.drafting.recognition import recognise
from afa.drafting.settings import OwnDrafts
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.locks import Lock
from afa.ensemble.regions import Regions
from afa.errors import AfaError
from afa.loading.identity import identity_of
from afa.loading.pipeline import load_single
from afa.loading.single_file.load import Companions
from afa.loading.task import check_text_to_image, native_resolution
from afa.loading.vocabulary import unknown_words

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.drafting.settings import DraftsRecipe
    from afa.ensemble.references import ExpertReference


class Drafter:
    """Decides for the next pictures of an ensemble which expert draws which region.

    Each expert drafts the picture alone, in a few steps and from the same noise. The judge says for
    each region in which draft it recognises the prompt best; see `recognise`.

    Args:
        judge: pipeline of the model that judges.
        settings: the settings.
        identity: hash of everything that determines what the judge says.
        words: all words of the ensemble's training captions, if the settings need them.
    """

    def __init__(
        self,
        judge: DiffusionPipeline,
        settings: DraftsRecipe,
        identity: str,
        words: Collection[str] | None = None,
    ) -> None:
        self.judge, self.settings, self.identity = judge, settings, identity
        self._words = None if words is None else frozenset(words)
        #: held while a batch is drafted and drawn
        self.lock = Lock()
        #: the thread that draws a batch
        self.thread: int | None = None

    @property
    def is_drawing(self) -> bool:
        """Whether this thread draws a batch inside of `routed`."""
        return self.thread == threading.get_ident()

    def settings_of(self, prompt: str) -> DraftsRecipe | None:
        """The settings with which a prompt is drawn; None if it is drawn without drafts."""
        is_known = self._words is not None and not unknown_words(self._words, [prompt])
        return self.settings.of_prompt(is_known=is_known)

    def bias(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        **call: Any,
    ) -> Tensor:
        """Draw the drafts of a batch of B pictures, and judge them.

        The bias is the judgement, averaged over the noise levels and divided by its standard error.
        It is multiplied by 1 - 1 / m, for the mean square m over experts and pixels, or by 0 if
        this is negative (James & Stein, 1961): without any difference m is about 1.

        Args:
            pipeline: with an ensemble of N experts.
            prompts: B prompts.
            generators: of the initial noise of each picture; they are not changed.
            call: further arguments of the pipeline's call.

        Returns: the bias [B, N, h, w] of the experts' logits.

        Raises:
            AfaError: if a draft is not finite.
        """
        ensemble, count = denoiser_of(pipeline), self.settings.num_levels
        seeds = [generator.initial_seed() for generator in generators]
        judged = []
        for n in range(len(ensemble.experts)):
            latents = self._draft(pipeline, n, prompts, generators, call)
            judged.append(recognise(self.judge, latents, prompts, seeds, count))
        found = torch.stack(judged, 1)  # [B, N, levels, h, w]
        found = blurred(found, self.settings.region * min(found.shape[-2:]))
        found = found - found.mean(1, keepdim=True)
        error = (found.var(2).mean((1, 2, 3)) / count).sqrt()
        error = error.clamp(min=torch.finfo(torch.float32).tiny)
        scaled = found.mean(2) / error[:, None, None, None]
        square = scaled.square().mean((1, 2, 3), keepdim=True)
        shrunk = (1 - 1 / square.clamp(min=1)) * scaled
        return self.settings.sharpness * shrunk

    def _draft(
        self,
        pipeline: DiffusionPipeline,
        expert: int,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        call: dict[str, Any],
    ) -> Tensor:
        """Draw the latents [B, C, H, W] of one expert alone, of prompts or of their embeddings."""
        ensemble = denoiser_of(pipeline)
        own = [generator.clone_state() for generator in generators]
        changes: dict[str, Any] = {
            "num_inference_steps": self.settings.num_steps,
            "output_type": "latent",
        }
        if "prompt_embeds" not in call:
            changes["prompt"] = list(prompts)
        with ensemble.drafting(expert):
            latents = pipeline(generator=own, **{**call, **changes}).images
        unpack = conditioning_of(pipeline).unpack
        if unpack is None:
            return latents
        height, width = native_resolution(pipeline)
        return unpack(pipeline, latents, call.get("height") or height, call.get("width") or width)


def blurred(found: Tensor, deviation: float) -> Tensor:
    """Blur maps [..., h, w] by a Gaussian with this standard deviation in pixels."""
    for dim in (-2, -1):
        place = torch.arange(found.shape[dim]).to(found)
        distance = (place[:, None] - place) / max(deviation, 1e-3)
        kernel = (-distance.square() / 2).softmax(1)  # at the border, only pixels inside count
        found = (found.movedim(dim, -1) @ kernel.T).movedim(-1, dim)
    return found


def use_drafts(
    pipeline: DiffusionPipeline,
    settings: DraftsRecipe | None,
    companions: Companions | None = None,
) -> None:
    """Draw all pictures of an ensemble by drafts from now on; draw them with `routed`.

    The judge is loaded on the device of the ensemble and in its data type.

    Args:
        pipeline: with the ensemble.
        settings: the settings; None stops using drafts.
        companions: parts that a single file lacks; see `afa.loading.expert.load_expert`.

    Raises:
        AfaError: if the pipeline has no ensemble or needs more than a prompt, a feature of the
            ensemble excludes drafts, or the judge cannot be loaded, has another latent, or has no
            discrete noise levels.
    """
    ensemble = denoiser_of(pipeline)
    if not isinstance(ensemble, EnsembleDenoiser):
        if settings is None:
            return
        raise AfaError(
            "AFA-DRAFT-001",
            "Drafts decide between the experts of an ensemble, but this is a single model. Load an "
            "ensemble, or remove drafts.",
        )
    ensemble.drafter = None
    if settings is None:
        return
    ensemble.require_drafts()
    conditioning_of(pipeline)
    if ensemble.on_nonfinite == "mask":
        raise AfaError(
            "AFA-DRAFT-003",
            "Drafts cannot be combined with on_nonfinite: mask. An expert that drafts alone cannot "
            "be skipped. Use on_nonfinite: stop, or remove drafts.",
        )
    words = None
    if settings.needs_words:
        words = require_words(settings, ensemble.provenance.words)
    companions = companions or Companions(ensemble.dtype)
    try:
        identity = judge_identity(settings, companions)
        judge, _ = load_judge(settings, pipeline, companions)
    except AfaError as error:
        if not isinstance(settings, OwnDrafts):
            raise
        raise AfaError(
            "AFA-DRAFT-011",
            f"The judge of the ensemble's own drafts cannot be used. {error} Or pass --drafts "
            "MODEL, or --no-drafts.",
        ) from error
    ensemble.drafter = Drafter(judge.to(ensemble.device), settings, identity, words)


def require_words(settings: DraftsRecipe, words: Collection[str] | None) -> Collection[str]:
    """Return the words of an ensemble's training captions, which the settings need.

    Raises:
        AfaError: if they are None.
    """
    if words is not None:
        return words
    asked, instead = "prompts: unknown_words", "prompts: all"
    if settings.aggregators == "known_words":
        asked, instead = "aggregators: known_words", "aggregators: ignore"
    raise AfaError(
        "AFA-DRAFT-007",
        f"The drafts have {asked}, but this ensemble has no list of the words of its training "
        f"captions. Restore words.json in its folder, or set {instead}.",
    )


def load_judge(
    settings: DraftsRecipe, pipeline: DiffusionPipeline, companions: Companions
) -> tuple[DiffusionPipeline, ExpertReference]:
    """Load the judge of an ensemble's drafts on the CPU, and refer to it.

    Args:
        settings: of the drafts.
        pipeline: with the ensemble.
        companions: parts that a single file lacks.

    Raises:
        AfaError: see `use_drafts`.
    """
    judge, reference = load_single(
        settings.judge, companions=companions, torch_dtype=denoiser_of(pipeline).dtype
    )
    check_text_to_image(judge)
    own, other = (_latent(each) for each in (pipeline, judge))
    if own != other:
        raise AfaError(
            "AFA-DRAFT-002",
            f"The judge '{settings.judge}' sees latents with {other}, the experts with {own}. "
            "Judge with a model of the experts' family, best the one they were fine-tuned from.",
        )
    try:
        conditioning_of(judge)
        forward_process(judge.scheduler)
    except AfaError as error:
        raise AfaError(
            "AFA-DRAFT-004", f"'{settings.judge}' cannot judge drafts. {error}"
        ) from error
    judge.set_progress_bar_config(disable=True)
    return judge, reference


def judge_identity(settings: DraftsRecipe, companions: Companions) -> str:
    """Return the hash of everything that determines what a judge says.

    Raises:
        AfaError: if it cannot be read.
    """
    return hashlib.sha256(json.dumps(identity_of(settings.judge, companions)).encode()).hexdigest()


def _latent(pipeline: DiffusionPipeline) -> str:
    vae = pipeline.vae
    if not hasattr(vae.config, "scaling_factor"):
        return f"the scale of {autoencoder_of(vae).space(vae.config)}"
    config = vae.config
    return (
        f"{config.latent_channels} channels, the factor {config.scaling_factor} and the shift "
        f"{getattr(config, 'shift_factor', None) or 0}"
    )


@contextmanager
def routed(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    **call: Any,
) -> Iterator[None]:
    """Draw the pictures of a batch by drafts, if the pipeline's ensemble uses them for the prompts.

    Threads draw one after the other.

    Args:
        pipeline: any pipeline; see `use_drafts`.
        prompts: prompts of the pictures that are drawn inside the block, in one batch; without
            weights, which are in the `prompt_embeds` of the call.
        generators: see `Drafter.bias`.
        call: further arguments of that call, which drafts share: guidance, sizes, ...

    Raises:
        AfaError: if this thread is already inside such a block, several pictures are to be drawn
            for a prompt, or the prompts are not drawn in the same way; see `batches`.
    """
    ensemble = denoiser_of(pipeline)
    drafter: Drafter | None = getattr(ensemble, "drafter", None)
    if drafter is None:
        yield
        return
    if drafter.is_drawing:
        raise AfaError(
            "AFA-DRAFT-005",
            "This ensemble already draws a batch by drafts. End that block of afa.drafting.routed "
            "first.",
        )
    if call.get("num_images_per_prompt") not in (None, 1):
        raise AfaError(
            "AFA-DRAFT-006",
            "Drafts need num_images_per_prompt = 1. Repeat the prompt in the list of prompts.",
        )
    ways = [drafter.settings_of(prompt) for prompt in prompts]
    if any(way != ways[0] for way in ways):
        raise AfaError(
            "AFA-DRAFT-008",
            "These prompts are not drawn in the same way: some have words that no training caption "
            "has. Draw the batches of afa.drafting.batches one after the other.",
        )
    with drafter.lock:
        drafter.thread = threading.get_ident()
        try:
            if ways and ways[0] is not None:
                bias = drafter.bias(pipeline, prompts, generators, **call)
                replaced: list[str] = []
                if ways[0].aggregators == "ignore":
                    pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
                    replaced = [site.name for site, rule in pairs if not isinstance(rule, Separate)]
                ensemble.regions = Regions(bias, replaced)
            yield
        finally:
            ensemble.regions, drafter.thread = None, None


def way_of(pipeline: DiffusionPipeline, prompt: str) -> str:
    """How a prompt is drawn: by `drafts`, by `drafts and aggregators`, or by `aggregators`."""
    drafter: Drafter | None = getattr(denoiser_of(pipeline), "drafter", None)
    settings = None if drafter is None else drafter.settings_of(prompt)
    if settings is None:
        return "aggregators"
    return "drafts" if settings.aggregators == "ignore" else "drafts and aggregators"


def batches(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[list[int]]:
    """The indices of prompts that are drawn in one batch, in the same way; none is empty."""
    ways: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        ways.setdefault(way_of(pipeline, prompt), []).append(n)
    return list(ways.values())
