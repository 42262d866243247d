"""How the models of a library are described, built without data, and called."""

from __future__ import annotations

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Interface:
    """The interface of diffusers' models.

    A family whose models come from another library has a subclass of its own; see
    `Family.interface`.
    """

    def config(self, model: Any) -> Mapping[str, Any]:
        """The configuration of a model, in which experts of one architecture are equal."""
        return model.config

    def defaults(self, model: Any) -> Any:
        """The class whose constructor has the defaults of the configuration; None if none has."""
        return type(model)

    def without_data(self, model: Any, model_class: Any) -> Any:
        """Build a model of the same architecture on the default device, which is `meta`."""
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        return model_class.from_config(copy.deepcopy(config))

    def height(self, latent: Tensor) -> int:
        """The height of a model's square latent, [B, C, H, W] or tokens [B, H * W, C]."""
        return latent.shape[-2] if latent.ndim == 4 else math.isqrt(latent.shape[1])

    def signature(self, model_class: Any) -> inspect.Signature:
        """The signature of an ensemble's call; the latent is its first argument."""
        own = inspect.signature(model_class.forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the coroutine for those of a call, by name; the latent [B, ...] first.

        They contain the timestep as `timestep` and the text [B, L, D] as `encoder_hidden_states`.
        """
        return given

    def output(self, prediction: Tensor) -> Any:
        """The output of a call for the prediction of the coroutine, [B, ...]."""
        return prediction

    def prediction(self, output: Any) -> Tensor:
        """The prediction [B, ...] of the coroutine for the output of a call."""
        return output


DIFFUSERS = Interface()
