"""Differences between kinds of devices that torch does not hide."""

from __future__ import annotations

import torch

from afa.errors import AfaError

#: kinds of devices without float64: Apple's Metal
WITHOUT_FLOAT64 = {"mps"}


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device without it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def place_for_float64(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU for a device without float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def may_overlap(source: torch.device, target: torch.device) -> bool:
    """Whether a copy may go on while the program continues (`non_blocking`).

    Metal does not keep the memory of the source alive, nor order the copy before later reads.
    """
    return "mps" not in (source.type, target.type)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def has_shared_gpus() -> bool:
    """Whether several processes can work on this machine's GPUs; Metal has no communication."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return current is not None and current.type != "mps"


def require_dtype(device: torch.device | str, dtype: torch.dtype) -> None:
    """Require that a device has a type of numbers.

    Raises:
        AfaError: if it does not, such as bfloat16 with Metal before macOS 14.
    """
    try:
        torch.zeros(1, dtype=dtype, device=device)
    except TypeError as error:  # of Metal
        name = str(dtype).removeprefix("torch.")
        raise AfaError(
            "AFA-MACHINE-005",
            f"The device '{device}' has no {name}: {str(error).splitlines()[0].rstrip('.')}. Use "
            "float32 without quantize, or the device cpu.",
        ) from error
