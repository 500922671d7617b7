"""Attention kernels behind one protocol, one file per backend: fa4, cudnn, flash2 (CUDA), cpu, reference (float64)."""

from __future__ import annotations

import torch

from megatron_vila.errors import SettingError
from megatron_vila.parallel.kernels import cpu, cudnn, fa4, flash2, reference
from megatron_vila.parallel.kernels.protocol import AttentionKernel
from megatron_vila.parallel.kernels.segments import Segments

__all__ = ["KERNELS", "AttentionKernel", "Segments", "faster_kernels", "require_kernel", "select_kernel"]

KERNELS = {
    "fa4": (fa4.available, fa4.Fa4Kernel),
    "cudnn": (cudnn.available, cudnn.CudnnKernel),
    "flash2": (flash2.available, flash2.Flash2Kernel),
    "cpu": (cpu.available, cpu.CpuKernel),
    "reference": (reference.available, reference.ReferenceKernel),
}
# Fastest first. The reference is never chosen unless asked for: its memory grows with the square of the length.
_AUTOMATIC = ("fa4", "cudnn", "flash2", "cpu")


def faster_kernels(
    name: str, head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> dict[str, str]:
    """Those that ``auto`` tries before the kernel called ``name``, and why they do not run here."""
    before = _AUTOMATIC[: _AUTOMATIC.index(name)] if name in _AUTOMATIC else ()
    reasons = {faster: KERNELS[faster][0](head_dim, dtype, device, deterministic) for faster in before}
    return {faster: reason for faster, reason in reasons.items() if reason}


def require_kernel(name: str, setting: str) -> None:
    """Raise ``SettingError`` if there is no kernel called ``name``; ``setting`` is what the message calls it."""
    if name != "auto" and name not in KERNELS:
        raise SettingError(f"{setting}={name} is not a kernel; use auto, {', '.join(KERNELS)}")


def select_kernel(
    name: str,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    setting: str = "model.attention",
) -> AttentionKernel:
    """The kernel called ``name``, or with ``auto`` the fastest one that runs ``head_dim`` in ``dtype`` on ``device``.

    ``deterministic`` leaves out kernels whose backward pass adds in varying order; ``setting`` is what messages call the name.
    Raises ``ValueError`` for an unknown name and for a kernel that cannot run here, with the reason.
    """
    require_kernel(name, setting)
    reasons = {}
    for candidate in _AUTOMATIC if name == "auto" else (name,):
        available, kernel = KERNELS[candidate]
        reasons[candidate] = available(head_dim, dtype, device, deterministic)
        if reasons[candidate] is None:
            return kernel(deterministic)
    if name != "auto":
        raise SettingError(f"{setting}={name} cannot run here: {reasons[name]}; or use {setting}=auto")
    listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise SettingError(
        f"{setting}=auto finds no kernel for head dim {head_dim} in {dtype} on {device} ({listed}); "
        f"train in bfloat16, or use {setting}=reference (float64, short sequences only)"
    )
