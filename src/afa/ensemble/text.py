"""The experts' text encoders as one drop-in `text_encoder`."""

from __future__ import annotations

import copy
import hashlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from afa.denoisers.family import Widths, split_joined
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class EnsembleTextEncoder(PreTrainedModel):
    """N text encoders of one tokenizer; their embeddings travel concatenated on the last axis.

    Encoders with identical weights are run once. Where all are identical, the output is a single
    embedding [B, L, D], which `EnsembleDenoiser` takes for all experts.

    Args:
        encoders: one per expert, of one class and width.
        join: concatenate N embeddings even where all are identical, since another text encoder of
            the same pipeline differs.

    Raises:
        AfaError: none, or encoders of different classes, widths or layer counts.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    # whatever the encoders do: the composite has no attention of its own
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoders: Sequence[PreTrainedModel], *, join: bool = False) -> None:
        if not encoders:
            raise AfaError(
                "AFA-ENSEMBLE-057", "A text encoder must have at least one expert's, came none."
            )
        super().__init__(copy.deepcopy(encoders[0].config))
        shapes = [
            (type(e).__name__, e.config.hidden_size, e.config.num_hidden_layers) for e in encoders
        ]
        if len(set(shapes)) > 1:
            raise AfaError(
                "AFA-ENSEMBLE-058",
                "The experts' text encoders must have one class, width and depth; came "
                f"{', '.join(f'{name} {width} x {depth}' for name, width, depth in shapes)}. "
                "Ensemble checkpoints of one family.",
            )
        shared = share_equal(encoders)
        distinct = list(dict.fromkeys(shared))
        #: which of the distinct encoders each expert uses
        self.encoder_of: list[int] = [distinct.index(encoder) for encoder in shared]
        self.encoders: Any = nn.ModuleList(distinct)
        self.encoders.requires_grad_(False)
        self.is_joined = join or len(distinct) > 1
        if _last_norm(encoders[0]) is not None:
            # where stock pipelines look for the last norm when they skip layers (`clip_skip`)
            self.text_model = SimpleNamespace(final_layer_norm=self._final_layer_norm)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode token ids [B, L] with every distinct encoder.

        Returns: the encoders' own output object, in which every tensor, such as
            `last_hidden_state` and each of `hidden_states`, is [..., N * D], or [..., D] where all
            experts share one encoder.
        """
        outputs = [
            encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **kwargs,
            )
            for encoder in self.encoders
        ]
        joined = type(outputs[0])(
            **{key: self._join([output[key] for output in outputs]) for key in outputs[0]}
        )
        return joined.to_tuple() if return_dict is False else joined

    # -- textual inversion: the same words for every expert -----------------------------------

    def get_input_embeddings(self) -> Any:
        """The embeddings of all encoders as one, whose rows are written to every encoder."""
        return _EveryEmbedding([encoder.get_input_embeddings() for encoder in self.encoders])

    def set_input_embeddings(self, value: Any) -> None:
        """Refused: the experts' embeddings differ.

        Raises:
            AfaError: always.
        """
        _EveryEmbedding.refuse()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Make room for new words in every encoder."""
        for encoder in self.encoders:
            encoder.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.encoders[0].config.vocab_size
        return self.get_input_embeddings()

    def _join(self, values: Sequence[Any]) -> Any:
        """Concatenate tensors, or tuples of them, on the last axis, one part per expert."""
        if not self.is_joined:
            return values[0]
        if isinstance(values[0], tuple):
            return tuple(self._join(layer) for layer in zip(*values, strict=True))
        return torch.cat([values[n] for n in self.encoder_of], dim=-1)

    def _final_layer_norm(self, hidden: Tensor) -> Tensor:
        """Every encoder's own last norm on its own part of [B, L, N * D] or [B, L, D]."""
        if not self.is_joined:
            return _last_norm(self.encoders[0])(hidden)
        parts = hidden.chunk(len(self.encoder_of), dim=-1)
        normed = [
            _last_norm(self.encoders[n])(part)
            for n, part in zip(self.encoder_of, parts, strict=True)
        ]
        return torch.cat(normed, dim=-1)


