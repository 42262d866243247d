"""The student: initial weights, what is trained, and the files that it becomes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.distilling.features import distance, expose_features
from afa.distilling.recipe import InitialExpert
from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.loading.compare import compare
from afa.loading.expert_source import ExpertSource
from afa.loading.finding import require_none_wrong
from afa.loading.manifest import read_manifest
from afa.loading.pipeline import load_single, with_parts
from afa.loading.single_file.autoencoder import load_vae
from afa.lora.adapters import add_adapters
from afa.training.loop import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.distilling.recipe import FeaturesRecipe, StudentRecipe
    from afa.distilling.teacher import Teacher
    from afa.training.engine import Engine
    from afa.training.recipe import TrainingRecipe

#: name of the adapter in PEFT
_ADAPTER = "student"


def initial_source(teacher: Teacher, init: Any) -> ExpertSource | None:
    """Return the source of the student's initial weights; None for the mean of the experts.

    Raises:
        AfaError: if it names an expert that the teacher does not have.
    """
    if init == "merge":
        return None
    return teacher.expert(init.expert) if isinstance(init, InitialExpert) else init


def require_fit(teacher: Teacher, asked: StudentRecipe) -> None:
    """Check, before any model is loaded, that the student has the teacher's architecture.

    Raises:
        AfaError: if it has not, or a model cannot be found.
    """
    experts = teacher.manifests()
    facts = [expert.facts for expert in experts]
    source = initial_source(teacher, asked.init)
    if source is not None and source.lora is not None and asked.lora_rank is not None:
        raise AfaError(
            "AFA-DISTILL-019",
            f"student.init is the LoRA '{source.lora}' on a base, which the LoRA of the student "
            "would not contain. Set student.init to a complete model, or what: full.",
        )
    try:
        if source is not None:  # the student makes the predictions of the first expert's kind
            facts = [facts[0], read_manifest(source, teacher.companions()).facts]
        require_none_wrong(compare(facts, allow_duplicates=True, converts=False))
    except AfaError as error:
        raise AfaError(
            "AFA-DISTILL-011",
            "The student must have the architecture and the prediction type of the teacher's "
            f"first expert. {error} Set student.init to such a model.",
        ) from error


def load_student(teacher: Teacher, asked: StudentRecipe) -> tuple[DiffusionPipeline, list[str]]:
    """Load the student's pipeline in float32, with the teacher's autoencoder.

    Args:
        teacher: supplies autoencoder, and the scheduler of its first expert.
        asked: the student.

    Returns: the pipeline, and the hashes of all models that its weights are from.

    Raises:
        AfaError: see `load_single`.
    """
    companions = teacher.companions()
    source = initial_source(teacher, asked.init)
    if source is None:
        pipeline, hashes = _mean(teacher)
    else:
        pipeline, reference = load_single(source, companions=companions, dequantise=True)
        hashes = [reference.identity]
    frame = pipeline
    if source is not None and source != teacher.experts[0]:
        frame, _ = load_single(teacher.experts[0], companions=companions)
    vae = frame.vae
    if teacher.vae is not None:
        path = read_manifest(teacher.experts[0], companions).config
        vae, _ = load_vae(teacher.vae, config=path)
    parts = {"vae": vae, "scheduler": frame.scheduler}
    return with_parts(pipeline, parts), [*hashes, hash_weights(vae)]


def _mean(teacher: Teacher) -> tuple[DiffusionPipeline, list[str]]:
    """Return the mean of the teacher's experts, with two of them in memory at once."""
    companions = teacher.companions()
    total, reference = load_single(teacher.experts[0], companions=companions, dequantise=True)
    hashes = [reference.identity]
    for source in teacher.experts[1:]:
        other, reference = load_single(source, companions=companions, dequantise=True)
        hashes.append(reference.identity)
        for name, own in _models(total).items():
            state = _models(other)[name].state_dict()
            for key, tensor in own.state_dict().items():
                if tensor.is_floating_point():
                    tensor.add_(state[key])
        del other
    for own in _models(total).values():
        for tensor in own.state_dict().values():
            if tensor.is_floating_point():
                tensor.div_(len(teacher.experts))
    return total, hashes


