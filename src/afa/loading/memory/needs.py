"""Estimate an ensemble's memory and operations from configurations, without weights."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from afa.aggregators import Condition, SABWConfig
from afa.aggregators.build import build_sabw
from afa.aggregators.lowered import HALVES
from afa.denoisers import Execution, Feature, Site, discover_sites, run_lockstep
from afa.denoisers.autoencoders import autoencoder_named
from afa.denoisers.kinds import kind_of
from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, write_atomic
from afa.loading.loaded import class_of
from afa.loading.memory.live import kept_by, measure
from afa.loading.single_file.conversion import model_class_of, without_data

if TYPE_CHECKING:
    from torch import Tensor

    from afa.denoisers import Family, PipelineKind
    from afa.loading.memory.bits import Bits


_SIDE = 16  # of the latent whose decoding is measured


@dataclass(frozen=True)
class Training:
    """Settings of a training that affect memory.

    Attributes:
        is_checkpointed: whether activations between two sites are recomputed.
        has_average: whether a moving average of the aggregators is kept.
    """

    is_checkpointed: bool = False
    has_average: bool = False

    @property
    def copies(self) -> int:
        """Copies of every parameter: its gradient, AdamW's two moments, its moving average."""
        return 3 + self.has_average


@dataclass(frozen=True)
class Needs:
    """Estimated bytes of an ensemble.

    Attributes:
        num_experts: N.
        layers: of all experts together, layers that can be offloaded until they run.
        largest: the largest such layer.
        rest: of all experts together, everything else.
        encoders: text encoders.
        others: autoencoder and aggregators.
        work: peak of the activations of a step, or of decoding a picture.
        flops: floating-point operations of a step; in training, forward and backward.
    """

    num_experts: int
    layers: int
    largest: int
    rest: int
    encoders: int
    others: int
    work: int
    flops: int = 0

    @property
    def in_memory(self) -> int:
        """Everything, with all experts in memory."""
        return self.layers + self.resting

    @property
    def resting(self) -> int:
        """Everything except the layers."""
        return self.rest + self.encoders + self.others + self.work

    def streamed(self, ahead: int) -> int:
        """The peak if layers are streamed from a file.

        In a step: the running layer, the prefetched ones and the previous one. During loading: one
        complete expert.
        """
        expert = (self.layers + self.rest) // self.num_experts
        loading = expert + self.rest + self.encoders
        return max(loading, self.resting + (ahead + 2) * self.largest)


def needs_of(
    config: Path,
    num_experts: int,
    aggregators: SABWConfig | None,
    *,
    encoder_sets: int,
    dtype: torch.dtype,
    pixels: int | None = None,
    batch: int = 2,
    weight_bits: Bits | None = None,
    training: Training | None = None,
) -> Needs:
    """Estimate the needs of N experts of one architecture for drawing or training.

    Args:
        config: a pipeline folder, of which only the configurations are read.
        aggregators: of all sites; None for the mean.
        encoder_sets: number of different sets of text encoders.
        dtype: of experts, text encoders and autoencoder.
        pixels: height times width of a picture; None for the experts' native resolution.
        batch: of a step; guidance doubles it.
        weight_bits: bits of the experts' linear weights; None if they are not quantised.

    Raises:
        AfaError: if the model is of an unknown kind, or its autoencoder's configuration is missing.
    """
    if not (config / "vae" / "config.json").is_file():
        raise AfaError(
            "AFA-MEMORY-003",
            f"'{config}' has no vae/config.json, which a memory plan requires. Copy it from the "
            "model that supplies the autoencoder, or remove the memory budget.",
        )
    class_name = str(read_json(config / "model_index.json").get("_class_name"))
    kind = kind_of(class_name, config)
    found = measure_cached(
        class_name,
        _text(config / kind.denoiser / "config.json"),
        _text(config / "vae" / "config.json"),
        num_experts,
        aggregators,
        dtype,
        weight_bits,
        training,
    )
    picture = (pixels or found.native) // found.shrink**2
    return Needs(
        num_experts=num_experts,
        layers=num_experts * found.layers,
        largest=found.largest,
        rest=num_experts * found.rest,
        encoders=encoder_sets * _encoder_bytes(config, dtype),
        others=found.others,
        work=max(
            found.step * batch * picture // found.cells + found.transient,
            found.decoding * picture // _SIDE**2,
        ),
        flops=found.flops * batch * picture // found.cells,
    )


