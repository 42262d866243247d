"""Emoji scenes: two objects side by side on a plain background, with exact ground truth.

Scenes are generated on demand: `scene(index)` is a pure function of the seed and the index. So a
data set is endless, needs no disk space and is reproducible. A tenth of all *mixed* pairs (objects
of two domains) is held out of every training set; test prompts come only from these pairs. Worlds
of the study hold out a fifth, in sets of their own; see `pair_set`.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from afa.errors import AfaError
from afa.zoo.sprites import DOMAIN_OF, OBJECTS, SPRITE_SIZE, Sprites, load_sprites

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

IMAGE_SIZE = 64  # pixels, both sides
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (160, 164, 170),
    "blue": (150, 196, 250),
    "green": (160, 222, 160),
    "pink": (250, 190, 212),
    "black": (44, 46, 56),
}
_CENTRES = (16, 48)  # columns of the centres of the left and the right sprite
_JITTER = (2, 8)  # maximum offset from the centre in pixels, (x, y)

#: the pairs of objects in a stream of scenes: of one domain, any, or of two different domains
Kind = Literal["animals", "food", "things", "any", "mixed"]
#: which mixed pairs a stream of scenes leaves out, or consists of
HoldOut = Literal["tenth", "fifth"]
#: what a pair of objects is used for
PairSet = Literal["training", "tuning", "development", "test"]
#: of 256, by the first byte of a pair's hash: up to where a set reaches
_ENDS: dict[PairSet, int] = {"tuning": 13, "development": 26, "test": 52, "training": 256}


@dataclass(frozen=True)
class Scene:
    """The content of a picture; `offsets` are (x, y) in pixels from the centre of each half."""

    left: str
    right: str
    background: str
    offsets: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def caption(self) -> str:
        """The prompt that describes this scene, exactly."""
        return caption_of(self.left, self.right, self.background)

    @property
    def is_mixed(self) -> bool:
        """Whether the two objects are of different domains."""
        return DOMAIN_OF[self.left] != DOMAIN_OF[self.right]

    def render(self, sprites: Sprites | None = None) -> NDArray[np.uint8]:
        """Draw the scene, RGB [64, 64, 3]; None uses the bundled sprites."""
        sprites = sprites or load_sprites()
        picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
        picture[:] = np.asarray(BACKGROUNDS[self.background], dtype=np.float32) / 255.0
        half = SPRITE_SIZE // 2
        for name, centre, (x, y) in zip(
            (self.left, self.right), _CENTRES, self.offsets, strict=True
        ):
            sprite = sprites[name]
            top, start = IMAGE_SIZE // 2 + y - half, centre + x - half
            window = picture[top : top + SPRITE_SIZE, start : start + SPRITE_SIZE]
            alpha = sprite[..., 3:]
            window[:] = window * (1 - alpha) + sprite[..., :3] * alpha
        return np.round(picture * 255.0).astype(np.uint8)


def caption_of(left: str, right: str, background: str) -> str:
    """The caption of a scene with these two objects, or with their categories."""
    return (
        f"{_with_article(left)} on the left and {_with_article(right)} on the right, "
        f"{background} background"
    )


def parse_caption(caption: str) -> Scene:
    """Parse a caption into its scene, with zero offsets.

    Raises:
        AfaError: if the caption is not in the form of `Scene.caption`.
    """
    words = caption.replace(",", "").split()
    try:
        scene = Scene(left=words[1], right=words[7], background=words[-2])
        if scene.caption == caption:
            return scene
    except (IndexError, KeyError):
        pass
    raise AfaError(
        "AFA-ZOO-004",
        f"'{caption}' is not a caption of a scene. Write it like 'a fox on the left and a pizza on "
        f"the right, blue background'. Objects: {', '.join(OBJECTS)}; backgrounds: "
        f"{', '.join(BACKGROUNDS)}.",
    )


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@cache
def pair_set(left: str, right: str) -> PairSet:
    """The set of a pair of objects, in either order, chosen by a hash; pairs of one domain train.

    Settings are chosen on the pairs for tuning and development, which are a tenth of the mixed
    pairs; another tenth is only for the test of the study. The bundled zoo was trained on the
    latter.
    """
    if DOMAIN_OF[left] == DOMAIN_OF[right]:
        return "training"
    byte = hashlib.sha256("+".join(sorted((left, right))).encode()).digest()[0]
    return next(name for name, end in _ENDS.items() if byte < end)


def is_held_out(left: str, right: str, hold_out: HoldOut = "tenth") -> bool:
    """Whether a pair of objects, in either order, is held out of every training set.

    Args:
        left: an object.
        right: the other object.
        hold_out: a tenth of the mixed pairs, as in the bundled zoo; or a fifth, with the test pairs
            of the study.
    """
    own = pair_set(left, right)
    return own in ("tuning", "development") or (own == "test" and hold_out == "fifth")


def is_judged_early(left: str, right: str) -> bool:
    """Whether a pair of objects, in either order, may be judged before the test of the study.

    Half of all pairs, by a hash, are judged while methods are developed (`benchmarks.unseen`). The
    study tests none of them, whatever it tests: pairs of two domains, of one, or of objects that
    only one expert knows.
    """
    if pair_set(left, right) == "test":
        return False
    key = f"development {'+'.join(sorted((left, right)))}"
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 0


@cache
def _pairs(
    kind: Kind,
    held_out: bool,
    without: frozenset[str] = frozenset(),
    hold_out: HoldOut = "tenth",
) -> tuple[tuple[str, str], ...]:
    """All ordered pairs of different objects of a kind."""

    def belongs(left: str, right: str) -> bool:
        if left == right or {left, right} & without:
            return False
        if is_held_out(left, right, hold_out) != held_out:
            return False
        domains = {DOMAIN_OF[left], DOMAIN_OF[right]}
        return kind == "any" or (len(domains) == 2 if kind == "mixed" else domains == {kind})

    return tuple((a, b) for a in OBJECTS for b in OBJECTS if belongs(a, b))


def scene(
    index: int,
    *,
    kind: Kind = "any",
    seed: int = 0,
    held_out: bool = False,
    without: frozenset[str] = frozenset(),
    hold_out: HoldOut = "tenth",
) -> Scene:
    """Return one scene of the endless stream of a kind and a seed; a pure function.

    Args:
        index: the position in the stream, from 0.
        kind: the pairs of objects to choose from.
        seed: the seed of the stream.
        held_out: choose only pairs that are held out of every training set; they are mixed.
        without: objects that are not shown.
        hold_out: see `is_held_out`.

    Raises:
        AfaError: if the kind is unknown or has no such pairs, or an object is unknown.
    """
    if kind not in get_args(Kind):
        raise AfaError(
            "AFA-ZOO-005", f"kind must be one of {', '.join(get_args(Kind))}; got '{kind}'."
        )
    if unknown := without - set(OBJECTS):
        raise AfaError(
            "AFA-ZOO-013",
            f"The scenes have no object '{min(unknown)}'. Use some of {', '.join(OBJECTS)}.",
        )
    pairs = _pairs(kind, held_out, without, hold_out)
    if not pairs and without:
        raise AfaError(
            "AFA-ZOO-014",
            f"kind '{kind}' has no pair of objects left. Leave out fewer than {len(without)} "
            "objects.",
        )
    if not pairs:
        raise AfaError(
            "AFA-ZOO-006",
            f"kind '{kind}' has no held-out pairs, which are all mixed. Use kind='mixed'.",
        )
    rng = np.random.default_rng([seed, index, get_args(Kind).index(kind), int(held_out)])
    return placed(pairs, rng)


def placed(pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> Scene:
    """Return a scene of one of some pairs, with a background and offsets, all at random."""
    left, right = pairs[int(rng.integers(len(pairs)))]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    x, y = _JITTER
    offsets = [(int(rng.integers(-x, x + 1)), int(rng.integers(-y, y + 1))) for _ in range(2)]
    return Scene(left, right, background, (offsets[0], offsets[1]))


def scenes(
    num_scenes: int, *, kind: Kind = "any", seed: int = 0, held_out: bool = False
) -> Iterator[Scene]:
    """The first `num_scenes` scenes of a stream; see `scene`."""
    return (scene(i, kind=kind, seed=seed, held_out=held_out) for i in range(num_scenes))


def evaluation_prompts(
    num_prompts: int, *, kind: Kind = "mixed", seed: int = 1_000_000, held_out: bool = True
) -> list[str]:
    """Distinct captions for a test, of held-out pairs if the kind has them.

    Args:
        num_prompts: the number of captions.
        kind: the pairs of objects to choose from.
        seed: see `scene`.
        held_out: false uses pairs that may be in training sets, for tuning.

    Raises:
        AfaError: if there are fewer distinct captions, or the number is negative.
    """
    if num_prompts < 0:
        raise AfaError(
            "AFA-ZOO-007", f"The number of prompts must not be negative; got {num_prompts}."
        )
    held_out = held_out and kind in ("mixed", "any")
    num_captions = len(_pairs(kind, held_out)) * len(BACKGROUNDS)
    if num_prompts > num_captions:
        raise AfaError(
            "AFA-ZOO-008",
            f"Got {num_prompts} as the number of '{kind}' prompts, but only {num_captions} "
            "distinct ones exist. Use a smaller number.",
        )
    captions: dict[str, None] = {}
    for index in itertools.count():
        if len(captions) == num_prompts:
            break
        captions.setdefault(scene(index, kind=kind, seed=seed, held_out=held_out).caption)
    return list(captions)