def _models(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the denoiser and the text encoders by component name."""
    name = kind_of_pipeline(pipeline).denoiser
    return {
        key: part
        for key, part in pipeline.components.items()
        if isinstance(part, nn.Module) and (key == name or key.startswith("text_encoder"))
    }


class Student:
    """The trained part of the student's pipeline; see `afa.training.trained.Trained`.

    Args:
        pipeline: of `load_student`.
        asked: what is trained.
        hashes: of `load_student`.
        seed: seed of the adapters' initial weights.
        device: of the pipeline.
        features: a loss of features; None for none.

    Raises:
        AfaError: if a site of `features` does not exist, or there is no text encoder whose LoRA
            programs load.
    """

    name: ClassVar[str] = "student"

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        asked: StudentRecipe,
        hashes: list[str],
        seed: int,
        device: torch.device,
        features: FeaturesRecipe | None = None,
    ) -> None:
        self.pipeline, self.rank = pipeline, asked.lora_rank
        self._hashes, self._trains_text = hashes, asked.text_encoder
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        models = _models(pipeline)
        denoiser = kind_of_pipeline(pipeline).denoiser
        #: the models that are trained, by component name
        self.models = {
            key: model for key, model in models.items() if key == denoiser or asked.text_encoder
        }
        if self.rank is not None and asked.text_encoder:
            # programs load LoRAs of CLIP alone
            self.models = {k: m for k, m in self.models.items() if k == denoiser or self.is_clip(k)}
            if len(self.models) == 1:
                raise AfaError(
                    "AFA-DISTILL-020",
                    "This model has no text encoder of CLIP, and programs load LoRAs of no other. "
                    "Set student.text_encoder: false, or what: full.",
                )
        self._features, self._tap = features, None
        if features is not None:
            self._tap = expose_features(models[denoiser], features.sites)
        if self.rank is None:
            for model in self.models.values():
                model.requires_grad_(True)
        else:
            with seeded(seed):
                for key, model in self.models.items():
                    add_adapters(model, self.rank, _ADAPTER, is_text=key != denoiser)
        pipeline.to(device)
        self.modules: list[nn.Module] = list(self.models.values())
        self.parameters = [p for _, p in self.named()]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters with their names, in the order of the optimizer."""
        for key, model in self.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    yield f"{key}.{name}", parameter

    def feature_loss(self, targets: dict[str, Tensor]) -> Tensor:
        """The weighted distance of the last call's features from the teacher's."""
        assert self._features is not None, "the recipe has features"
        assert self._tap is not None, "the recipe has features"
        return self._features.weight * distance(self._tap.seen, targets)

    def tensors(self) -> dict[str, Tensor]:
        """See `Trained`."""
        return {name: parameter.detach() for name, parameter in self.named()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load trained parameters.

        Raises:
            AfaError: if the names or shapes differ.
        """
        own = dict(self.named())
        if {name: t.shape for name, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise AfaError(
                "AFA-DISTILL-012",
                "The checkpoint is of a student with other parameters. Delete the checkpoints to "
                "start again, or pass another output folder.",
            )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def identities(self) -> list[str]:
        """See `Trained`."""
        return self._hashes

    def place(self, engine: Engine, settings: TrainingRecipe) -> None:
        """Refuse what is not supported with several processes.

        Raises:
            AfaError: with FSDP, or if text encoders are trained by several processes.
        """
        del settings
        if engine.is_sharding:
            raise AfaError(
                "AFA-DISTILL-013",
                "A student cannot be trained with FSDP. Configure accelerate for data parallelism, "
                "or start one process.",
            )
        if self._trains_text and engine.num_processes > 1:
            raise AfaError(
                "AFA-DISTILL-014",
                "Text encoders can only be trained in one process. Set student.text_encoder: "
                "false, or start one process.",
            )

    def working(self, engine: Engine, settings: TrainingRecipe) -> ExitStack:
        """Return a context in which activations are recomputed, if the settings ask for it."""
        del engine
        stack = ExitStack()
        if settings.gradient_checkpointing:
            denoiser = denoiser_of(self.pipeline) if self._tap is None else self._tap.ensemble
            denoiser.enable_gradient_checkpointing()
            stack.callback(denoiser.disable_gradient_checkpointing)
        return stack

    def adapters(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Return the factors of each layer's change, by component and layer: down, up."""
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for key, model in self.models.items():
            found[key] = {}
            for layer, module in model.named_modules():
                if hasattr(module, "lora_A") and _ADAPTER in module.lora_A:
                    down, up = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
                    found[key][layer] = (down.detach().cpu(), up.detach().cpu())
        return found

    def is_clip(self, part: str) -> bool:
        """Whether a component is a text encoder of CLIP."""
        return str(getattr(self.models[part].config, "model_type", "")).startswith("clip")
