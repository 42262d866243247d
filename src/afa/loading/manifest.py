"""What headers, configurations and hashes say of one expert, before its weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.kinds import kind_of
from afa.files import read_json
from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.facts import read_facts
from afa.loading.single_file.identify import described_kind, missing_parts
from afa.loading.single_file.load import describe_expert
from afa.loading.single_file.supplied import (
    require_autoencoder,
    require_denoiser,
    require_encoders,
)
from afa.loading.sources import locate, refer
from afa.loading.weights import count_elements, hash_files, tensor_shapes, weight_files

if TYPE_CHECKING:
    from afa.denoisers.kinds import PipelineKind
    from afa.ensemble.references import ExpertReference
    from afa.loading.facts import Facts
    from afa.loading.single_file.load import Companions, Described


@dataclass(frozen=True, eq=False)
class ExpertManifest:
    """One expert that was found and told. All else is read when it is asked for, once.

    Attributes:
        source: as it was named.
        companions: what a single file leaves out, for this expert.
        path: of its folder, or of its file.
        described: the pipeline folder that describes it, and what it predicts.
    """

    source: ExpertSource
    companions: Companions
    path: Path
    described: Described

    @property
    def config(self) -> Path:
        """The pipeline folder that describes it: its own, or what its tensors tell."""
        return self.described.config

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json` of that folder."""
        return read_json(self.config / "model_index.json")

    @property
    def kind(self) -> PipelineKind:
        """Of its pipeline."""
        return kind_of(str(self.index.get("_class_name")), self.source.source)

    @cached_property
    def files(self) -> list[Path]:
        """Those that make the expert; see `afa.loading.weights.weight_files`."""
        return weight_files(self.path)

    @property
    def num_bytes(self) -> int:
        """Of these files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def num_elements(self) -> Counter[str]:
        """How many numbers these files have of each type; see `count_elements`."""
        return count_elements(self.files)

    @cached_property
    def sha256(self) -> str:
        """Of these files, see `afa.loading.weights.hash_files`."""
        return hash_files(self.path, self.files)

    @property
    def reference(self) -> ExpertReference:
        """By which the same weights are found again; without its LoRA."""
        return refer(self.source, self.path, self.sha256)

    @cached_property
    def facts(self) -> Facts:
        """What matters of it beside others; see `afa.loading.facts`."""
        return read_facts(self.source.source, self.described, path=self.path)

    def require_whole(self, *, with_autoencoder: bool) -> None:
        """Refuse an expert that leaves out what nobody supplies; only headers are read.

        Args:
            with_autoencoder: whether its autoencoder is to be used.

        Raises:
            AfaError: there is no denoiser, a text encoder that is needed, or an autoencoder.
        """
        if self.path.is_dir():
            return
        config, companions = self.config, self.companions
        kind, missing = described_kind(config), missing_parts(tensor_shapes(self.path), config)
        require_denoiser(self.path, missing, kind)
        absent = [name for name in missing if name.startswith("text_encoder")]
        if absent:
            supplied = companions.supplied_encoders(config)
            require_encoders(self.path, kind, [name for name in absent if name not in supplied])
        if with_autoencoder and "vae" in missing:
            is_there = companions.supplies_autoencoder(config)
            require_autoencoder(self.source.source, is_there=is_there)


def read_manifest(source: AnySource, companions: Companions) -> ExpertManifest:
    """Find an expert and tell what it is.

    Args:
        source: the expert.
        companions: what single files leave out, of all experts.

    Raises:
        AfaError: nothing is there, or it cannot be told; see `describe_expert`.
    """
    source = ExpertSource.of(source)
    path, own = locate(source.source, source.revision), companions.of(source)
    if (path / "model_index.json").is_file():
        # before its weights are looked for, which other families name otherwise
        kind_of(str(read_json(path / "model_index.json").get("_class_name")), source.source)
    return ExpertManifest(source, own, path, describe_expert(path, own))