class _EveryEmbedding:
    """As much of an embedding as textual inversion asks for, written to several at once."""

    def __init__(self, embeddings: Sequence[nn.Embedding]) -> None:
        self._embeddings = embeddings
        self.embedding_dim = embeddings[0].embedding_dim

    @property
    def weight(self) -> _EveryEmbedding:
        return self

    @property
    def data(self) -> _EveryEmbedding:
        return self

    @property
    def shape(self) -> torch.Size:
        return self._embeddings[0].weight.shape

    def to(self, **_: Any) -> _EveryEmbedding:
        return self  # each is where its encoder is

    @staticmethod
    def refuse() -> NoReturn:
        raise AfaError(
            "AFA-ENSEMBLE-059",
            "The embeddings of an ensemble must stay each expert's own; words that were added are "
            "not taken back. Load the ensemble again.",
        )

    def __getitem__(self, rows: Any) -> NoReturn:
        self.refuse()

    def __setitem__(self, token: int, row: Tensor) -> None:
        for embedding in self._embeddings:
            embedding.weight.data[token] = row.to(embedding.weight)


def _last_norm(encoder: Any) -> Any:
    """CLIP's; None of others."""
    # transformers 5 has the norm on the model itself, the variant with projection one deeper
    inner = getattr(encoder, "text_model", encoder)
    return inner._modules.get("final_layer_norm")


def first_equal(module: Any, known: Iterable[Any]) -> Any:
    """The first of the known modules that has the same weights; the module itself if none has."""
    return next((other for other in known if _are_equal(module, other)), module)


def share_equal(modules: Sequence[Any]) -> list[Any]:
    """The modules in their order, with the first in the place of all that have its weights."""
    shared: list[Any] = []
    for module in modules:
        shared.append(first_equal(module, shared))
    return shared


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights have equal names, types and values; most that differ do at the first."""
    if first is second:
        return True
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name].to(tensor.device))
        for name, tensor in ours.items()
    )


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


#: of a configuration: where and by what it was written
_WRITTEN_BY = ("transformers_version", "torch_dtype", "dtype", "architectures")


def configuration_of(model: Any) -> dict[str, Any]:
    """A part's configuration as JSON, without where it lies and which release wrote it.

    Two models with equal weights may differ by it alone, for instance in an activation.
    """
    config = model.config
    told = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {k: v for k, v in told.items() if not k.startswith("_") and k not in _WRITTEN_BY}
    kept["class"] = type(model).__name__
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def attach_controlnet(
    controlnet: Any, num_experts: int, expert: int = 0, widths: Widths | None = None
) -> None:
    """Let a ControlNet read one expert's part of the concatenated text embedding.

    A ControlNet was trained with the text encoders of one model; an ensemble's pipeline hands it
    those of all, [B, L, N * D]. After this call it sees [B, L, D]. The class stays stock.

    Args:
        controlnet: any ControlNet whose config has `cross_attention_dim`.
        num_experts: N.
        expert: whose embedding it sees, from 0.
        widths: those of the ensemble, `pipeline.unet.widths`, for Stable Diffusion XL.

    Raises:
        AfaError: there is no such expert; in a call, an embedding of another width.
    """
    if not 0 <= expert < num_experts:
        raise AfaError("AFA-ENSEMBLE-060", f"expert must be 0 to {num_experts - 1}, came {expert}.")
    widths = widths or Widths((controlnet.config.cross_attention_dim,))

    def own(joined: Tensor, parts: tuple[int, ...]) -> Tensor:
        return split_joined("text embedding", joined, parts, num_experts)[expert]

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text, added = kwargs.get("encoder_hidden_states"), kwargs.get("added_cond_kwargs") or {}
        if text is not None:
            kwargs["encoder_hidden_states"] = own(text, widths.text)
        if "text_embeds" in added:
            pooled = own(added["text_embeds"], widths.pooled)
            kwargs["added_cond_kwargs"] = {**added, "text_embeds": pooled}
        return args, kwargs

    controlnet.register_forward_pre_hook(narrow, with_kwargs=True)
