"""What pictures and scores depend on besides prompts and sampling, as JSON.

Two states of a model, or of a metric's weights, have equal identities only if they draw, or score,
alike: weights are told by their hashes, and so are configurations, schedulers and tokenizers, since
equal weights draw other pictures with another of them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.ensemble.caching.plan import load_plan
from afa.loading.ensemble_folder import AGGREGATORS, ensemble_folder
from afa.loading.expert_source import AnySource, ExpertSource, first_folder
from afa.loading.lora import hash_lora
from afa.loading.manifest import read_manifest
from afa.loading.published import hash_published, is_published
from afa.loading.saved import read_config, source_of, sources_in
from afa.loading.single_file.load import Companions, described_by
from afa.loading.sources import HUB_ERRORS, fetch, locate, locate_vae
from afa.loading.weights import hash_files, hash_pipeline, hash_vae
from afa.machine.hashes import hash_file
from afa.provenance import releases

if TYPE_CHECKING:
    from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.metrics import MetricRecipe

#: files of a pipeline's folder besides weights: configurations and vocabularies
_DESCRIPTIONS = frozenset({".json", ".txt", ".model"})
_TOP = ("model_index.json", "model_config.json", "config.json")


class Identities:
    """The identities of a comparison's or a search's models; each file is hashed once.

    Args:
        recipe: with the experts, and what single files leave out.
    """

    def __init__(self, recipe: EvaluateRecipe | SearchRecipe) -> None:
        self._recipe = recipe
        self._known: dict[ExpertSource, list[str]] = {}
        self._companions = Companions(
            torch.float32,
            config=recipe.config,
            fallback=first_folder(recipe.experts),
            parts=recipe.parts,
        )

    def method(self, method: MethodRecipe, replica: int) -> dict[str, Any]:
        """All that a method's pictures depend on besides prompts and sampling."""
        identity = self._way(method, replica)
        left_out = method.acceleration.describe()
        if left_out:
            identity["acceleration"] = left_out
        if method.plan is not None:
            identity["plan"] = load_plan(method.plan).model_dump()
        return identity

    def _way(self, method: MethodRecipe, replica: int) -> dict[str, Any]:
        recipe: Any = self._recipe
        if method.model is not None:
            return {"model": self.source(method.model[replica]), **self.companions()}
        if method.ensemble is not None:
            return _ensemble(ensemble_folder(method.ensemble[replica]))
        if method.fusion is not None:
            return {"fusion": method.fusion.model_dump(exclude_none=True), **self.experts()}
        merge = recipe.merge_recipe(method).model_dump(mode="json", exclude_none=True)
        merge.pop("experts")
        base = merge.pop("base", None)
        return {"merge": merge, "base": base and self.source(base), **self.experts()}

    def experts(self) -> dict[str, Any]:
        """Of all experts together, as merges, fusions and searches take them."""
        recipe = self._recipe
        vae = None
        if recipe.vae is not None:
            path = locate_vae(recipe.vae)
            vae = [hash_vae(path), *([hash_descriptions(path)] if path.is_dir() else [])]
        experts = [self.source(source) for source in recipe.experts]
        return {"experts": experts, "vae": vae, **self.companions()}

    def companions(self) -> dict[str, Any]:
        """What single files leave out; empty where nothing is named."""
        recipe, identity = self._recipe, dict[str, Any]()
        if recipe.config is not None:
            identity["config"] = hash_descriptions(described_by(recipe.config))
        if recipe.parts:
            identity["parts"] = [self._hashes(part) for part in recipe.parts]
        return identity

    def source(self, named: AnySource) -> list[str]:
        """Of one model: its weights, its LoRA, and the configuration that describes it."""
        source = ExpertSource.of(named)
        if source not in self._known:
            manifest = read_manifest(source, self._companions)
            prediction = manifest.described.prediction
            found = [hash_pipeline(manifest.path), hash_descriptions(manifest.config)]
            if prediction is not None and prediction.scheduler is not None:
                found.append(f"scheduler with {dict(prediction.scheduler)}")
            if source.lora is not None:
                found.append(f"{source.scale!r} x {hash_lora(Path(source.lora))}")
            self._known[source] = found
        return self._known[source]

    def _hashes(self, part: str) -> list[str]:
        path = locate(part, what="Part")
        return [hash_pipeline(path), *([hash_descriptions(path)] if path.is_dir() else [])]


def hash_descriptions(folder: Path) -> str:
    """SHA-256 of all files of a pipeline's or a part's folder that are no weights."""
    files = [folder / name for name in _TOP]
    files += [file for file in folder.glob("*/*") if file.suffix in _DESCRIPTIONS]
    chosen = sorted(f for f in files if f.is_file() and not f.name.endswith(".index.json"))
    return hash_files(folder, chosen)


def _ensemble(folder: Path) -> dict[str, Any]:
    """Of an ensemble's folder, which names its experts by the hashes of their weights."""
    if is_published(folder):
        return {"published": hash_published(folder), "described": hash_descriptions(folder)}
    saved = read_config(folder)

    experts, config, parts = sources_in(saved, folder)
    paths = [locate(expert.source, expert.revision) for expert in experts]
    companions = Companions(
        torch.float32,
        config=config,
        fallback=next((path for path in paths if path.is_dir()), None),
    )
    described = [hash_descriptions(read_manifest(expert, companions).config) for expert in experts]
    others = [locate(part.source, part.revision, what="Part") for part in parts]
    if saved["vae"] is not None:
        vae = source_of(saved["vae"], folder)
        others.insert(0, locate_vae(vae.source, vae.revision))
    described += [hash_descriptions(place) for place in others if place.is_dir()]
    return {
        "ensemble": saved,
        "aggregators": hash_file(folder / AGGREGATORS),
        "described": described,
    }


def of_metric(metric: MetricRecipe | str) -> dict[str, Any]:
    """All that a metric's scores and features of given pictures depend on besides its settings.

    Of local weights the hashes of all files, of a hub id the commit, of the zoo's judges the
    shipped files.
    """
    found: dict[str, Any] = {"releases": releases("afa", "torch", "transformers", "pillow")}
    if isinstance(metric, str):
        return found | {metric: _hash_judges()}
    for name in (metric.weights, metric.processor, metric.clip):
        place = Path(name or "").expanduser()
        if name is None:
            found |= {"inception": releases("torch-fidelity")} if metric.weights is None else {}
        elif name.startswith("zoo:"):
            found[name] = _hash_judges()
        elif place.is_file():
            found[str(place)] = hash_file(place)
        elif place.is_dir():
            files = sorted(file for file in place.rglob("*") if file.is_file())
            found |= {str(file): hash_file(file) for file in files}
        elif name.count("/") == 1:
            with suppress(*HUB_ERRORS):  # whoever opens the metric says so
                found[name] = fetch(name, ()).name  # the commit
        else:
            found[name] = releases("torch-fidelity")
    return found


def _hash_judges() -> str:
    from afa.zoo import assets

    shipped = assets()
    files = [f for part in ("judges", "shared/tokenizer") for f in (shipped / part).rglob("*")]
    return hash_files(shipped, sorted(file for file in files if file.is_file()))