def needs_of_predictions(
    configs: Sequence[Path],
    aggregators: SABWConfig | None,
    *,
    dtype: torch.dtype,
    pixels: int | None = None,
    batch: int = 2,
    weight_bits: Bits | None = None,
    training: Training | None = None,
) -> Needs:
    """Estimate the needs of experts whose predictions alone are fused; see `needs_of`.

    They run one after the other, so activations are those of the largest one. No gradient flows
    through them.

    Args:
        configs: the pipeline folder of each expert.
    """
    given: Any = {"dtype": dtype, "pixels": pixels, "batch": batch, "weight_bits": weight_bits}
    alone = [needs_of(config, 1, None, encoder_sets=1, **given) for config in configs]
    rules = 0
    if aggregators is not None:
        with torch.device("meta"):
            (rule,) = build_sabw(aggregators, [Site("out", 4, 1, 256)], len(configs), None)
        rules = _bytes(rule) * (1 if training is None else 1 + training.copies)
    return Needs(
        num_experts=len(configs),
        layers=sum(each.layers for each in alone),
        largest=max(each.layers for each in alone),
        rest=sum(each.rest for each in alone),
        encoders=sum(each.encoders for each in alone),
        others=max(each.others for each in alone) + rules,
        work=max(each.work for each in alone),
        flops=sum(each.flops for each in alone),
    )


@dataclass(frozen=True)
class _Measured:
    """Measurements that take long and do not depend on the size of pictures.

    Attributes:
        layers: bytes of one expert's layers.
        largest: bytes of its largest layer.
        rest: bytes of the rest of the expert.
        others: bytes of autoencoder and aggregators, with gradients and optimizer in training.
        step: peak bytes of a step of batch 1 on the smallest input.
        cells: latent pixels of that input.
        flops: of that step.
        decoding: peak bytes of decoding a latent of side `_SIDE`.
        transient: bytes of the largest weight that is dequantised when its layer runs.
        native: pixels of the experts' native resolution.
        shrink: downsampling factor of the autoencoder, per side.
    """

    layers: int
    largest: int
    rest: int
    others: int
    step: int
    cells: int
    flops: int
    decoding: int
    transient: int
    native: int
    shrink: int


def _text(config: Path) -> str:
    """Return a configuration as a string that is equal for equal content."""
    return json.dumps(read_json(config), sort_keys=True)


@lru_cache(maxsize=32)
def measure_cached(class_name: str, *described: Any) -> _Measured:
    """Call `measure_models`, with a cache in the user's cache folder.

    Families registered by other packages are not cached on disk, since their code may change.
    """
    kind = kind_of(class_name, "the model")
    if kind.family.model_class.__module__.partition(".")[0] != "diffusers":
        return measure_models(kind, *described)
    key = hashlib.sha256(f"{class_name} {described} {_code()}".encode()).hexdigest()
    cached = cache_folder() / "estimates" / f"{key[:32]}.json"
    try:
        return _Measured(**read_json(cached))
    except (AfaError, OSError, TypeError):  # missing or damaged
        found = measure_models(kind, *described)
        with suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cached, json.dumps(asdict(found)) + "\n")
        return found


