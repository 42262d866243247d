"""Plan what each tensor of a LoRA changes in its base, from names and shapes alone.

Every tensor is applied, known to have no effect, or refused by name. Weights are not read, so that
`afa check` gives the same result as loading.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from afa.denoisers import FAMILIES
from afa.denoisers.packed import packed_layers
from afa.errors import AfaError
from afa.lora.lycoris import CHANGING, LOKR, expected_shapes, lacking, rank_of
from afa.lora.names import DENOISER, HARMLESS, flat, names_of, parse, split_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from afa.denoisers import PipelineKind
    from afa.denoisers.original_names import Rows
    from afa.lora.header import LoraFile
    from afa.lora.names import Names, Role

    Shape = tuple[int, ...]

_CHANGING: frozenset[Role] = frozenset(("down", "up", "mid", "diff", "diff_b", *CHANGING))
#: safetensors' names of floating-point types, which need no separate scale
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_FACTORS: tuple[Role, ...] = ("down", "up", "mid", "up_bias", "magnitude")
# roles that cannot be combined for one layer: no definition exists
_EXCLUSIVE: tuple[tuple[Role, Role], ...] = (
    *(("magnitude", "mid"), ("magnitude", "up_bias"), ("mid", "up_bias")),
    *(("down", "diff"), ("down", "weight"), ("diff", "weight")),
    *(("up_bias", "diff_b"), ("up_bias", "bias"), ("diff_b", "bias")),
    *(
        (one, other)
        for one in ("hada_w1_a", *LOKR)
        for other in ("down", "mid", "magnitude", "up_bias", "diff", "weight")
    ),
    *(("hada_w1_a", role) for role in LOKR),
    *(("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_t2")),
    *(("dora_scale", role) for role in ("magnitude", "up_bias", "diff", "weight")),
)
_REMEDY = "Merge the LoRA into a checkpoint with the tool that made it, and use that as the expert."


@dataclass(frozen=True)
class Base:
    """The base of a LoRA.

    Attributes:
        source: for messages.
        kind: of its pipeline.
        parts: the shapes of the parameters of the denoiser and the text encoders, by part.
    """

    source: str
    kind: PipelineKind
    parts: Mapping[str, Mapping[str, Shape]]

    @classmethod
    def of(cls, source: str, kind: PipelineKind, parts: Mapping[str, nn.Module]) -> Base:
        """Describe these models, which may be on the meta device."""
        shapes = {
            part: {
                name.replace(".base_layer.", "."): tuple(p.shape)
                for name, p in model.named_parameters()
                if ".lora_" not in name  # of a LoRA that was attached earlier
            }
            | {f"{name}.weight": layer.shape for name, layer in packed_layers(model).items()}
            for part, model in parts.items()
        }
        return cls(source, kind, shapes)


@dataclass(frozen=True)
class Change:
    """The tensors of a file for one of its layers, which may be several of the library's.

    Attributes:
        layer: as named in the file.
        part: the part that has the layer.
        rows: the library's layers.
        tensors: the names of its tensors, by role.
    """

    layer: str
    part: str
    rows: tuple[Rows, ...]
    tensors: Mapping[Role, str]


def plan_changes(
    lora: LoraFile, base: Base, scale: float, *, is_merged: bool = True
) -> list[Change]:
    """Assign every tensor of a LoRA to layers of its base.

    Args:
        is_merged: whether it is merged into the base's parameters, not computed separately.

    Raises:
        AfaError: if a tensor cannot be applied; names the first and the reason.
    """
    layers = _by_layer(lora)
    if not any(_CHANGING & tensors.keys() for tensors in layers.values()):
        raise AfaError(
            "AFA-LORA-001",
            f"'{lora.path}' is not a LoRA: none of its {len(lora.header)} tensors is part of a "
            f"low-rank product (first: '{min(lora.header, default='none')}'). It must be a LoRA "
            f"for the {base.kind.name} model '{base.source}'. List a complete model as an expert "
            "without lora.",
        )
    changes = _resolve(lora, base, layers)
    taken: dict[tuple[str, str], str] = {}
    for change in changes:
        _check_roles(lora, change)
        for rows in change.rows:
            other = taken.setdefault((change.part, rows.layer), change.layer)
            if other != change.layer:
                raise AfaError(
                    "AFA-LORA-002",
                    f"The LoRA '{lora.path}' changes the layer '{rows.layer}' twice, as "
                    f"'{other}' and as '{change.layer}'. A layer must have one change. Remove one "
                    "of them from the file.",
                )
        if is_merged:
            _check_biases(lora, base, change)
        _check_shapes(lora, base, change)
        _check_decomposition(lora, change, scale)
        if scale != 1 and change.tensors.keys() & {"weight", "bias"}:
            name = change.tensors["weight" if "weight" in change.tensors else "bias"]
            raise AfaError(
                "AFA-LORA-003",
                f"'{name}' of the LoRA '{lora.path}' replaces a weight, which is impossible with "
                f"scale {scale:g}. Set scale: 1.",
            )
    return changes


def _by_layer(lora: LoraFile) -> dict[str, dict[Role, str]]:
    """Group the names of tensors by layer and role, without those that have no effect."""
    layers: defaultdict[str, dict[Role, str]] = defaultdict(dict)
    adapters: dict[str | None, str] = {}  # PEFT's adapter names, and the first tensor of each
    for name, entry in lora.header.items():
        if name.endswith(HARMLESS):
            continue
        found = parse(name)
        if found is None:
            raise AfaError(
                "AFA-LORA-004",
                f"'{name}' of the LoRA '{lora.path}' is unknown. Every tensor must be part of a "
                f"low-rank product, a difference of weights, or a weight. {_REMEDY}",
            )
        if entry["dtype"] not in _FLOATS and found.role != "alpha":
            raise AfaError(
                "AFA-LORA-005",
                f"'{name}' of the LoRA '{lora.path}' is quantised ({entry['dtype']}); a LoRA must "
                "have floating-point values. Use the float16 or float32 version.",
            )
        other = layers[found.layer].setdefault(found.role, name)
        adapters.setdefault(found.adapter, name)
        if other != name or len(adapters.keys() - {None}) > 1:
            other = next(each for each in (other, *adapters.values()) if each != name)
            raise AfaError(
                "AFA-LORA-006",
                f"The LoRA '{lora.path}' has several adapters (first: '{other}' and '{name}'); a "
                "file must have one. Save each to a separate file, and use each as an expert.",
            )
    return layers


# -- layers -----------------------------------------------------------------------------------


def _resolve(lora: LoraFile, base: Base, layers: Mapping[str, dict[Role, str]]) -> list[Change]:
    tables = {
        part: names_of(
            [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")],
            base.kind.family if part == base.kind.denoiser else None,
        )
        for part, shapes in base.parts.items()
    }
    changes, unknown = [], []
    for layer, tensors in layers.items():
        if tensors.keys() == {"alpha"}:
            continue  # has no effect without factors
        found = _find(lora, base, layer, tables)
        if found is None:
            unknown.append(layer)
        else:
            changes.append(Change(layer, *found, tensors))
    if unknown:
        raise _unknown(lora, base, layers, unknown)
    return changes


def _find(
    lora: LoraFile, base: Base, layer: str, tables: Mapping[str, Names]
) -> tuple[str, tuple[Rows, ...]] | None:
    """Find the part and the layers of a name."""
    parts, rest = split_prefix(layer)
    name = flat(rest)
    if parts is not None:
        for part in parts:
            part = base.kind.denoiser if part == DENOISER else part
            if name in tables.get(part, {}):
                return part, tables[part][name]
        return None
    held = [part for part, table in tables.items() if name in table]
    if base.kind.denoiser in held:
        held = [base.kind.denoiser]
    if len(held) > 1:
        raise AfaError(
            "AFA-LORA-007",
            f"'{layer}' of the LoRA '{lora.path}' may be a layer of {' or '.join(held)}; its name "
            f"must begin with the part. Save it with the prefix '{held[0]}.' in each name.",
        )
    return (held[0], tables[held[0]][name]) if held else None


def _unknown(
    lora: LoraFile, base: Base, layers: Mapping[str, dict[Role, str]], unknown: list[str]
) -> AfaError:
    """Make an error about layers that the base lacks, with a guess of the right base."""
    lost = [name for layer in unknown for name in layers[layer].values()]
    count = sum(map(len, layers.values()))
    lacking = "layers that the base lacks"
    parts, _ = split_prefix(unknown[0])
    if parts is not None:
        names = [base.kind.denoiser if part == DENOISER else part for part in parts]
        there = [name for name in names if name in base.parts]
        lacking = f"layers that the base's {there[0]} lacks" if there else ""
        lacking = lacking or f"{names[-1]}, which the base lacks"
    seen = [flat(layer) for layer in unknown]
    likely = [
        family
        for family in FAMILIES
        for root in (*family.original_blocks, *family.library_blocks)
        if any(root in name for name in seen)
    ]
    hint = lora.meant_for
    if not hint and likely and likely[0] is not base.kind.family:
        hint = f" It is probably for {likely[0].pipelines[0].name}."
    return AfaError(
        "AFA-LORA-008",
        f"The LoRA '{lora.path}' does not fit the {base.kind.name} model '{base.source}': "
        f"{len(lost)} of its {count} tensors are for {lacking} (first: '{lost[0]}').{hint} Set "
        "base to the model that it was trained on.",
    )


# -- roles and shapes -------------------------------------------------------------------------


def _check_roles(lora: LoraFile, change: Change) -> None:
    """Check that products are complete, and that roles can be combined."""
    roles = change.tensors.keys()
    has = {role for role in _FACTORS if role in roles}
    if has and not {"down", "up"} <= roles:
        missing = " and ".join(sorted({"down", "up"} - roles))
        raise AfaError(
            "AFA-LORA-009",
            f"The LoRA '{lora.path}' lacks the factor '{missing}' of '{change.layer}'; each "
            "product must have both. Download it again.",
        )
    lost = lacking(roles)
    if lost is not None or ("dora_scale" in roles and not roles & {"up", *CHANGING}):
        raise AfaError(
            "AFA-LORA-016",
            f"The LoRA '{lora.path}' lacks '{lost or 'the product'}' of '{change.layer}'; each "
            "product must have all of its factors. Download it again.",
        )
    config = lora.config_for(change.layer)
    if has and config is not None and config.get("use_dora") and "magnitude" not in roles:
        raise AfaError(
            "AFA-LORA-010",
            f"The LoRA '{lora.path}' lacks the lora_magnitude_vector of '{change.layer}', which "
            "use_dora in PEFT's configuration requires. Save it again.",
        )
    for one, other in _EXCLUSIVE:
        if {one, other} <= roles:
            raise AfaError(
                "AFA-LORA-011",
                f"'{change.tensors[one]}' and '{change.tensors[other]}' of the LoRA '{lora.path}' "
                f"change the same layer in two ways, which cannot be combined. {_REMEDY}",
            )


def _check_decomposition(lora: LoraFile, change: Change, scale: float) -> None:
    """Check that LyCORIS' DoRA is defined for a layer and a scale."""
    name = change.tensors.get("dora_scale")
    if name is None:
        return
    if scale != 1:
        raise AfaError(
            "AFA-LORA-017",
            f"'{name}' of the LoRA '{lora.path}' sets the norms of a layer (DoRA), for which "
            f"programs define scales other than 1 differently; got {scale:g}. Set scale: 1.",
        )
    if len(change.rows) > 1 and lora.shape(name)[0] == 1:
        raise AfaError(
            "AFA-LORA-018",
            f"'{name}' of the LoRA '{lora.path}' sets norms by input for a layer that is several "
            f"layers of the base ({change.rows[0].layer}, ...), which is not supported. {_REMEDY}",
        )


