"""Compute scores and features of drawn pictures, and store them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from afa.ensemble.prompt_syntax import words_of_prompt
from afa.errors import AfaError
from afa.evaluation.identity import of_metric
from afa.evaluation.prompts import groups_of
from afa.evaluation.recipe import SCENE_SCORES, SCENES, slug
from afa.evaluation.work import MARK_FILE, digest, open_pictures, write_json
from afa.files import read_json, write_atomic
from afa.loading.truncation import cuts_of
from afa.machine.hashes import hash_file
from afa.metrics import MetricRecipe, ReferenceScorer, SetMetric, open_metrics
from afa.reading import Conversion, Tally, conversions_of, counted, files_in, is_picture_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from afa.evaluation.prompts import Prompt
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.work import Store, Unit
    from afa.loading.truncation import TextLimit
    from afa.metrics import FeatureExtractor, ImageScorer

_REFERENCE_BATCH = 32


class PictureScorer(Protocol):
    """Scores pictures with their prompts; returns a list of numbers per score."""

    name: str

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        """Compute the scores, in the order of the pictures."""


class _Scenes:
    """The zoo's classifier: whether each object is on its side.

    Raises:
        AfaError: if a prompt is no caption of a scene.
    """

    name = SCENES

    def __init__(self, prompts: Sequence[str] = ()) -> None:
        from afa.zoo.judges import load_classifier
        from afa.zoo.scenes import parse_caption

        for prompt in prompts:
            try:
                parse_caption(prompt)
            except AfaError as error:
                raise AfaError(
                    "AFA-EVAL-031",
                    f"The metric 'scenes' judges captions of scenes only. {error} Or "
                    "choose another metric.",
                ) from None
        self._classifier = load_classifier()

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        from afa.zoo.judges import judge

        verdicts = judge(self._classifier, pictures, prompts)
        return {
            name: [float(getattr(verdict, name)) for verdict in verdicts] for name in SCENE_SCORES
        }


class _Single:
    """A metric of `afa.metrics` with one number per picture."""

    def __init__(self, scorer: ImageScorer) -> None:
        self.name = scorer.name
        #: limits of its text encoder, if it has one
        self.text_limits: list[TextLimit] = getattr(scorer, "text_limits", [])
        self._scorer = scorer

    def __call__(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        return {self.name: self._scorer.score(pictures, prompts)}


def open_scorer(
    metric: MetricRecipe | Literal["scenes"], device: torch.device, prompts: Sequence[str] = ()
) -> PictureScorer:
    """Open a scorer of single pictures.

    Args:
        metric: the metric.
        device: device of its networks.
        prompts: of the pictures to score.

    Raises:
        AfaError: if its weights cannot be loaded, it does not score single pictures, or it is
            `scenes` and a prompt is no caption of a scene.
    """
    if isinstance(metric, str):
        return _Scenes(prompts)
    opened = open_metrics([metric], device)[0]
    if isinstance(opened, SetMetric | ReferenceScorer):
        raise AfaError(
            "AFA-EVAL-019",
            f"The metric must score single pictures; got '{metric.name}', which compares pictures "
            "with others. Choose another metric.",
        )
    return _Single(opened)


class Scoring:
    """The opened metrics of a comparison, and the scores and features that they store.

    Args:
        recipe: the comparison, with its metrics.
        prompts: all prompts.
        store: the comparison's folder.
        device: device of the metrics' networks.

    Raises:
        AfaError: if weights cannot be loaded, a metric needs real pictures and has none, or the
            metric is `scenes` and a prompt is no caption of a scene.
    """

    def __init__(
        self,
        recipe: EvaluateRecipe,
        prompts: Sequence[Prompt],
        store: Store,
        device: torch.device,
    ) -> None:
        self._prompts, self._store = prompts, store
        syntax = recipe.sampling.prompt_syntax
        #: the words of the prompts, as metrics read them
        self._texts = [words_of_prompt(prompt.text, syntax) for prompt in prompts]
        self.scorers: list[PictureScorer] = []
        self.reference_scorers: list[ReferenceScorer] = []
        self.set_metrics: list[SetMetric] = []
        self.extractors: dict[str, FeatureExtractor] = {}
        #: folder names that identify the settings and weights of metrics, and networks
        self._keys: dict[str, str] = {SCENES: f"{SCENES}-{digest(of_metric(SCENES))}"}
        self._real: dict[str, Tensor] = {}
        chosen = [metric for metric in recipe.metrics if isinstance(metric, MetricRecipe)]
        if SCENES in recipe.metrics:
            self.scorers.append(_Scenes(self._texts))
        for asked, metric in zip(chosen, open_metrics(chosen, device), strict=True):
            weights = of_metric(asked)
            asked_for = [asked.model_dump(mode="json"), weights]
            self._keys[metric.name] = f"{metric.name}-{digest(asked_for)}"
            if isinstance(metric, SetMetric | ReferenceScorer):
                network = metric.extractor.name
                self.extractors[network] = metric.extractor
                self._keys[network] = f"{slug(network)[:40]}-{digest([network, weights])}"
            if isinstance(metric, SetMetric):
                self.set_metrics.append(metric)
            elif isinstance(metric, ReferenceScorer):
                self.reference_scorers.append(metric)
            else:
                self.scorers.append(_Single(metric))
        self._folder = recipe.references
        self.references = self._find_references(recipe)
        for asked in chosen:
            self._check_subsets(asked, recipe)

    def _find_references(self, recipe: EvaluateRecipe) -> list[Path]:
        """The real pictures of the folder, or of the prompts in their order."""
        own = [prompt.reference for prompt in self._prompts if prompt.reference is not None]
        if self.reference_scorers and len(own) < len(self._prompts):
            raise AfaError(
                "AFA-EVAL-020",
                f"The metric '{self.reference_scorers[0].name}' needs a real picture for each "
                f"prompt; only {len(own)} of {len(self._prompts)} prompts have one. Use "
                "prompts.folder, prompts.coco with pictures, or prompts.zoo.",
            )
        if self.reference_scorers and recipe.references is not None:
            raise AfaError(
                "AFA-EVAL-021",
                f"The metric '{self.reference_scorers[0].name}' compares each picture with the "
                f"real one of its prompt, not with the references '{recipe.references}'. Remove "
                "references.",
            )
        needs_real = [metric.name for metric in self.set_metrics if metric.needs_real]
        found = own if recipe.references is None else pictures_in(recipe.references)
        if needs_real and len(found) < 2:
            raise AfaError(
                "AFA-EVAL-022",
                f"The metric '{needs_real[0]}' needs at least 2 real pictures; got {len(found)}. "
                "Set references to a folder of them, or use prompts with pictures.",
            )
        return found if needs_real or self.reference_scorers else []

    def _check_subsets(self, metric: MetricRecipe, recipe: EvaluateRecipe) -> None:
        """Raise AfaError if a subset_size is larger than a group of pictures."""
        if metric.subset_size is None:
            return
        num_seeds = len(recipe.sampling.seeds)
        for group, places in groups_of(self._prompts).items():
            num_real = len(places) if recipe.references is None else len(self.references)
            smaller = min(num_seeds * len(places), num_real)
            if metric.subset_size > smaller:
                raise AfaError(
                    "AFA-EVAL-023",
                    f"The subset_size of '{metric.name}' must be at most {smaller}, the number of "
                    f"pictures of '{group}'; got {metric.subset_size}. Lower it.",
                )

    def warnings(self) -> list[str]:
        """Warnings before any work, one line each: cut prompts, and files that are not used."""
        lines = [
            cut.line("prompt", "prompts")
            for scorer in self.scorers
            if isinstance(scorer, _Single)
            for cut in cuts_of(scorer.text_limits, self._texts)
        ]
        if self._folder is not None and self.references:
            others = [path for path in files_in(self._folder) if not is_picture_file(path)]
            if others:
                lines.append(
                    f"{counted(len(others), 'file')} of '{self._folder}' without the suffix of a "
                    f"picture, such as '{others[0].name}', are not used as references."
                )
        return lines

    # -- work ---------------------------------------------------------------------------------

    def _scores_file(self, metric: str, unit: Unit) -> Path:
        return self._store.scores(self._keys[metric], unit)

    def _features_file(self, network: str, unit: Unit) -> Path:
        return self._store.features(self._keys[network], unit)

    def reference_batches(self) -> list[tuple[str, int]]:
        """The batches of reference pictures: (network, number of the batch)."""
        count = -(-len(self.references) // _REFERENCE_BATCH)
        return [(network, number) for network in self.extractors for number in range(count)]

    def extract_references(self, network: str, number: int) -> None:
        """Compute and store the features of one batch of reference pictures.

        Stored features are reused if they are of the same pictures in the same order.

        Raises:
            AfaError: if a picture cannot be read.
        """
        path = self._store.reference_features(self._keys[network], number)
        start = number * _REFERENCE_BATCH
        paths = self.references[start : start + _REFERENCE_BATCH]
        made_from = json.dumps([_hash_of(picture) for picture in paths])
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("pictures") == made_from:
                    return
        pictures = list(open_pictures(paths))
        features = self.extractors[network].features(pictures)
        converted = json.dumps([sorted(conversions_of(picture)) for picture in pictures])
        _write_features(path, features, {"pictures": made_from, "converted": converted})

    def converted_references(self) -> str | None:
        """Describe the conversions while reading the references; None if there were none."""
        tally = Tally()
        for network, number in self.reference_batches():
            path = self._store.reference_features(self._keys[network], number)
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("converted", "[]"))
            for row, done in enumerate(found):
                tally.add((number, row), map(Conversion, done))
        return tally.line("References")

    def _is_scored(self, unit: Unit) -> bool:
        """Whether all scores and features of a drawn batch are stored."""
        scored = all(self._scores_file(s.name, unit).exists() for s in self.scorers)
        return scored and all(self._features_file(n, unit).exists() for n in self.extractors)

    def score(self, unit: Unit) -> None:
        """Compute and store the missing scores and features of one drawn batch."""
        if self._is_scored(unit):
            return
        pictures = list(open_pictures(self._store.picture(unit, n) for n in unit.places))
        prompts = [self._texts[place] for place in unit.places]
        for scorer in self.scorers:
            path = self._scores_file(scorer.name, unit)
            if not path.exists():
                write_json(path, scorer(pictures, prompts))
        for name, extractor in self.extractors.items():
            path = self._features_file(name, unit)
            if not path.exists():
                _write_features(path, extractor.features(pictures))

    # -- stored values ------------------------------------------------------------------------

    def scores_of(self, unit: Unit) -> dict[str, list[float]]:
        """The scores of a batch by name, including those against references."""
        scores: dict[str, list[float]] = {}
        for scorer in self.scorers:
            scores |= read_json(self._scores_file(scorer.name, unit))
        for reference_scorer in self.reference_scorers:
            network = reference_scorer.extractor.name
            real = self.reference_features(network)[list(unit.places)]
            scores[reference_scorer.name] = reference_scorer.score(
                self.features_of(network, unit), real
            )
        return scores

    def features_of(self, network: str, unit: Unit) -> Tensor:
        """The features of a batch [pictures, width]."""
        return load_file(self._features_file(network, unit))["features"]

    def reference_features(self, network: str) -> Tensor:
        """The features of all reference pictures [pictures, width]."""
        if network not in self._real:
            count = -(-len(self.references) // _REFERENCE_BATCH)
            key = self._keys[network]
            files = [self._store.reference_features(key, number) for number in range(count)]
            self._real[network] = torch.cat([load_file(file)["features"] for file in files])
        return self._real[network]


def _hash_of(picture: Path) -> str:
    """The SHA-256 of a picture's file.

    Raises:
        AfaError: if it cannot be read.
    """
    try:
        return hash_file(picture)
    except OSError as error:
        raise AfaError(
            "AFA-EVAL-024",
            f"The reference picture '{picture}' cannot be read: {error}. Restore or remove it.",
        ) from error


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted by name.

    Raises:
        AfaError: if it is not a folder, or contains the output of a comparison, whose generated
            pictures would count as real ones.
    """
    if not folder.is_dir():
        raise AfaError("AFA-EVAL-025", f"references must be a folder of pictures; got '{folder}'.")
    found = sorted(files_in(folder))
    drawn = next((path.parent for path in found if path.name == MARK_FILE), None)
    if drawn is not None:
        raise AfaError(
            "AFA-EVAL-026",
            f"The references '{folder}' contain the generated pictures of a comparison, '{drawn}'. "
            "Set references to a folder of real pictures only.",
        )
    return [path for path in found if is_picture_file(path)]


def _write_features(path: Path, features: Tensor, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({"features": features.contiguous()}, metadata=metadata))
