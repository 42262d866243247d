"""The families of ComfyUI's denoisers, and how ComfyUI calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afa.denoisers import FAMILIES, Family, register_family
from afa.errors import AfaError

from .flux import FLUX, flux_arguments, flux_first
from .mmdit import MMDIT, mmdit_arguments, mmdit_first
from .unet import UNET, unet_arguments, unet_first

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class ComfyFamily:
    """A family of ComfyUI's denoisers.

    Attributes:
        family: the record for afa.
        saved: the family's name in ensemble folders, which diffusers' twin has.
        arguments: a function of the arguments of ComfyUI's call, by ComfyUI's names, that returns
            those of an ensemble's call.
        first: a function of a denoiser, the conditions of a call by ComfyUI's names, and N that
            returns those of the first expert alone.
        has_wrappers: whether the denoiser calls the wrappers of `WrappersMP.DIFFUSION_MODEL`.
    """

    family: Family
    saved: str
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    first: Callable[[Any, Mapping[str, Any], int], dict[str, Any]]
    has_wrappers: bool = True


KNOWN = (
    ComfyFamily(UNET, "unet", unet_arguments, unet_first),
    ComfyFamily(FLUX, "flux", flux_arguments, flux_first),
    ComfyFamily(MMDIT, "sd3", mmdit_arguments, mmdit_first, has_wrappers=False),
)


def comfy_family(denoiser: Any) -> ComfyFamily:
    """The family of a denoiser; registers all families at the first call.

    Raises:
        AfaError: if there is none, or if it does not support the denoiser.
    """
    for known in KNOWN:
        if known.family not in FAMILIES:
            register_family(known.family)
    for known in KNOWN:
        if type(denoiser) is known.family.model_class:
            known.family.check(denoiser)
            return known
    names = ", ".join(known.family.model_class.__name__ for known in KNOWN)
    raise AfaError(
        "AFA-COMFY-003",
        f"A {type(denoiser).__name__} cannot be an expert in ComfyUI; only {names} can. Use models "
        "of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, or of Flux 1.",
    )
