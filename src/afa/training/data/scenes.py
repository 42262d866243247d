"""Generated emoji scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from afa.training.data.images import Stored

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from afa.zoo.scenes import HoldOut, Kind, Scene
    from afa.zoo.sprites import Sprites


class SceneImages:
    """The first `num_samples` emoji scenes of a stream, `without` some objects; see `scene`."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        kind: Kind = "any",
        without: Collection[str] = (),
        hold_out: HoldOut = "tenth",
        sprites: Sprites | None = None,
    ) -> None:
        self._num_samples, self._seed, self._kind = num_samples, seed, kind
        self._without, self._hold_out = frozenset(without), hold_out
        self._sprites = sprites

    def __repr__(self) -> str:
        others = f", without={sorted(self._without)}" if self._without else ""
        if self._hold_out != "tenth":
            others += f", hold_out={self._hold_out!r}"
        return f"SceneImages({self._num_samples}, seed={self._seed}, kind={self._kind!r}{others})"

    def _scene(self, index: int) -> Scene:
        from afa.zoo.scenes import scene

        return scene(
            index,
            kind=self._kind,
            seed=self._seed,
            without=self._without,
            hold_out=self._hold_out,
        )

    def __len__(self) -> int:
        return self._num_samples

    def stored(self, index: int) -> Stored:
        """The caption, which stands for the picture; it names all objects, not their places."""
        caption = self._scene(index).caption
        return Stored(caption.encode(), caption)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """See `afa.training.data.images.captions_in`."""
        return ((self._scene(index).caption,) for index in range(self._num_samples))

    @property
    def source(self) -> str:
        """What is shown, for the user."""
        return "generated scenes"

    def name(self, index: int) -> str:
        """The scene's number."""
        return f"scene {index}"

    @property
    def fingerprint(self) -> str:
        """The settings and the hash of the sprites, which determine every scene."""
        from afa.zoo.sprites import hash_sprites, load_sprites

        return f"{self!r} {hash_sprites(self._sprites or load_sprites())}"

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        shown = self._scene(index)
        return Image.fromarray(shown.render(self._sprites)), shown.caption
