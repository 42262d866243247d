"""Check the models of a plan before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers import family_of
from afa.errors import NO_MODEL, AfaError
from afa.files import parts_of, read_json
from afa.loading.compare import compare
from afa.loading.compare_predictions import prefers_predictions
from afa.loading.distilled import distilled_of
from afa.loading.expert_source import ExpertSource
from afa.loading.facts import Facts
from afa.loading.finding import Finding, Level, in_order
from afa.loading.lora import check_lora, hash_lora
from afa.loading.lora.file import open_lora
from afa.loading.manifest import ExpertManifest, read_manifest
from afa.loading.memory.bits import bits_of
from afa.loading.memory.plan import encoder_sets
from afa.loading.planned import Work
from afa.loading.published import is_published, published_experts
from afa.loading.weights import hash_vae, tensor_shapes, weight_files, weights_in
from afa.machine.damaged import is_own_bug
from afa.preflight.machine import Estimate, Job, fits
from afa.preflight.weights import Weights, check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from afa.loading.expert_source import AnySource, Fuse
    from afa.loading.planned import Group, Plan
    from afa.loading.single_file.load import Companions
    from afa.training.data.summary import DataSummary

#: checks that `plan_merge` does itself, because merges may pad channels and lack components
_PLANNED = ("architecture", "text encoders")


@dataclass(frozen=True)
class CheckedExpert:
    """A checked expert.

    Attributes:
        manifest: manifest of the expert, or of its LoRA's base.
        facts: facts about the expert, including its LoRA.
    """

    manifest: ExpertManifest
    facts: Facts

    @property
    def dtypes(self) -> str:
        """Its most frequent dtypes, in order."""
        return ", ".join(dtype for dtype, _ in self.manifest.num_elements.most_common(2))


@dataclass
class Report:
    """The result of a check.

    Attributes:
        experts: the checked experts, each once.
        findings: errors first.
        estimates: label of a group -> its memory and time.
        data: one line about the data set; None if none was checked.
        details: sizes, crops, captions and duplicates of the data set; None if none was checked.
    """

    experts: list[CheckedExpert] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    data: str | None = None
    details: DataSummary | None = None

    @property
    def errors(self) -> list[Finding]:
        """The findings that prevent the work."""
        return [finding for finding in self.findings if finding.level == "error"]

    def require(self) -> None:
        """Raise the first error, with the number of other errors.

        Raises:
            AfaError: if there is an error.
        """
        if self.errors:
            more = len(self.errors) - 1
            note = f" ({more} more: `afa check` lists all)" if more else ""
            raise AfaError(self.errors[0].code, self.errors[0].text + note)


def look(
    plan: Plan,
    *,
    with_weights: bool = True,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Report:
    """Check everything that a plan loads.

    Args:
        plan: the plan.
        with_weights: whether to read weights; headers and configurations are always read.
        progress: called with the stage, the bytes read and their total.

    Returns: the report; experts that cannot be read are errors in it.
    """
    report, known = Report(), {}
    for group in plan.groups:
        checked: list[CheckedExpert] = []
        parts = list(_parts(group))
        report.findings += [finding for finding in parts if finding not in report.findings]
        for source in group.experts:
            key = _key(source, group.companions)
            try:
                if key not in known:
                    known[key] = _check_expert(source, group.companions, with_weights=with_weights)
                    report.experts.append(known[key])
                    report.findings += _check_denoiser(known[key])
                checked.append(known[key])
                if not group.is_loose and not parts:  # a merge only needs the denoisers
                    is_first = source is group.experts[0] and group.companions.own_vae
                    manifest = read_manifest(source, group.companions)
                    manifest.require_whole(with_autoencoder=is_first and group.is_drawn)
            except AfaError as error:
                level: Level = "note" if group.is_loose else "error"
                report.findings.append(Finding(error.code, level, "files", str(error)))
        if len(checked) == len(group.experts):
            found = compare(
                [each.facts for each in checked],
                allow_duplicates=group.allow_duplicates,
                converts=not group.is_merged,
                fuse=group.fuse,
            )
            report.findings += [
                finding
                for finding in found
                if finding not in report.findings
                and not (group.is_loose and finding.check in _PLANNED)
            ]
            report.findings += _autoencoders(checked, group.fuse)
            if plan.work and not any(each.check == "architecture" for each in report.errors):
                _estimate(report, plan.work, group, checked)
    if with_weights and report.experts:
        dtype = plan.groups[0].companions.torch_dtype
        report.findings += _read_weights(report.experts, dtype, progress)
    report.findings = in_order(report.findings)
    return report


def _parts(group: Group) -> Iterator[Finding]:
    """Check that the components exist that the group names for single files."""
    try:
        group.companions.require_parts()
    except AfaError as error:
        yield Finding(error.code, "error", "parts", str(error))


def _key(named: AnySource, companions: Companions) -> tuple[object, ...]:
    """The key of a checked expert; for a single file it includes the configurations used."""
    source = replace(ExpertSource.of(named), sha256=None)
    if Path(source.source).expanduser().is_file():
        return (source, str(companions.config), str(companions.fallback))
    return (source,)


def _check_expert(named: AnySource, companions: Companions, *, with_weights: bool) -> CheckedExpert:
    manifest = read_manifest(named, companions)
    source, facts, _ = manifest.source, manifest.facts, manifest.files  # raises on damaged files
    identity = manifest.sha256 if with_weights else None
    if source.lora is not None:
        path = Path(source.lora).expanduser()
        check_lora(source, manifest.config, with_values=with_weights)
        if identity is not None:
            identity = f"{identity} + {source.scale!r} x {hash_lora(path)}"
        file = open_lora(path).path
        distilled = distilled_of(source.lora, manifest.config, is_file=True, path=file)
        facts = replace(
            facts, name=source.lora, short=path.name, distilled=distilled or facts.distilled
        )
    return CheckedExpert(manifest, replace(facts, identity=identity))


def _check_denoiser(expert: CheckedExpert) -> Iterator[Finding]:
    """Check a denoiser's configuration, and that a folder's weights have its tensors and shapes."""
    facts, kind = expert.facts, expert.facts.kind
    try:
        with torch.device("meta"):
            model: Any = kind.family.model_class.from_config(dict(facts.denoiser))
        family_of(model)
    except AfaError as error:
        yield Finding(error.code, "error", "architecture", str(error))
        return
    except NO_MODEL as error:
        if is_own_bug(error):
            raise
        reason = " ".join(str(error).split())[:200]
        yield Finding(
            "AFA-CHECK-003",
            "error",
            "architecture",
            f"The denoiser of '{facts.name}' cannot be built from its configuration: {reason}.",
        )
        return
    width = sum(kind.family.widths(model).text)
    encoded = kind.text_layers * sum(facts.encoders.get(name) or 0 for name in kind.text)
    if width and encoded and width != encoded and kind.padded_text is None:
        yield Finding(
            "AFA-CHECK-004",
            "error",
            "text encoders",
            f"The text encoders of '{facts.name}' have {encoded} features per token; its denoiser "
            f"needs {width}.",
            "The denoiser could not read the prompt.",
            "Use the text encoders that it was trained with.",
        )
    if expert.manifest.path.is_file():
        return
    shapes = {
        name: shape
        for file in weights_in(expert.manifest.path / kind.denoiser)[1]
        for name, shape in tensor_shapes(file).items()
    }
    for name, tensor in model.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            found = "is missing" if name not in shapes else f"has shape {shapes[name]}"
            yield Finding(
                "AFA-CHECK-005",
                "error",
                "weights",
                f"'{name}' {found} in the denoiser of '{facts.name}'; its configuration requires "
                f"shape {tuple(tensor.shape)}.",
                "",
                "Download the expert again, with its own configuration.",
            )
            return


def _autoencoders(checked: Sequence[CheckedExpert], fuse: Fuse | None) -> Iterator[Finding]:
    """Note that experts have different autoencoders, of which one decodes all pictures."""
    names, hashes = [], []
    for each in checked:
        if (each.manifest.path / "vae").is_dir() and "vae" in parts_of(
            read_json(each.manifest.path / "model_index.json")
        ):
            names.append(each.facts.short)
            hashes.append(hash_vae(each.manifest.path))
    effect = "It slightly affects fine detail and colours."
    if fuse == "predictions":
        effect = "If they decode a latent to different pictures, the ensemble will not load."
    if len(set(hashes)) > 1:
        yield Finding(
            "AFA-CHECK-006",
            "note",
            "autoencoder",
            f"The experts have different autoencoders ({', '.join(names)}); that of "
            f"'{names[0]}' decodes all pictures.",
            effect,
            "To use another one, set vae.",
        )


def _estimate(report: Report, work: Work, group: Group, checked: Sequence[CheckedExpert]) -> None:
    unbatched = replace(work, samples_each=1)
    aggregators = group.aggregators
    alone = group.fuse is None and prefers_predictions([each.facts for each in checked])
    if alone and aggregators is not None:
        aggregators = aggregators.at_last_site()
    job = Job(
        checked[0].manifest.config,
        group.num_experts or len(checked),
        group.encoder_sets or encoder_sets([each.manifest.path for each in checked]),
        aggregators,
        group.companions.torch_dtype,
        work if checked[0].facts.kind.family.batches_guidance else unbatched,
        bits_of([each.manifest for each in checked], group.companions.torch_dtype),
        [each.manifest.config for each in checked] if group.fuse == "predictions" else (),
    )
    try:
        found = job.estimate()
    except AfaError as error:  # the configuration may lack the autoencoder
        report.findings.append(Finding(error.code, "note", "memory", str(error)))
        return
    report.estimates[group.label] = found
    report.findings += fits(job, found)


def _read_weights(
    checked: Sequence[CheckedExpert],
    dtype: torch.dtype,
    progress: Callable[[str, int, int], object],
) -> Iterator[Finding]:
    by_path = {each.manifest.path: each for each in checked}
    weights = []
    for path, each in by_path.items():
        name = each.facts.short
        if path.is_file():
            weights.append(Weights(name, [path], is_single=True))
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

    yield from check_values(weights, dtype, note)
