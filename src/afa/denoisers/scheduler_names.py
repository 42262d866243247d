"""The names of schedulers (samplers), as A1111, ComfyUI, kohya's scripts and diffusers have them.

A name is a sampler, such as `dpmpp_2m`, and optionally a spacing of the noise levels behind it:
`dpmpp_2m_karras`. `canonical_name` returns one spelling for all others.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        label: its name in A1111.
        diffusion: its class in diffusers, for models that predict noise or velocity.
        changes: the settings of this class that make it this sampler.
        flow: its class for flow matching; None if there is none whose pictures are reproducible.
        flow_changes: the same for this class.
        shifts: whether the class for flow matching has shifts that depend on the picture's size.
        calls_twice: whether it calls the denoiser twice in a step.
        aliases: other names, normalised.
    """

    label: str
    diffusion: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    flow: str | None = None
    flow_changes: Mapping[str, Any] = field(default_factory=dict)
    shifts: bool = False
    calls_twice: bool = False
    aliases: tuple[str, ...] = ()


_FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_MULTISTEP = "DPMSolverMultistepScheduler"


def _multistep(algorithm: str, order: int) -> dict[str, Any]:
    solver = {"algorithm_type": algorithm, "solver_order": order, "solver_type": "midpoint"}
    return {**solver, "use_lu_lambdas": False, "euler_at_final": False}


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(
        "Euler",
        "EulerDiscreteScheduler",
        flow="FlowMatchEulerDiscreteScheduler",
        shifts=True,
    ),
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler", aliases=("euler_ancestral",)),
    "heun": Sampler(
        "Heun",
        "HeunDiscreteScheduler",
        flow="FlowMatchHeunDiscreteScheduler",
        calls_twice=True,
    ),
    "dpm2": Sampler("DPM2", "KDPM2DiscreteScheduler", calls_twice=True, aliases=("dpm_2",)),
    "dpm2_a": Sampler(
        "DPM2 a",
        "KDPM2AncestralDiscreteScheduler",
        calls_twice=True,
        aliases=("dpm_2_a", "dpm_2_ancestral", "dpm2_ancestral"),
    ),
    "lms": Sampler("LMS", "LMSDiscreteScheduler"),
    "dpmpp_2m": Sampler(
        "DPM++ 2M",
        _MULTISTEP,
        _multistep("dpmsolver++", 2),
        flow=_MULTISTEP,
        flow_changes={**_multistep("dpmsolver++", 2), **_FLOW_SIGMAS},
        aliases=("dpmsolverpp", "dpmpp2m"),
    ),
    "dpmpp_2m_sde": Sampler(
        "DPM++ 2M SDE",
        _MULTISTEP,
        _multistep("sde-dpmsolver++", 2),
        aliases=("dpmpp_2m_sde_gpu",),
    ),
    "dpmpp_3m_sde": Sampler(
        "DPM++ 3M SDE",
        _MULTISTEP,
        _multistep("sde-dpmsolver++", 3),
        aliases=("dpmpp_3m_sde_gpu",),
    ),
    "dpmpp_2s": Sampler(
        "DPM++ 2S",
        "DPMSolverSinglestepScheduler",
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
        aliases=("dpmsingle",),
    ),
    "ddim": Sampler("DDIM", "DDIMScheduler"),
    "ddpm": Sampler("DDPM", "DDPMScheduler"),
    "pndm": Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}, aliases=("plms",)),
    "unipc": Sampler(
        "UniPC",
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "predict_x0": True},
        flow="UniPCMultistepScheduler",
        flow_changes={
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            **_FLOW_SIGMAS,
        },
        shifts=True,
        aliases=("uni_pc", "uni_pc_bh2"),
    ),
    "deis": Sampler("DEIS", "DEISMultistepScheduler"),
    "lcm": Sampler("LCM", "LCMScheduler"),
    "tcd": Sampler("TCD", "TCDScheduler"),
}
#: for models that were distilled for few steps
FOR_DISTILLED = ("lcm", "tcd")


class Spacing(NamedTuple):
    """A spacing of the noise levels: its name in A1111, and the settings of a class for it."""

    label: str
    changes: dict[str, Any]


