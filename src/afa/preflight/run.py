"""A look at everything that a recipe names, before any of its work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers import family_of
from afa.errors import NO_MODEL, AfaError
from afa.files import parts_of, read_json
from afa.loading.compare import compare
from afa.loading.distilled import distilled_of
from afa.loading.expert_source import ExpertSource
from afa.loading.facts import Facts
from afa.loading.finding import Finding, Level, in_order
from afa.loading.lora import check_lora, hash_lora
from afa.loading.lora.file import open_lora
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.memory.plan import encoder_sets
from afa.loading.planned import Work
from afa.loading.published import is_published, published_experts
from afa.loading.weights import (
    hash_vae,
    tensor_shapes,
    weight_files,
    weights_in,
)
from afa.machine.damaged import is_own_bug
from afa.preflight.machine import Estimate, Job, fits
from afa.preflight.weights import Weights, look_into

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from afa.loading.expert_source import AnySource
    from afa.loading.planned import Group, Plan
    from afa.loading.single_file.load import Companions

#: what the plan of a merge compares by itself, since it may pad channels and do without a part
_PLANNED = ("architecture", "text encoders")


@dataclass(frozen=True)
class Look:
    """One expert that was looked at.

    Attributes:
        manifest: of it, or of its LoRA's base.
        facts: of it, with its LoRA.
    """

    manifest: ExpertManifest
    facts: Facts

    @property
    def dtypes(self) -> str:
        """Of its numbers, the most frequent first."""
        return ", ".join(dtype for dtype, _ in self.manifest.num_elements.most_common(2))


@dataclass
class Report:
    """What came of it.

    Attributes:
        experts: that were looked at, each once.
        findings: errors first.
        estimates: of memory and time, by the group's label.
        data: what the data set holds, on one line; None where none was looked at.
    """

    experts: list[Look] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    data: str | None = None

    @property
    def errors(self) -> list[Finding]:
        """What keeps the work from being done."""
        return [finding for finding in self.findings if finding.level == "error"]

    def require(self) -> None:
        """Go on only where there is no error.

        Raises:
            AfaError: the first, and how many more there are.
        """
        if self.errors:
            more = len(self.errors) - 1
            also = f" ({more} more: `afa check` lists all)" if more else ""
            raise AfaError(self.errors[0].code, self.errors[0].text + also)


def look(
    plan: Plan,
    *,
    with_weights: bool = True,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Report:
    """Look at everything that a plan would load.

    Args:
        plan: what is to be loaded.
        with_weights: whether weights are read, too; headers and configurations always are.
        progress: told what is done, and bytes of how many.

    Returns: the report; an expert that cannot be read at all is an error in it.
    """
    report, known = Report(), {}
    for group in plan.groups:
        looks: list[Look] = []
        parts = list(_parts(group))
        report.findings += [finding for finding in parts if finding not in report.findings]
        for asked in group.experts:
            key = _key(asked, group.companions)
            try:
                if key not in known:
                    known[key] = _look_at(asked, group.companions, with_weights=with_weights)
                    report.experts.append(known[key])
                    report.findings += _whole(known[key])
                looks.append(known[key])
                if not group.is_loose and not parts:  # a merge needs the denoisers alone
                    is_first = asked is group.experts[0] and group.companions.own_vae
                    manifest = read_manifest(asked, group.companions)
                    manifest.require_whole(with_autoencoder=is_first and group.is_drawn)
            except AfaError as error:
                level: Level = "note" if group.is_loose else "error"
                report.findings.append(Finding(error.code, level, "files", str(error)))
        if len(looks) == len(group.experts):
            found = compare([each.facts for each in looks], allow_duplicates=group.allow_duplicates)
            report.findings += [
                finding
                for finding in found
                if finding not in report.findings
                and not (group.is_loose and finding.check in _PLANNED)
            ]
            report.findings += _autoencoders(looks)
            if plan.work and not any(each.check == "architecture" for each in report.errors):
                _estimate(report, plan.work, group, looks)
    if with_weights and report.experts:
        dtype = plan.groups[0].companions.torch_dtype
        report.findings += _read_weights(report.experts, dtype, progress)
    report.findings = in_order(report.findings)
    return report


def _parts(group: Group) -> Iterator[Finding]:
    """Are the parts there that the group names for single files?"""
    try:
        group.companions.require_parts()
    except AfaError as error:
        yield Finding(error.code, "error", "parts", str(error))


def _key(named: AnySource, companions: Companions) -> tuple[object, ...]:
    """What a look depends on: a single file's also on what describes it."""
    source = replace(ExpertSource.of(named), sha256=None)
    if Path(source.source).expanduser().is_file():
        return (source, str(companions.config), str(companions.fallback))
    return (source,)


