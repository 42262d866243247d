"""The web UIs' presets of block weights.

Values: bbc-mc/sdweb-merge-block-weighted-gui, csv/preset.tsv, and
hako-mikan/sd-webui-supermerger, scripts/mbwpresets.txt. Each has 26 weights of the second model:
base alpha for all parts except the U-Net, then IN00..IN11, M00, OUT00..OUT11. Presets that those
files list with 15 digits are functions of the block's relative position x in 0..1, computed here.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NUM_BLOCKS = 25
Weights = tuple[float, ...]


def _curve(function: Callable[[float], float]) -> Weights:
    return tuple(function(block / (NUM_BLOCKS - 1)) for block in range(NUM_BLOCKS))


def _steps(*runs: tuple[float, int]) -> Weights:
    """Runs of equal weights, starting at IN00: (weight, number of blocks)."""
    return tuple(weight for weight, length in runs for _ in range(length))


def _reverse(weights: Weights) -> Weights:
    return tuple(1 - weight for weight in weights)


def _smoothstep(x: float) -> float:
    return x * x * (3 - 2 * x)


def _fold(x: float) -> float:
    """The triangle wave between 0 and 1 with period 2."""
    return 1 - abs(x % 2 - 1)


def _folded(times: int, *, inside: bool) -> Weights:
    """A smoothstep with a triangle wave applied to its argument, or to its value."""
    if inside:
        return _curve(lambda x: _smoothstep(_fold(times * x)))
    return _curve(lambda x: _fold(times * _smoothstep(x)))


def _wrap(num_ends: int) -> Weights:
    return _steps((1, num_ends), (0, NUM_BLOCKS - 2 * num_ends), (1, num_ends))


def _cubic_hermite(x: float) -> float:
    return ((19 / 3 * x - 9.5) * x + 25 / 6) * x


def _true_cubic_hermite(x: float) -> float:
    # the published values start at 0, although the polynomial is 1/24 there
    return ((77 / 12 * x - 9.625) * x + 25 / 6) * x + (1 / 24 if x > 0 else 0)


_CURVES = {
    "SMOOTHSTEP": _curve(_smoothstep),
    **{f"SMOOTHSTEP*{n}": _folded(n, inside=False) for n in (2, 3, 4)},
    **{f"SMOOTHSTEP/{n}": _folded(n, inside=True) for n in (2, 3, 4)},
}
_BLOCKS: dict[str, Weights] = {
    "GRAD_V": _curve(lambda x: abs(1 - 2 * x)),
    "GRAD_A": _curve(lambda x: 1 - abs(1 - 2 * x)),
    "FLAT_25": _steps((0.25, 25)),
    "FLAT_75": _steps((0.75, 25)),
    "WRAP08": _wrap(4),
    "WRAP12": _wrap(6),
    "WRAP14": _wrap(7),
    "WRAP16": _wrap(8),
    "MID12_50": _steps((0, 5), (0.5, 14), (0, 6)),
    "OUT07": _steps((0, 18), (1, 7)),
    "OUT12": _steps((0, 13), (1, 12)),
    "OUT12_5": _steps((0, 12), (0.5, 1), (1, 12)),
    "RING08_SOFT": _steps(
        (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5), (0.5, 1), (1, 3), (0.5, 1), (0, 5)
    ),
    "RING08_5": _steps((0, 6), (1, 4), (0, 5), (1, 4), (0, 6)),
    "RING10_5": _steps((0, 5), (1, 5), (0, 5), (1, 5), (0, 5)),
    "RING10_3": _steps((0, 6), (1, 5), (0, 3), (1, 5), (0, 6)),
    **_CURVES,
    "REVERSE-SMOOTHSTEP": _reverse(_CURVES["SMOOTHSTEP"]),
    **{f"R_{n}": _reverse(weights) for n, weights in _CURVES.items() if n != "SMOOTHSTEP"},
    "COSINE": _curve(lambda x: (1 + math.cos(math.pi * x)) / 2),
    "REVERSE_COSINE": _curve(lambda x: (1 - math.cos(math.pi * x)) / 2),
    "TRUE_CUBIC_HERMITE": _curve(_true_cubic_hermite),
    "TRUE_REVERSE_CUBIC_HERMITE": _reverse(_curve(_true_cubic_hermite)),
    "FAKE_CUBIC_HERMITE": _curve(_cubic_hermite),
    "FAKE_REVERSE_CUBIC_HERMITE": _reverse(_curve(_cubic_hermite)),
    "ALL_A": _steps((0, 25)),
    "ALL_B": _steps((1, 25)),
}
#: name -> 26 weights of the second model
PRESETS: dict[str, Weights] = {
    name: (1 if name == "ALL_B" else 0, *weights) for name, weights in _BLOCKS.items()
}


def read_preset(given: str | Sequence[float]) -> Weights:
    """Read 26 weights from a preset's name, a comma-separated text, or numbers.

    Raises:
        AfaError: if the preset is unknown, or there are not 26 finite numbers.
    """
    name = given.strip().upper() if isinstance(given, str) else ""
    if name in PRESETS:
        return PRESETS[name]
    try:
        numbers = tuple(map(float, given.split(",") if isinstance(given, str) else given))
    except ValueError:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known presets: {', '.join(PRESETS)}."
        raise AfaError(
            "AFA-MERGE-030", f"Unknown preset of block weights '{given[:60]}'. {hint}"
        ) from None
    if len(numbers) != NUM_BLOCKS + 1 or not all(map(math.isfinite, numbers)):
        raise AfaError(
            "AFA-MERGE-031",
            f"Block weights must be {NUM_BLOCKS + 1} finite numbers; got {len(numbers)}. The order "
            "is base alpha (all parts except the U-Net), IN00..IN11, M00, OUT00..OUT11. If only "
            "base alpha is missing, put it first.",
        )
    return numbers
