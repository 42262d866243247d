"""Generated emoji scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from afa.training.data.images import Stored

if TYPE_CHECKING:
    from afa.zoo.scenes import Kind
    from afa.zoo.sprites import Sprites


class SceneImages:
    """The first `num_samples` emoji scenes of a stream; see `afa.zoo.scenes.scene`."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        kind: Kind = "any",
        sprites: Sprites | None = None,
    ) -> None:
        self._num_samples, self._seed, self._kind = num_samples, seed, kind
        self._sprites = sprites

    def __repr__(self) -> str:
        return f"SceneImages({self._num_samples}, seed={self._seed}, kind={self._kind!r})"

    def __len__(self) -> int:
        return self._num_samples

    def stored(self, index: int) -> Stored:
        """The caption, which stands for the picture; it names all objects, not their places."""
        from afa.zoo.scenes import scene

        caption = scene(index, kind=self._kind, seed=self._seed).caption
        return Stored(caption.encode(), caption)

    def name(self, index: int) -> str:
        """The scene's number."""
        return f"scene {index}"

    @property
    def fingerprint(self) -> str:
        """The settings and the hash of the sprites, which determine every scene."""
        from afa.zoo.sprites import hash_sprites, load_sprites

        return f"{self!r} {hash_sprites(self._sprites or load_sprites())}"

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        from afa.zoo.scenes import scene

        shown = scene(index, kind=self._kind, seed=self._seed)
        return Image.fromarray(shown.render(self._sprites)), shown.caption