def _check_biases(lora: LoraFile, base: Base, change: Change) -> None:
    """Check that layers with a changed bias have one, as PEFT does in a merge."""
    for role in ("up_bias", "diff_b", "bias"):
        unbiased = [
            rows.layer
            for rows in change.rows
            if role in change.tensors and f"{rows.layer}.bias" not in base.parts[change.part]
        ]
        if unbiased:
            raise AfaError(
                "AFA-LORA-012",
                f"'{change.tensors[role]}' of the LoRA '{lora.path}' is a bias for the layer "
                f"'{unbiased[0]}' of '{base.source}', which has no bias. Train the LoRA without "
                "biases (lora_bias=False).",
            )


def _check_shapes(lora: LoraFile, base: Base, change: Change) -> None:
    shapes = base.parts[change.part]
    held = {role: lora.shape(name) for role, name in change.tensors.items()}
    weights = [shapes.get(f"{rows.layer}.weight", ()) for rows in change.rows]
    whole = (sum(weight[0] for weight in weights if weight), *weights[0][1:])
    needs: dict[Role, Shape] = {"diff": whole, "weight": whole}
    needs |= dict.fromkeys(("magnitude", "up_bias", "diff_b", "bias"), whole[:1])
    if "down" in held:
        rank = held["down"][0] if held["down"] else 0
        core = held.get("mid", ())
        inner = core[0] if core else rank
        kernel = whole[2:]
        needs["down"] = (rank, *whole[1:2]) if core else (rank, *whole[1:])
        needs["up"] = (whole[0], inner)
        needs["mid"] = (inner, rank, *kernel)
        if rank == 0 or len(whole) < 2:
            raise _wrong_shape(lora, base, change, "down", whole)
        lora.check_scaling(change.layer, rank, has_alpha="alpha" in held)
    several = expected_shapes(held, whole) if len(whole) > 1 else {}
    changing = next((role for role in (*CHANGING, "dora_scale") if role in held), None)
    if changing is not None and (len(whole) < 2 or rank_of(held) == 0):
        raise _wrong_shape(lora, base, change, changing, whole)
    for role, shape in held.items():
        if role == "alpha":
            if prod(shape) != 1:
                raise _wrong_shape(lora, base, change, role, ())
        elif role in several:
            if _trimmed(shape) not in map(_trimmed, several[role]):
                raise _wrong_shape(lora, base, change, role, several[role][0])
        elif _trimmed(shape) != _trimmed(needs[role]) and not (
            role == "magnitude" and prod(shape) == prod(needs[role])
        ):
            raise _wrong_shape(lora, base, change, role, needs[role])


def _wrong_shape(lora: LoraFile, base: Base, change: Change, role: Role, needs: Shape) -> AfaError:
    name, layer = change.tensors[role], change.rows[0].layer
    shape = lora.shape(name)
    hint = lora.meant_for
    if role == "down" and len(shape) == len(needs) > 1 and shape[1] > needs[1]:
        hint += " It needs more input channels than the layer has."
        if layer in ("x_embedder", "conv_in"):
            hint += " Control LoRAs, which need a second picture, are not supported as experts."
    return AfaError(
        "AFA-LORA-013",
        f"The LoRA '{lora.path}' does not fit the {base.kind.name} model '{base.source}': '{name}' "
        f"has shape {shape}.{hint} For the layer '{layer}' it must have {needs}. Set base to the "
        "model that it was trained on.",
    )


def _trimmed(shape: Shape) -> Shape:
    """Remove trailing ones, in which linear layers and 1 x 1 convolutions differ."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