@cache
def _code() -> str:
    """SHA-256 of the code that computes estimates, and of the libraries' versions."""
    digest = hashlib.sha256(f"{torch.__version__} {diffusers.__version__}".encode())
    package = Path(__file__).parents[2]
    for part in ("aggregators", "denoisers", "loading/memory"):
        for file in sorted((package / part).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def measure_models(
    kind: PipelineKind,
    denoiser: str,
    autoencoder: str,
    num_experts: int,
    aggregators: SABWConfig | None,
    dtype: torch.dtype,
    weight_bits: Bits | None,
    training: Training | None,
) -> _Measured:
    """Build the models without weights, and run them without data."""
    family = kind.family
    with torch.device("meta"):
        twin: Any = family.model_class.from_config(json.loads(denoiser))
        described = json.loads(autoencoder)
        of_vae = autoencoder_named(class_of(described))
        vae = of_vae.model_class.from_config(described)
        for model in (twin, vae):
            nn.Module.to(model, dtype)  # diffusers' own `to` warns about modules in float32
        sites = discover_sites(twin)
        rules: list[Any] = []
        if aggregators is not None:
            text = sum(family.widths(twin).text) or None
            rules = build_sabw(aggregators, sites, num_experts, text)
    layers = family.layers(twin)
    # the modules that are not part of another one
    inner = {part for layer in layers for part in layer.modules() if part is not layer}
    mean, most = (weight_bits.mean, weight_bits.most) if weight_bits else (None, None)
    held = sum(_bytes(layer, mean) for layer in layers if layer not in inner)
    own = list(dict.fromkeys(rules))
    # with experts in half precision, a lowered copy of the rules runs, see afa.aggregators.lowered
    halves = HALVES if training is None else ()
    lowered = {rule: copy.deepcopy(rule).to(dtype) for rule in own if dtype in halves}
    running = [lowered.get(rule, rule) for rule in rules]
    step, cells, flops = _step(family, twin, running, num_experts, training)
    shrink = of_vae.shrink(vae.config)
    height, width = kind.native_size(twin.config)
    return _Measured(
        layers=held,
        largest=max(_bytes(layer, most) for layer in layers),
        rest=_bytes(twin, mean) - held,
        others=_bytes(vae)
        + sum(_bytes(rule) for rule in (*own, *lowered.values()))
        + (0 if training is None else training.copies * sum(_bytes(rule) for rule in own)),
        step=step,
        cells=cells,
        flops=flops,
        decoding=measure(lambda: of_vae.decoded(vae, _SIDE, dtype))[0],
        transient=_transient(twin) if weight_bits and weight_bits.is_dequantised else 0,
        native=height * width * shrink**2,
        shrink=shrink,
    )


def _transient(model: nn.Module) -> int:
    """Return the bytes of the largest linear weight in its own type and in float32."""
    weights = [part.weight for part in model.modules() if type(part) is nn.Linear]
    return max((w.nbytes + 4 * w.numel() for w in weights), default=0)


def _bytes(module: nn.Module, weight_bits: float | None = None) -> int:
    """Return a module's bytes; with `weight_bits`, its linear weights are quantised by row."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    size = sum(tensor.nbytes for tensor in tensors)
    if weight_bits is not None:
        for part in module.modules():
            if type(part) is nn.Linear:
                weight = part.weight
                packed = int(weight.numel() * weight_bits / 8)
                size += packed + len(weight) * weight.element_size() - weight.nbytes
    return size


def _step(
    family: Family, twin: Any, rules: Sequence[Any], count: int, training: Training | None
) -> tuple[int, int, int]:
    """Return the peak bytes, latent pixels and flops of a step of batch 1 on the smallest input.

    A backward pass through frozen layers needs as many operations as the forward pass; recomputed
    activations need as many again.
    """
    inputs = {key: _cast(value, twin.dtype) for key, value in family.example(twin).items()}
    latent = inputs[family.latent]
    cells = latent.shape[-1] * latent.shape[-2] if latent.ndim == 4 else 4 * latent.shape[1]
    numbers = iter(itertools.cycle(range(len(rules)))) if rules else None

    def fuse(features: Sequence[Feature]) -> Tensor | list[Tensor]:
        hidden = [feature.hidden for feature in features]
        if numbers is None:
            return sum(hidden[1:], start=hidden[0]) / len(hidden)
        temb, text = features[0].temb, inputs.get("encoder_hidden_states")
        condition = Condition(torch.zeros(1, device="meta"), temb, text, latent, None)
        fused = rules[next(numbers)](hidden, condition).feature
        return fused if isinstance(fused, torch.Tensor) else list(fused)

    execution = Execution(checkpoints=training is not None and training.is_checkpointed)

    def run() -> Any:
        experts = [family.blocks(twin, **inputs, execution=execution) for _ in range(count)]
        return run_lockstep(experts, fuse)

    peak, flops = measure(run)
    if training is not None and rules:
        twin.requires_grad_(False)
        peak += kept_by(run)
        flops *= 3 if training.is_checkpointed else 2
    return peak, cells, flops


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
    return value.to(dtype) if is_float else value


def _encoder_bytes(config: Path, dtype: torch.dtype) -> int:
    """Return the bytes of all text encoders of one model."""
    size = 0
    for part in parts_of(read_json(config / "model_index.json")):
        if part.startswith("text_encoder"):
            settings = read_json(config / part / "config.json")
            size += _bytes(without_data(model_class_of(part, config), settings).to(dtype))
    return size
