"""What afa must know of the autoencoders of pipelines: their latents and how these are scaled."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Autoencoder:
    """Diffusers' `AutoencoderKL`.

    Attributes:
        class_name: of the class in diffusers.
        latents: the settings that must be equal for models to share one latent space.
    """

    class_name = "AutoencoderKL"
    latents: tuple[str, ...] = ("latent_channels", "scaling_factor", "shift_factor")

    @property
    def model_class(self) -> Any:
        """The class in diffusers."""
        return getattr(diffusers, self.class_name)

    def space(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings `latents` of a configuration, with the library's defaults."""
        defaults = inspect.signature(self.model_class).parameters
        return {key: config.get(key, defaults[key].default) for key in self.latents}

    def channels(self, config: Any) -> int:
        """The channels C of a latent."""
        return config["latent_channels"]

    def shrink(self, config: Any) -> int:
        """The side of a picture divided by that of its latent."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, C, H, W], of the latents of pictures [B, 3, H', W']."""
        found = vae.encode(pixels).latent_dist
        return found.mean, found.logvar

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        """Scale latents [B, C, H, W] as the denoiser receives them."""
        config = vae.config
        return (latents - (config["shift_factor"] or 0)) * config["scaling_factor"]

    def packed(self, latents: Tensor) -> Tensor:
        """Convert the latents of the autoencoder to those of the denoiser, [B, C, H, W]."""
        return latents

    def shape(self, config: Any, height: int, width: int) -> tuple[int, int, int]:
        """The shape [C, H, W] of the denoiser's latent of a picture."""
        shrink = self.shrink(config)
        return self.channels(config), height // shrink, width // shrink

    def decoded(self, vae: Any, side: int, dtype: torch.dtype) -> Tensor:
        """Decode an empty latent of the autoencoder, with this side, on the meta device."""
        latent = torch.empty(1, self.channels(vae.config), side, side, device="meta", dtype=dtype)
        return vae.decode(latent).sample


class _QwenImage(Autoencoder):
    """`AutoencoderKLQwenImage`, of videos of one frame, whose latents are scaled by channel."""

    class_name = "AutoencoderKLQwenImage"
    latents = ("z_dim", "latents_mean", "latents_std")

    def channels(self, config: Any) -> int:
        return config["z_dim"]

    def shrink(self, config: Any) -> int:
        return 2 ** len(config["temperal_downsample"])

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = super().posterior(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), logvar.squeeze(2)

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(vae.config[name]).to(latents).view(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std

    def decoded(self, vae: Any, side: int, dtype: torch.dtype) -> Tensor:
        shape = (1, self.channels(vae.config), 1, side, side)
        return vae.decode(torch.empty(shape, device="meta", dtype=dtype)).sample


class _Flux2(Autoencoder):
    """`AutoencoderKLFlux2`: 2 x 2 pixels of its latent are one of the denoiser's, then normalised.

    The statistics are weights of the autoencoder, not settings.
    """

    class_name = "AutoencoderKLFlux2"
    latents = ("latent_channels", "patch_size", "batch_norm_eps")

    def channels(self, config: Any) -> int:
        return 4 * config["latent_channels"]

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = super().posterior(vae, pixels)
        return self.packed(mean), self.packed(logvar)

    def packed(self, latents: Tensor) -> Tensor:
        return diffusers.Flux2KleinPipeline._patchify_latents(latents)

    def scaled(self, vae: Any, latents: Tensor) -> Tensor:
        mean, variance = (
            each.to(latents).view(-1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var)
        )
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def shape(self, config: Any, height: int, width: int) -> tuple[int, int, int]:
        channels, rows, columns = super().shape(config, height, width)
        return channels, rows // 2, columns // 2

    def decoded(self, vae: Any, side: int, dtype: torch.dtype) -> Tensor:
        shape = (1, vae.config.latent_channels, side, side)
        return vae.decode(torch.empty(shape, device="meta", dtype=dtype)).sample


_KNOWN = {each.class_name: each for each in (Autoencoder(), _QwenImage(), _Flux2())}


def autoencoder_named(class_name: str) -> Autoencoder:
    """What is known of an autoencoder, by the name of its class.

    Raises:
        AfaError: if it is not supported.
    """
    if class_name not in _KNOWN:
        raise AfaError(
            "AFA-MODEL-027",
            f"The autoencoder is a {class_name}, which is not supported; it must be one of "
            f"{', '.join(_KNOWN)}. Use another autoencoder.",
        )
    return _KNOWN[class_name]


def autoencoder_of(vae: Any) -> Autoencoder:
    """What is known of a loaded autoencoder.

    Raises:
        AfaError: see `autoencoder_named`.
    """
    names = [ancestor.__name__ for ancestor in type(vae).__mro__]
    return autoencoder_named(next((name for name in names if name in _KNOWN), names[0]))
