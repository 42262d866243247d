"""Pictures that another program drew, as a method of a comparison."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from afa.errors import AfaError
from afa.evaluation.cost import Cost
from afa.evaluation.work import write_json
from afa.files import read_json, write_png
from afa.machine.hashes import hash_file
from afa.reading import read_picture
from afa.recipe import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from afa.evaluation.work import Store, Unit

#: file beside given pictures with what one of them costs
COSTS = "costs.json"


class GivenCosts(Section):
    """What one picture costs, measured by whoever drew it; None is unknown.

    Attributes:
        expert_calls: evaluations of one expert's denoiser on one latent.
        seconds: the time.
        peak_memory_mib: the peak of the memory.
    """

    expert_calls: float | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0)
    peak_memory_mib: float | None = Field(default=None, ge=0)


def picture_files(
    folder: Path, places: Sequence[int], seeds: Sequence[int]
) -> dict[tuple[int, int], Path]:
    """The files of given pictures, by seed and index of the prompt.

    `000012.png` is the picture of prompt 12, counted from 0 in the order of the comparison. Those
    of seed S are in a folder `seed-S`, which is not necessary if there is only one seed.

    Args:
        folder: of the pictures.
        places: the indices of the prompts.
        seeds: of the comparison.

    Raises:
        AfaError: if a picture is missing; names the first one.
    """
    found = {}
    for seed in seeds:
        place = folder / f"seed-{seed}"
        if len(seeds) == 1 and not place.is_dir():
            place = folder
        for number in places:
            file = place / f"{number:06d}.png"
            if not file.is_file():
                raise AfaError(
                    "AFA-EVAL-032",
                    f"The picture '{file}' is missing. A method with pictures must have one for "
                    "each prompt: 000000.png for the first one"
                    + (", in a folder seed-S for each seed." if len(seeds) > 1 else "."),
                )
            found[seed, number] = file
    return found


def given_costs(folder: Path) -> GivenCosts:
    """The costs beside given pictures.

    Raises:
        AfaError: if they are not as `GivenCosts`.
    """
    path = folder / COSTS
    if not path.is_file():
        return GivenCosts()
    try:
        return GivenCosts.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise AfaError(
            "AFA-EVAL-033",
            f"'{path}' must have numbers of expert_calls, seconds and peak_memory_mib, each for "
            f"one picture: '{'.'.join(map(str, first['loc']))}': {first['msg']}. Correct it.",
        ) from None


def identities_of_pictures(
    folder: Path, places: Sequence[int], seeds: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """The hashes of given pictures and their costs, by seed."""
    files = picture_files(folder, places, seeds)
    costs = given_costs(folder).model_dump()
    return {
        seed: {
            "pictures": [hash_file(file) for (own, _), file in files.items() if own == seed],
            "costs": costs,
        }
        for seed in seeds
    }


def take_unit(folder: Path, unit: Unit, seeds: Sequence[int], store: Store) -> None:
    """Copy a batch of given pictures into a comparison, as RGB without transparency."""
    costs = given_costs(folder)
    for (_, place), file in _of(unit, picture_files(folder, unit.places, seeds)):
        target = store.picture(unit, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, read_picture(file))
    count, memory = len(unit.places), costs.peak_memory_mib
    cost = Cost(
        None if costs.seconds is None else costs.seconds * count,
        None if memory is None else round(memory * 2**20),
        None if costs.expert_calls is None else costs.expert_calls * count,
    )
    write_json(store.cost(unit), asdict(cost))


def _of(unit: Unit, files: dict[tuple[int, int], Path]) -> Iterator[tuple[tuple[int, int], Path]]:
    return ((key, file) for key, file in files.items() if key[0] == unit.seed)
