"""Which attention kernels have to run on this machine, told by its hardware and packages and not by the kernels themselves."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

FIRST_GENERATION = {"fa4": 9, "cudnn": 8, "flash2": 8}


def lacking(kernel: str) -> str:
    """What this machine lacks for ``kernel``; empty if the kernel has to run here."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability()[0] < FIRST_GENERATION[kernel]:
        return f"{kernel} needs a newer GPU than {torch.cuda.get_device_name()}"
    if kernel == "fa4" and not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")):
        return "flash-attn-4 is not installed"
    return ""


def only_on_gpus(lacks: str) -> Callable:
    """Marks a test for GPUs; where the machine ``lacks`` something it is skipped."""

    def mark(test):
        return pytest.mark.gpu(pytest.mark.skipif(bool(lacks), reason=lacks or "-")(test))

    return mark


needs_a_gpu = only_on_gpus("" if torch.cuda.is_available() else "needs an NVIDIA GPU")


def on_gpus(*values, kernel: str, gpus: int = 1, id: str | None = None):
    """A case of a parametrised test that ``kernel`` has to pass on ``gpus`` GPUs, wherever there are such."""
    reason = lacking(kernel) or (f"needs {gpus} GPUs" if torch.cuda.device_count() < gpus else "")
    return pytest.param(*values, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason or "-")], id=id)