SPACINGS = {
    "karras": Spacing("Karras", {"use_karras_sigmas": True}),
    "exponential": Spacing("Exponential", {"use_exponential_sigmas": True}),
    "beta": Spacing("Beta", {"use_beta_sigmas": True}),
    "sgm_uniform": Spacing("SGM Uniform", {"timestep_spacing": "trailing"}),
}
#: other names of spacings; those of the empty name are the experts' own spacing
_SPACING_ALIASES = {"trailing": "sgm_uniform", "uniform": "", "normal": "", "discrete": ""}
#: known elsewhere, without an equal in diffusers; and the nearest sampler
_UNAVAILABLE = {
    "dpmpp_sde": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2s_a": "dpmpp_2s",
    "dpmpp_2s_ancestral": "dpmpp_2s",
    "dpmpp_2m_sde_heun": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde",
    "dpm_fast": "dpmpp_2m",
    "dpm_adaptive": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
    "restart": "heun",
    "heunpp2": "heun",
    "ddim_cfgpp": "ddim",
    "euler_cfg_pp": "euler",
    "euler_ancestral_cfg_pp": "euler_a",
    "ipndm": "pndm",
    "ipndm_v": "pndm",
    "res_multistep": "dpmpp_2m",
    "sa_solver": "dpmpp_2m_sde",
}
_ALIASES = {alias: name for name, each in SAMPLERS.items() for alias in (name, *each.aliases)}
_CLASSES = {
    _class.lower().removesuffix("scheduler"): name
    for name, each in reversed(SAMPLERS.items())  # the plain one of several of one class
    for _class in (each.diffusion, each.flow)
    if _class is not None
}


def canonical_name(given: str) -> str:
    """Return the one spelling of a scheduler's name.

    Args:
        given: as in A1111 (`DPM++ 2M Karras`), ComfyUI (`dpmpp_2m karras`), kohya's scripts
            (`k_euler_a`), or the name of a class of diffusers.

    Returns: a sampler of `SAMPLERS`, with `_` and a spacing of `SPACINGS` or without.

    Raises:
        AfaError: if it is unknown, or has no equal in diffusers.
    """
    sampler, spacing = split_name(given)
    return f"{sampler}_{spacing}" if spacing else sampler


def scheduler_name(given: str | None) -> str | None:
    """Validate a scheduler in a recipe, as `canonical_name`; None for the models' own.

    Raises:
        ValueError: if it is unknown.
    """
    return given if given is None else canonical_name(given)


def split_name(given: str) -> tuple[str, str]:
    """Return the sampler and the spacing of a name; the spacing is empty for the experts' own.

    Raises:
        AfaError: see `canonical_name`.
    """
    text = _normalised(given)
    for whole, spacing in _endings(text):
        sampler = _ALIASES.get(whole) or _CLASSES.get(whole.removesuffix("scheduler"))
        if sampler is not None:
            return sampler, spacing
    known = ", ".join(SAMPLERS)
    nearest = next((_UNAVAILABLE[e] for e, _ in _endings(text) if e in _UNAVAILABLE), None)
    if nearest is not None:
        raise AfaError(
            "AFA-DRAW-019",
            f"The scheduler '{given}' has no equal in diffusers. The nearest one is {nearest}; "
            f"there are {known}.",
        )
    spellings = [*_ALIASES, *(f"{name}_{end}" for name in SAMPLERS for end in SPACINGS)]
    close = difflib.get_close_matches(text, spellings, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise AfaError(
        "AFA-DRAW-020",
        f"Unknown scheduler '{given[:80]}'.{hint} It must be one of {known}, optionally with "
        f"{', '.join(f'_{end}' for end in SPACINGS)}.",
    )


def calls_twice(name: str) -> bool:
    """Whether a scheduler calls the denoiser twice in a step."""
    return SAMPLERS[split_name(name)[0]].calls_twice


def a1111_name(name: str) -> str:
    """Return A1111's name of a scheduler of `canonical_name`."""
    sampler, spacing = split_name(name)
    label = SAMPLERS[sampler].label
    return f"{label} {SPACINGS[spacing].label}" if spacing else label


def _normalised(given: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "_", given.strip().lower().replace("+", "p")).strip("_")
    return text.removeprefix("k_")


def _endings(text: str) -> list[tuple[str, str]]:
    """All readings of a normalised name as a sampler and a spacing."""
    found = [(text, "")]
    for end in (*SPACINGS, *_SPACING_ALIASES):
        if text.endswith(f"_{end}"):
            found.append((text.removesuffix(f"_{end}"), _SPACING_ALIASES.get(end, end)))
    return found
