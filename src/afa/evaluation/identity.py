"""Identities: all inputs of pictures and scores except prompts and sampling, as JSON.

Two models have equal identities only if they draw equal pictures, and two metrics only if they give
equal scores. Identities contain the hashes of weights, configurations, schedulers and tokenizers,
because each of them changes the pictures.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.ensemble.caching.plan import load_plan
from afa.loading.ensemble_folder import AGGREGATORS, ensemble_folder
from afa.loading.expert_source import AnySource, ExpertSource, first_folder
from afa.loading.identity import hash_descriptions, identity_of
from afa.loading.manifest import read_manifest
from afa.loading.published import hash_published, is_published
from afa.loading.saved import read_config, source_of, sources_in
from afa.loading.single_file.load import Companions, described_by
from afa.loading.sources import HUB_ERRORS, fetch, locate, locate_vae
from afa.loading.vocabulary import read_words
from afa.loading.weights import hash_files, hash_pipeline, hash_vae
from afa.machine.hashes import hash_file
from afa.provenance import releases

if TYPE_CHECKING:
    from afa.evaluation.recipe import MethodRecipe, ModelsRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.metrics import MetricRecipe


class Identities:
    """The identities of the models of a comparison or a search; hashes each file once.

    Args:
        recipe: names the experts, and the components that single files lack.
    """

    def __init__(self, recipe: ModelsRecipe | SearchRecipe) -> None:
        self._recipe = recipe
        self._known: dict[ExpertSource, list[str]] = {}
        self._companions = Companions(
            torch.float32,
            config=recipe.config,
            fallback=first_folder(recipe.experts),
            parts=recipe.parts,
        )

    def method(self, method: MethodRecipe, replica: int) -> dict[str, Any]:
        """All inputs of a method's pictures except prompts and sampling."""
        identity = self._models(method, replica)
        if acceleration := method.acceleration.describe():
            identity["acceleration"] = acceleration
        if method.plan is not None:
            identity["plan"] = load_plan(method.plan).model_dump()
        if method.sparse is not None:
            identity["sparse"] = method.sparse.model_dump()
            if method.sparse.by == "step":
                identity["sparse"]["chosen_for"] = "picture"  # once: for a batch
        if method.drafts is not None:
            drafts = method.drafts
            identity["drafts"] = drafts.model_dump(exclude={"judge"})
            identity["judge"] = [*self.source(drafts.judge), self.companions()]
            if drafts.needs_words and method.ensemble is not None:
                identity["words"] = read_words(ensemble_folder(method.ensemble[replica]))
        return identity

    def _models(self, method: MethodRecipe, replica: int) -> dict[str, Any]:
        recipe: Any = self._recipe
        if method.model is not None:
            return {"model": self.source(method.model[replica]), **self.companions()}
        if method.ensemble is not None:
            return _ensemble(ensemble_folder(method.ensemble[replica]))
        if method.fusion is not None:
            fusion = {"fusion": method.fusion.model_dump(exclude_none=True), **self.experts()}
            if method.fusion.with_base:
                fusion["base"] = self.source(recipe.base)
            return fusion
        merge = recipe.merge_recipe(method).model_dump(mode="json", exclude_none=True)
        merge.pop("experts")
        base = merge.pop("base", None)
        return {"merge": merge, "base": base and self.source(base), **self.experts()}

    def experts(self) -> dict[str, Any]:
        """The identity of all experts, for merges, fusions and searches."""
        recipe = self._recipe
        vae = None
        if recipe.vae is not None:
            path = locate_vae(recipe.vae)
            vae = [hash_vae(path), *_descriptions(path)]
        experts = [self.source(source) for source in recipe.experts]
        return {"experts": experts, "vae": vae, **self.companions()}

    def companions(self) -> dict[str, Any]:
        """The identity of components that single files lack; empty if the recipe names none."""
        recipe, identity = self._recipe, dict[str, Any]()
        if recipe.config is not None:
            identity["config"] = hash_descriptions(described_by(recipe.config))
        if recipe.parts:
            paths = [locate(part, what="Part") for part in recipe.parts]
            identity["parts"] = [[hash_pipeline(path), *_descriptions(path)] for path in paths]
        return identity

    def source(self, named: AnySource) -> list[str]:
        """The identity of one model: its weights, configuration and LoRA."""
        source = ExpertSource.of(named)
        if source not in self._known:
            self._known[source] = identity_of(source, self._companions)
        return self._known[source]


def _descriptions(path: Path) -> list[str]:
    """The hash of the configurations, if `path` is a folder."""
    return [hash_descriptions(path)] if path.is_dir() else []


def _ensemble(folder: Path) -> dict[str, Any]:
    """The identity of an ensemble's folder, which records the hashes of its experts' weights."""
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
    described += [digest for path in others for digest in _descriptions(path)]
    return {
        # a method names its own drafts
        "ensemble": {k: v for k, v in saved.items() if k not in ("judge", "drafts")},
        "aggregators": hash_file(folder / AGGREGATORS),
        "described": described,
    }


def of_metric(metric: MetricRecipe | str) -> dict[str, Any]:
    """All inputs of a metric's scores and features except the pictures and its settings.

    Contains the hashes of local weights, the commit of a hub id, or the hash of the zoo's judges.
    """
    found: dict[str, Any] = {"releases": releases("afa", "torch", "transformers", "pillow")}
    if isinstance(metric, str):
        return found | {metric: _hash_judges()}
    for name in (metric.weights, metric.processor, metric.clip):
        path = Path(name or "").expanduser()
        if name is None:
            found |= {"inception": releases("torch-fidelity")} if metric.weights is None else {}
        elif name.startswith("zoo:"):
            found[name] = _hash_judges()
        elif path.is_file():
            found[str(path)] = hash_file(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            found |= {str(file): hash_file(file) for file in files}
        elif name.count("/") == 1:
            with suppress(*HUB_ERRORS):  # opening the metric reports these
                found[name] = fetch(name, ()).name  # the commit
        else:
            found[name] = releases("torch-fidelity")
    return found


def _hash_judges() -> str:
    from afa.zoo import assets

    folder = assets()
    files = [f for part in ("judges", "shared/tokenizer") for f in (folder / part).rglob("*")]
    return hash_files(folder, sorted(file for file in files if file.is_file()))
