"""What a single file must have, or be supplied with, told before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.loading.asked import base_of
from afa.loading.single_file.identify import described_kind, missing_parts
from afa.loading.single_file.load import describe_expert
from afa.loading.single_file.supplied import (
    require_autoencoder,
    require_denoiser,
    require_encoders,
)
from afa.loading.weights import tensor_shapes

if TYPE_CHECKING:
    from pathlib import Path

    from afa.loading.asked import Asked
    from afa.loading.single_file.load import Companions


def require_whole(
    asked: Asked, path: Path, companions: Companions, *, with_autoencoder: bool
) -> None:
    """Refuse an expert that leaves out what nobody supplies; only headers are read.

    Args:
        asked: the expert as it was named.
        path: of its folder, which has all its parts, or of its file.
        companions: what the file may leave out.
        with_autoencoder: whether its autoencoder is to be used.

    Raises:
        AfaError: there is no denoiser, a text encoder that is needed, or an autoencoder.
    """
    if path.is_dir():
        return
    own = companions.of(asked)
    config = describe_expert(path, own).config
    kind, missing = described_kind(config), missing_parts(tensor_shapes(path), config)
    require_denoiser(path, missing, kind)
    absent = [name for name in missing if name.startswith("text_encoder")]
    if absent:
        supplied = own.supplied_encoders(config)
        require_encoders(path, kind, [name for name in absent if name not in supplied])
    if with_autoencoder and "vae" in missing:
        require_autoencoder(base_of(asked), is_there=own.supplies_autoencoder(config))
