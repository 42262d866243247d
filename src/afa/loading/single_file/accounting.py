"""Is every tensor of a single file used? From its header alone, before anything is loaded.

The conversion to the library's names runs once on tensors without data that remember which tensors
of the file they were made from. What comes out must be the parameters of the model; what went into
none of them must be known to be harmless.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import kind_of
from afa.errors import NO_MODEL, AfaError
from afa.files import parts_of, read_json
from afa.loading.single_file.conversion import PROJECTION, converted, expected_shapes
from afa.loading.single_file.layout import (
    denoiser_in,
    harmless,
    layout_of,
    names_by_part,
    readable_kinds,
)
from afa.machine.damaged import is_own_bug

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from afa.denoisers import PipelineKind
    from afa.loading.weights import Shapes

#: layers of SD 2's text encoder that its pipeline does not use
_UNUSED_LAYER = "cond_stage_model.model.transformer.resblocks.23."
_LEFT_OUT = "part that is not asked for"


class Traced(torch.Tensor):
    """A tensor without data that remembers the names of those that it was made from."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> Traced:
        """A tensor of a file."""
        tensor = torch.empty(shape, device="meta").as_subclass(cls)
        tensor.sources = frozenset([name])
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; its results come from all that it was given."""
        del types
        result = super().__torch_function__(func, (cls,), args, kwargs or {})
        given = [*args, *(kwargs or {}).values()]
        inputs = [v for a in given for v in (a if isinstance(a, (list, tuple)) else [a])]
        sources = frozenset().union(*(v.sources for v in inputs if isinstance(v, Traced)))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, Traced):
                each.sources = sources
        return result


def account(
    shapes: Shapes,
    config: Path,
    source: object,
    *,
    parts: Collection[str] | None = None,
    own_vae: bool = True,
) -> dict[str, int]:
    """Account for every tensor of a single file.

    Args:
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
        source: the file, for the errors.
        parts: that are to be read from it, and are looked at; None looks at the whole file.
        own_vae: whether its autoencoder is to be used.

    Returns: how many tensors are not used, by the reason why they need not be.

    Raises:
        AfaError: tensors that nothing uses and that are not known to be harmless, parameters that
            the file lacks, or other shapes. Names the first of each.
    """
    index = read_json(config / "model_index.json")
    kind = kind_of(str(index.get("_class_name")), config)
    layout_of(kind, source)
    named, denoiser = parts_of(index), denoiser_in(shapes)
    unused: Counter[str] = Counter()
    for part, names in names_by_part(shapes, kind).items():
        if parts is not None and part not in parts:
            continue
        if part not in named or (part == "vae" and not own_vae):
            _count_unused(unused, names.values(), source, left_out=bool(part))
            continue
        is_diffusers = part == kind.denoiser and denoiser is not None and denoiser.is_diffusers
        free = account_part(part, names, shapes, config, source, is_diffusers=is_diffusers)
        _count_unused(unused, free, source, encoder=part.startswith("text_encoder"))
    return dict(unused)


def account_part(
    part: str,
    names: Mapping[str, str],
    shapes: Shapes,
    config: Path,
    source: object,
    *,
    is_diffusers: bool = False,
) -> list[str]:
    """Account for the tensors of one part.

    Args:
        part: by its name in the pipeline.
        names: name without the part's prefix -> name in the file.
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
        source: the file, for the errors.
        is_diffusers: whether a denoiser's names are those of diffusers already.

    Returns: the names in the file of tensors that are not used and need not be.

    Raises:
        AfaError: see `account`.
    """
    given = {rest: Traced.of(name, shapes[name]) for rest, name in names.items()}
    try:
        state = converted(part, given, config, is_diffusers=is_diffusers)
    except AfaError:
        raise
    except NO_MODEL as error:
        if is_own_bug(error):
            raise
        lacks = (
            f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else "blocks are missing"
        )
        raise _misfit(source, config, part, lacks) from error
    kind = kind_of(str(read_json(config / "model_index.json").get("_class_name")), config)
    return _fit(kind, part, state, names.values(), config, source)


def _fit(
    kind: PipelineKind,
    part: str,
    state: Mapping[str, Any],
    names: Iterable[str],
    config: Path,
    source: object,
) -> list[str]:
    """Compare what a part was converted to with what its configuration says.

    Returns: the file's tensors that went into no parameter.
    """
    expected = expected_shapes(part, config)
    if part.startswith("text_encoder"):
        # transformers has dropped `text_model.` from some classes, and adds it by itself
        expected = {name.removeprefix("text_model."): shape for name, shape in expected.items()}
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    used = {name for key, t in state.items() if key in expected for name in _sources(t)}
    missing = [name for name in expected if name not in state and not _is_implied(name, expected)]
    free = [name for name in names if name not in used]
    strange = [name for name in free if not _is_harmless(name, part.startswith("text_encoder"))]
    wrong = [
        f"'{min(_sources(state[name]), default=name)}' gives {name} the shape "
        f"{tuple(state[name].shape)} where {shape} is needed"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or strange or wrong:
        said = _block_counts(kind, state, expected, config) if part == kind.denoiser else []
        if not (said or strange or wrong):
            raise AfaError(
                "AFA-LOAD-064",
                f"'{source}' must be complete; of its {part}, '{config.name}' has {len(missing)} "
                f"parameters that are missing in the file (first: '{min(missing)}'). Download or "
                "save it again; a different model must be described by a diffusers folder of its "
                "own: config=FOLDER.",
            )
        if strange:
            said.append(f"tensors that fit no layer: {len(strange)} (first: '{min(strange)}')")
        if missing:
            said.append(f"missing parameters: {len(missing)} (first: '{min(missing)}')")
        raise _misfit(source, config, part, "; ".join([*said, *wrong[:1]]))
    return free


def _misfit(source: object, config: Path, part: str, said: str) -> AfaError:
    """The error of a part that is not as the configuration says."""
    remedy = (
        "It may be a pruned or a different model (such as SSD-1B, Segmind-Vega, Koala or Flux with "
        "8 double blocks). Describe it by a diffusers folder of the same model: config=FOLDER."
    )
    if part == "vae":
        remedy = "Name another autoencoder: vae=FOLDER or FILE."
    elif part.startswith("text_encoder"):
        remedy = "Describe the file by a diffusers folder of the same model: config=FOLDER."
    return AfaError(
        "AFA-LOAD-065",
        f"'{source}' does not fit the configuration '{config.name}': of its {part}, {said}. Every "
        f"tensor of a file must be used. {remedy}",
    )


def _sources(tensor: Any) -> frozenset[str]:
    return getattr(tensor, "sources", frozenset())


def _is_implied(name: str, expected: Shapes) -> bool:
    """Whether files may leave a parameter out, since others give it."""
    shape = expected[name]
    is_square = len(shape) == 2 and shape[0] == shape[1]
    return name == "encoder.embed_tokens.weight" or (name == PROJECTION and is_square)


def _is_harmless(name: str, is_encoder: bool) -> bool:
    return harmless(name) is not None or (is_encoder and _unused_encoder(name) is not None)


def _unused_encoder(name: str) -> str | None:
    """Why a text encoder's tensor is not used; None where it should be."""
    if name.startswith(_UNUSED_LAYER):
        return "last layer of the text encoder, which Stable Diffusion 2 skips"
    if name.endswith(("text_projection", PROJECTION)):
        return "projection that this text encoder has no use for"
    if name.endswith("encoder.embed_tokens.weight"):
        return "second copy of T5's embedding"
    return None


def _count_unused(
    unused: Counter[str],
    names: Iterable[str],
    source: object,
    *,
    encoder: bool = False,
    left_out: bool = False,
) -> None:
    for name in names:
        why = harmless(name) or (_unused_encoder(name) if encoder else None)
        if why is None and left_out:
            why = _LEFT_OUT
        if why is None:
            raise AfaError(
                "AFA-LOAD-066",
                f"Every tensor of a file must be used; '{name}' in '{source}' belongs to no part "
                f"of a model that is read from single files ({readable_kinds()}). Use the model "
                "without this addition, or save it as a diffusers folder.",
            )
        unused[why] += 1


def _block_counts(
    kind: PipelineKind, state: Iterable[str], expected: Shapes, config: Path
) -> list[str]:
    """Where two denoisers have other numbers of blocks, as a part of a sentence."""
    said = []
    for block, words in layout_of(kind, config).blocks.items():
        pattern = re.compile(rf"({block})\.")
        came, wanted = (
            len({match[1] for name in names if (match := pattern.match(name))})
            for names in (state, expected)
        )
        if came != wanted:
            said.append(f"it has {came} {words}, '{config.name}' has {wanted}")
    return said
