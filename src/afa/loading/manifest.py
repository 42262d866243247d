"""`ExpertManifest`: headers, configurations and hashes of one expert, without its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import kind_of
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.facts import read_facts
from afa.loading.single_file.load import describe_expert, require_supplied
from afa.loading.single_file.packed.layout import layout_of
from afa.loading.sources import locate, refer
from afa.loading.weights import count_elements, hash_files, weight_files

if TYPE_CHECKING:
    from afa.denoisers.kinds import PipelineKind
    from afa.ensemble.references import ExpertReference
    from afa.loading.facts import Facts
    from afa.loading.single_file.load import Companions, Described


@dataclass(frozen=True, eq=False)
class ExpertManifest:
    """One located and identified expert. Its other properties are read lazily, once.

    Attributes:
        source: the expert as given by the user.
        companions: parts missing in a single file, for this expert.
        path: its folder or file.
        described: the pipeline folder that describes it, and what it predicts.
    """

    source: ExpertSource
    companions: Companions
    path: Path
    described: Described

    @property
    def config(self) -> Path:
        """The pipeline folder that describes it: its own, or found from its tensors."""
        return self.described.config

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of `model_index.json` in that folder."""
        return read_json(self.config / "model_index.json")

    @property
    def kind(self) -> PipelineKind:
        """The kind of its pipeline."""
        return kind_of(str(self.index.get("_class_name")), self.source.source)

    @cached_property
    def files(self) -> list[Path]:
        """Its weight files; see `afa.loading.weights.weight_files`."""
        return weight_files(self.path)

    @property
    def num_bytes(self) -> int:
        """The size of these files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def num_elements(self) -> Counter[str]:
        """The number of elements of each data type in these files; see `count_elements`."""
        return count_elements(self.files)

    @cached_property
    def is_quantised(self) -> bool:
        """Whether it is a single file with quantised weights, which stay so in memory."""
        return self.path.is_file() and bool(layout_of(self.path).quantised)

    @cached_property
    def sha256(self) -> str:
        """The hash of these files, see `afa.loading.weights.hash_files`."""
        return hash_files(self.path, self.files)

    @property
    def reference(self) -> ExpertReference:
        """A reference to find the same weights again, without the LoRA."""
        return refer(self.source, self.path, self.sha256)

    @cached_property
    def facts(self) -> Facts:
        """The facts that are compared with other experts; see `afa.loading.facts`."""
        return read_facts(self.source.source, self.described, path=self.path)

    def require_whole(self, *, with_autoencoder: bool) -> None:
        """Check, from headers alone, that every missing part is supplied by another file.

        Raises:
            AfaError: if the denoiser, a required text encoder or the autoencoder is missing.
        """
        if self.path.is_dir():
            return
        missing = require_supplied(self.path, self.config, self.companions)
        is_lacking = with_autoencoder and "vae" in missing
        if is_lacking and not self.companions.supplies_autoencoder(self.config):
            raise AfaError(
                "AFA-LOAD-078",
                f"'{self.source.source}' has no autoencoder; an ensemble must have one. Set vae to "
                "a folder or a file.",
            )


def read_manifest(source: AnySource, companions: Companions) -> ExpertManifest:
    """Locate and identify an expert.

    Args:
        companions: parts missing in single files, for all experts.

    Raises:
        AfaError: if it does not exist or cannot be identified; see `describe_expert`.
    """
    source = ExpertSource.of(source)
    path, own = locate(source.source, source.revision), companions.of(source)
    if (path / "model_index.json").is_file():
        # check the family first: others name their weight files differently
        kind_of(str(read_json(path / "model_index.json").get("_class_name")), source.source)
    return ExpertManifest(source, own, path, describe_expert(path, own))