def _look_at(named: AnySource, companions: Companions, *, with_weights: bool) -> Look:
    manifest = read_manifest(named, companions)
    asked, facts, _ = manifest.source, manifest.facts, manifest.files  # damaged ones are refused
    identity = manifest.sha256 if with_weights else None
    if asked.lora is not None:
        place = Path(asked.lora).expanduser()
        check_lora(asked, manifest.config, with_values=with_weights)
        if identity is not None:
            identity = f"{identity} + {asked.scale!r} x {hash_lora(place)}"
        file = open_lora(place).path
        distilled = distilled_of(asked.lora, manifest.config, is_file=True, path=file)
        facts = replace(
            facts, name=asked.lora, short=place.name, distilled=distilled or facts.distilled
        )
    return Look(manifest, replace(facts, identity=identity))


def _whole(look: Look) -> Iterator[Finding]:
    """Does a folder's denoiser have all tensors, in the shapes that its configuration says?"""
    facts, kind = look.facts, look.facts.kind
    try:
        with torch.device("meta"):
            twin: Any = kind.family.model_class.from_config(dict(facts.denoiser))
        family_of(twin)
    except AfaError as error:
        yield Finding(error.code, "error", "architecture", str(error))
        return
    except NO_MODEL as error:
        if is_own_bug(error):
            raise
        said = " ".join(str(error).split())[:200]
        yield Finding(
            "AFA-CHECK-003",
            "error",
            "architecture",
            f"The denoiser of '{facts.name}' cannot be built: {said}.",
        )
        return
    text = sum(kind.family.widths(twin).text)
    given = sum(facts.encoders.get(name) or 0 for name in kind.text)
    if text and given and text != given and kind.padded_text is None:
        yield Finding(
            "AFA-CHECK-004",
            "error",
            "text encoders",
            f"The text encoders of '{facts.name}' must give {text} numbers a token, as its "
            f"denoiser takes them; they give {given}.",
            "The denoiser could not read the prompt.",
            "Take the text encoder that it was trained with.",
        )
    if look.manifest.path.is_file():
        return
    shapes = {
        name: shape
        for file in weights_in(look.manifest.path / kind.denoiser)[1]
        for name, shape in tensor_shapes(file).items()
    }
    for name, tensor in twin.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            came = "it is missing" if name not in shapes else f"it is {shapes[name]}"
            yield Finding(
                "AFA-CHECK-005",
                "error",
                "weights",
                f"The denoiser of '{facts.name}' must have '{name}' of shape "
                f"{tuple(tensor.shape)}; {came}.",
                "",
                "Download it again, with the configuration that belongs to it.",
            )
            return


def _autoencoders(looks: Sequence[Look]) -> Iterator[Finding]:
    """Experts may have autoencoders of their own, of which one decodes for all."""
    names, hashes = [], []
    for each in looks:
        if (each.manifest.path / "vae").is_dir() and "vae" in parts_of(
            read_json(each.manifest.path / "model_index.json")
        ):
            names.append(each.facts.short)
            hashes.append(hash_vae(each.manifest.path))
    if len(set(hashes)) > 1:
        yield Finding(
            "AFA-CHECK-006",
            "note",
            "autoencoder",
            f"The experts have autoencoders of their own ({', '.join(names)}); that of "
            f"'{names[0]}' decodes for all.",
            "Fine detail and colours are a little of that expert's.",
            "Name another one under vae if you prefer it.",
        )


def _estimate(report: Report, work: Work, group: Group, looks: Sequence[Look]) -> None:
    alone = replace(work, samples_each=1)
    job = Job(
        looks[0].manifest.config,
        group.num_experts or len(looks),
        group.encoder_sets or encoder_sets([each.manifest.path for each in looks]),
        group.aggregators,
        group.companions.torch_dtype,
        work if looks[0].facts.kind.family.batches_guidance else alone,
    )
    try:
        found = job.estimate()
    except AfaError as error:  # what describes the experts leaves the autoencoder out
        report.findings.append(Finding(error.code, "note", "memory", str(error)))
        return
    report.estimates[group.label] = found
    report.findings += fits(job, found)


def _read_weights(
    looks: Sequence[Look], dtype: torch.dtype, progress: Callable[[str, int, int], object]
) -> Iterator[Finding]:
    by_path = {each.manifest.path: each for each in looks}
    weights = []
    for path, each in by_path.items():
        name = each.facts.short
        if path.is_file():
            weights.append(Weights(name, [path]))
            continue
        denoiser = weights_in(path / each.facts.kind.denoiser)[1]
        others = [file for file in weight_files(path) if file not in denoiser]
        if (path / "vae").is_dir():
            others += weights_in(path / "vae")[1]
        weights.append(Weights(name, denoiser, others))
        if is_published(path):
            weights += [
                Weights(f"{name}/{unet.name}", weights_in(unet)[1], weights_in(encoder)[1])
                for unet, encoder in published_experts(path)[1:]
            ]
    total, done = sum(each.num_bytes for each in weights), 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        progress("weights", done, total)

    yield from look_into(weights, dtype, note)
