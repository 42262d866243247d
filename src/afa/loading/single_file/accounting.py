"""Check from a single file's header that every tensor is used, before anything is loaded.

The conversion to the library's names runs once on tensors without data that record the tensors of
the file from which they are made. The result must be the parameters of the model. Tensors that are
in none of them must be known to have no effect.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import NO_MODEL, AfaError
from afa.files import parts_of, read_json
from afa.loading.single_file.conversion import PROJECTION, converted, expected_shapes
from afa.loading.single_file.layout import (
    denoiser_in,
    described_kind,
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
_LEFT_OUT = "part that is not requested"


class Traced(torch.Tensor):
    """A tensor without data that records the names of the tensors from which it was made."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> Traced:
        """Create a tensor of a file."""
        tensor = torch.empty(shape, device="meta").as_subclass(cls)
        tensor.sources = frozenset([name])
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; the sources of its results are those of all its inputs."""
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
        config: the pipeline folder that describes it.
        parts: the parts to check; None checks the complete file.
        own_vae: whether its autoencoder is used.

    Returns: the number of unused tensors, by the reason why they have no effect.

    Raises:
        AfaError: if there are unused tensors not known to have no effect, missing parameters, or
            other shapes; names the first of each.
    """
    kind = described_kind(config)
    layout_of(kind, source)
    named, denoiser = parts_of(read_json(config / "model_index.json")), denoiser_in(shapes)
    unused: Counter[str] = Counter()
    for part, names in names_by_part(shapes, kind).items():
        if parts is not None and part not in parts:
            continue
        if part not in named or (part == "vae" and not own_vae):
            for name in names.values():
                why = harmless(name) or (part and _LEFT_OUT)
                if not why:
                    raise AfaError(
                        "AFA-LOAD-066",
                        f"'{name}' in '{source}' belongs to no part of the supported models "
                        f"({readable_kinds()}); every tensor of a file must be used. Use the model "
                        "without this addition, or save it as a diffusers folder.",
                    )
                unused[why] += 1
            continue
        is_diffusers = part == kind.denoiser and denoiser is not None and denoiser.is_diffusers
        unused.update(account_part(part, names, shapes, config, source, is_diffusers=is_diffusers))
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
        names: name without the part's prefix -> name in the file.
        is_diffusers: whether a denoiser already has diffusers' names.

    Returns: why each unused tensor has no effect.

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
        missing = f"'{error.args[0]}'" if isinstance(error, KeyError) else "blocks"
        raise _misfit(source, config, part, f"missing {missing}") from error
    return _fit(part, state, names.values(), config, source)


def _fit(
    part: str,
    state: Mapping[str, Any],
    names: Iterable[str],
    config: Path,
    source: object,
) -> list[str]:
    """Compare a part's converted tensors with its configuration.

    Returns: why each tensor that is in no parameter has no effect.
    """
    kind, expected = described_kind(config), expected_shapes(part, config)
    if part.startswith("text_encoder"):
        # transformers removed `text_model.` from some classes, and adds it when loading
        expected = {name.removeprefix("text_model."): shape for name, shape in expected.items()}
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    used = {name for key, t in state.items() if key in expected for name in _sources(t)}
    missing = [name for name in expected if name not in state and not _is_implied(name, expected)]
    unused = {name: _why_unused(name, part) for name in names if name not in used}
    unknown = [name for name, why in unused.items() if why is None]
    wrong = [
        f"'{min(_sources(state[name]), default=name)}' gives {name} the shape "
        f"{tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unknown or wrong:
        problems = _block_counts(kind, state, expected, config) if part == kind.denoiser else []
        if not (problems or unknown or wrong):
            raise AfaError(
                "AFA-LOAD-064",
                f"The {part} in '{source}' lacks {len(missing)} parameters of the configuration "
                f"'{config.name}' (first: '{min(missing)}'). Download or save the file again, or "
                "for another model set config to a diffusers folder of the same model.",
            )
        if unknown:
            problems.append(f"{len(unknown)} tensors that fit no layer (first: '{min(unknown)}')")
        if missing:
            problems.append(f"{len(missing)} missing parameters (first: '{min(missing)}')")
        raise _misfit(source, config, part, "; ".join([*problems, *wrong[:1]]))
    return [why for why in unused.values() if why is not None]


def _misfit(source: object, config: Path, part: str, problems: str) -> AfaError:
    """Make the error of a part that does not fit its configuration."""
    remedy = (
        "It may be a pruned or a different model (such as SSD-1B, Segmind-Vega, Koala or Flux with "
        "8 double blocks). Set config to a diffusers folder of the same model."
    )
    if part == "vae":
        remedy = "Set vae to another autoencoder (folder or file)."
    elif part.startswith("text_encoder"):
        remedy = "Set config to a diffusers folder of the same model."
    return AfaError(
        "AFA-LOAD-065",
        f"The {part} in '{source}' does not fit the configuration '{config.name}': {problems}. "
        f"Every tensor of a file must be used. {remedy}",
    )


def _sources(tensor: Any) -> frozenset[str]:
    return getattr(tensor, "sources", frozenset())


def _is_implied(name: str, expected: Shapes) -> bool:
    """Whether a missing parameter is defined by others or by default."""
    shape = expected[name]
    is_square = len(shape) == 2 and shape[0] == shape[1]
    return name == "encoder.embed_tokens.weight" or (name == PROJECTION and is_square)


def _why_unused(name: str, part: str) -> str | None:
    """Return why a tensor of a part has no effect; None if it should be used."""
    why = harmless(name)
    if why is not None or not part.startswith("text_encoder"):
        return why
    if name.startswith(_UNUSED_LAYER):
        return "last layer of the text encoder, which Stable Diffusion 2 skips"
    if name.endswith(("text_projection", PROJECTION)):
        return "projection that this text encoder does not use"
    if name.endswith("encoder.embed_tokens.weight"):
        return "second copy of T5's embedding"
    return None


def _block_counts(
    kind: PipelineKind, state: Iterable[str], expected: Shapes, config: Path
) -> list[str]:
    """Describe differences in the numbers of blocks, as parts of a sentence."""
    differences = []
    for block, words in layout_of(kind, config).blocks.items():
        pattern = re.compile(rf"({block})\.")
        found, required = (
            len({match[1] for name in names if (match := pattern.match(name))})
            for names in (state, expected)
        )
        if found != required:
            differences.append(f"it has {found} {words}, '{config.name}' has {required}")
    return differences
