"""The experts' text encoders as one drop-in `text_encoder`, and hashes of weights."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from afa.denoisers.family import Widths, text_config
from afa.denoisers.splitting import split_joined
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


#: outputs of language models that no pipeline reads: the state of a generation, and scores of words
_OF_LANGUAGE_MODELS = ("past_key_values", "logits", "rope_deltas")


class EnsembleTextEncoder(PreTrainedModel):
    """Run N text encoders of one tokenizer and concatenate their embeddings to [B, L, N * D].

    Encoders with identical weights run once. If all are identical, the output is one embedding
    [B, L, D], which `EnsembleDenoiser` uses for all experts.

    Args:
        encoders: one per expert, all of the same class, width and depth.
        join: concatenate N embeddings even if all encoders are identical, because another text
            encoder of the same pipeline differs between experts.

    Raises:
        AfaError: if there are no encoders, or they differ in class, width or depth.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    # the composite has no attention of its own; the encoders select their implementation
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoders: Sequence[PreTrainedModel], *, join: bool = False) -> None:
        if not encoders:
            raise AfaError(
                "AFA-ENSEMBLE-057",
                "An ensemble's text encoder must have at least one encoder; got none.",
            )
        super().__init__(copy.deepcopy(encoders[0].config))
        shapes = [
            (type(e).__name__, text_config(e).hidden_size, text_config(e).num_hidden_layers)
            for e in encoders
        ]
        if len(set(shapes)) > 1:
            raise AfaError(
                "AFA-ENSEMBLE-058",
                "The experts' text encoders must have the same class, width and depth; got "
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
        if last_norm(encoders[0]) is not None:
            # with `clip_skip`, stock pipelines apply this norm to an earlier layer's output
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

        Returns: the encoders' output object. Every tensor in it, such as `last_hidden_state` and
            each of `hidden_states`, is [..., N * D], or [..., D] if all experts share one encoder.
        """
        outputs = [
            encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **{**_shortened(encoder), **kwargs},
            )
            for encoder in self.encoders
        ]
        joined = type(outputs[0])(
            **{
                key: self._join([output[key] for output in outputs])
                for key in outputs[0]
                if key not in _OF_LANGUAGE_MODELS
            }
        )
        return joined.to_tuple() if return_dict is False else joined

    # -- textual inversion: the same tokens for every expert ----------------------------------

    def get_input_embeddings(self) -> Any:
        """The token embeddings of all encoders as one; rows are written to every encoder."""
        return _EveryEmbedding([encoder.get_input_embeddings() for encoder in self.encoders])

    def set_input_embeddings(self, value: Any) -> None:
        """Refuse one embedding for all encoders, because the experts' embeddings differ.

        Raises:
            AfaError: always.
        """
        _EveryEmbedding.refuse()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Add rows for new tokens to the embeddings of every encoder."""
        for encoder in self.encoders:
            encoder.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.encoders[0].config.vocab_size
        return self.get_input_embeddings()

    def _join(self, values: Sequence[Any]) -> Any:
        """Concatenate the experts' tensors, or tuples of tensors, on the last axis."""
        if not self.is_joined:
            return values[0]
        if isinstance(values[0], tuple):
            return tuple(self._join(layer) for layer in zip(*values, strict=True))
        return torch.cat([values[n] for n in self.encoder_of], dim=-1)

    def _final_layer_norm(self, hidden: Tensor) -> Tensor:
        """Apply each encoder's last norm to its part of [B, L, N * D], or to [B, L, D]."""
        if not self.is_joined:
            return last_norm(self.encoders[0])(hidden)
        parts = hidden.chunk(len(self.encoder_of), dim=-1)
        normed = [
            last_norm(self.encoders[n])(part)
            for n, part in zip(self.encoder_of, parts, strict=True)
        ]
        return torch.cat(normed, dim=-1)


def _shortened(encoder: Any) -> dict[str, Any]:
    """Arguments with which a language model computes only what pipelines read."""
    least = {"use_cache": False, "logits_to_keep": 1}
    taken = inspect.signature(encoder.forward).parameters
    return {name: value for name, value in least.items() if name in taken}


class _EveryEmbedding:
    """The interface of an embedding that textual inversion uses; it writes to several at once."""

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
        return self  # every embedding stays on its encoder's device

    @staticmethod
    def refuse() -> NoReturn:
        raise AfaError(
            "AFA-ENSEMBLE-059",
            "Every expert's text encoder has its own embeddings, so they cannot be read or set as "
            "one, and tokens of a textual inversion cannot be removed. Load the ensemble again.",
        )

    def __getitem__(self, rows: Any) -> NoReturn:
        self.refuse()

    def __setitem__(self, token: int, row: Tensor) -> None:
        for embedding in self._embeddings:
            embedding.weight.data[token] = row.to(embedding.weight)


def last_norm(encoder: Any) -> Any:
    """The last norm of a CLIP text encoder; None for other encoders."""
    # in transformers 5 it is on the model itself, or one level deeper with a projection
    inner = getattr(encoder, "text_model", encoder)
    return inner._modules.get("final_layer_norm")


def first_equal(module: Any, known: Iterable[Any]) -> Any:
    """The first known module with the same weights, or the module itself if there is none."""
    return next((other for other in known if _are_equal(module, other)), module)


def share_equal(modules: Sequence[Any]) -> list[Any]:
    """Replace every module by the first one with the same weights; the order stays."""
    shared: list[Any] = []
    for module in modules:
        shared.append(first_equal(module, shared))
    return shared


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether the state dicts are equal in names, data types and values."""
    if first is second:
        return True
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name].to(tensor.device))
        for name, tensor in ours.items()
    )


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of the names, data types, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


#: entries of a configuration that depend on the software that wrote it
_WRITTEN_BY = ("transformers_version", "torch_dtype", "dtype", "architectures")


def configuration_of(model: Any) -> dict[str, Any]:
    """A component's configuration as JSON, without its path and the release that wrote it.

    Two models with equal weights can differ in it, for instance in the activation.
    """
    config = model.config
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {k: v for k, v in entries.items() if not k.startswith("_") and k not in _WRITTEN_BY}
    kept["class"] = type(model).__name__
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def attach_controlnet(
    controlnet: Any, num_experts: int, expert: int = 0, widths: Widths | None = None
) -> None:
    """Pass one expert's part of the concatenated text embedding to a ControlNet.

    A ControlNet is trained with the text encoders of one model, but an ensemble's pipeline passes
    it the embeddings of all experts, [B, L, N * D]. After this call it receives [B, L, D]. Its
    class does not change.

    Args:
        controlnet: a ControlNet whose config has `cross_attention_dim`; changed in place.
        num_experts: N.
        expert: the number of the expert, from 0, whose embedding it receives.
        widths: the ensemble's widths, `pipeline.unet.widths`; needed for Stable Diffusion XL.

    Raises:
        AfaError: if there is no such expert; in a later call, if the embedding has another width.
    """
    if not 0 <= expert < num_experts:
        raise AfaError(
            "AFA-ENSEMBLE-060", f"expert must be from 0 to {num_experts - 1}; got {expert}."
        )
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
