"""CUDA or a CPU: the device of a process, its memory, its streams and its dtypes, by the same calls.

On a machine with CUDA everything here is a thin wrapper over ``torch.cuda``. Without CUDA, ``prepare`` lets Megatron-Core run on
the CPU (``megatron_on_cpu``).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vila import host_memory, megatron_on_cpu
from megatron_vila.plan.hardware import Machine, peak_flops

_MCORE = "megatron.core"
_COMPILED_DEVICE = "cuda"  # a test counts versions on a CPU
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# What Megatron-Core says on every start and a user can do nothing about.
_QUIET_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    ".* is experimental and still under active development",
    "The .grad attribute of a Tensor that is not a leaf",
    r"`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
)
_QUIET_LOGS = (
    "GPTModel IS DEPRECATED",
    "CPU RNG state changed within GPU RNG context",
    "full_param_layout not provided",
    "Unknown MLP type",
)


def device() -> torch.device:
    """Device of this process: its own GPU (the current CUDA device) or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(precision: str) -> torch.dtype:
    """Parameter dtype of ``train.precision``: auto (bf16 with CUDA, else fp32), bf16, fp32 or fp64."""
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return _DTYPES[precision]


def synchronize() -> None:
    """Wait until the device has done all its work (nothing to wait for on a CPU)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def collect_garbage() -> None:
    """Free what nothing refers to any more, models too, and give its device memory back to the driver."""
    for _ in range(2):  # a model is a cycle, partly through C++
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_memory_bytes() -> int:
    """Memory of this process's GPU, 0 on a CPU."""
    return torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else 0


def machine() -> Machine:
    """The machine at hand, as far as it is known from within: its links are not."""
    host_bytes = host_memory.most_bytes()
    if not torch.cuda.is_available():
        return Machine("this machine", 0, host_bytes=host_bytes, is_here=True)
    name = torch.cuda.get_device_name()
    return Machine(f"a GPU ({name})", device_memory_bytes(), peak_flops(name), host_bytes, is_here=True)


def free_device_bytes() -> int:
    """Memory of this process's GPU that nobody has taken, 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def room_bytes() -> int:
    """Bytes that tensors of this process may still take: on a GPU what nobody has taken and what PyTorch holds unused, on a CPU
    this rank's share of the free memory."""
    if not torch.cuda.is_available():
        return host_memory.free_bytes() // host_memory.ranks_here()
    return free_device_bytes() + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def to_device(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """``tensor`` on ``target``. What lies on the host is copied to page-locked memory (PyTorch keeps it for the next one), from
    where a GPU takes it in the order of its stream, without the host waiting for that."""
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target, non_blocking=True)
    started_s = time.perf_counter()
    copy = tensor.pin_memory().to(target, non_blocking=True)
    _copied_s[0] += time.perf_counter() - started_s
    return copy


_copied_s = [0.0]


def take_copy_seconds() -> float:
    """Seconds that this process has spent in ``to_device`` since the call before: those of the host, in which it could not queue
    work."""
    total, _copied_s[0] = _copied_s[0], 0.0
    return total


def peak_memory_bytes() -> int:
    """Most memory in use since the last ``reset_peak_memory``, in bytes: GPU tensors, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start a new peak. Where the system keeps no resettable peak (CPU outside Linux) the peak stays that of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def set_deterministic(enabled: bool) -> None:
    """Ask for bitwise repeatable kernels; call it before the first CUDA or NCCL operation. ``False`` undoes it.

    An operator without a deterministic form raises ``RuntimeError`` instead of running.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(enabled)
    # The fill only helps to find reads of uninitialized memory, and costs a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = False


def prepare() -> None:
    """Make ``megatron.core`` usable on this machine. Call it before the first use of Megatron-Core; calling again is free.

    With CUDA it silences import-time warnings about optional packages and, unless PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF
    is set, has PyTorch's allocator extend its segments. Without, modules of ``megatron.core``, those imported already and those
    to come, are redirected to the CPU, and their ``torch.compile`` fusions are switched off.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the other name would hide it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for message in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    quiet = (
        "models.gpt.gpt_model",
        "tensor_parallel.random",
        "distributed.distributed_data_parallel",
        "transformer.transformer_layer",
    )
    for name in quiet:
        logging.getLogger(f"{_MCORE}.{name}").addFilter(_is_news)
    # A compiler without a GPU is no news to who trains on a CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        megatron_on_cpu.redirect(cuda())


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _QUIET_LOGS)


@functools.cache
def cuda() -> types.ModuleType:
    """``torch.cuda``, or without CUDA a twin of it: what it is asked for is done at once, on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda
    twin = types.ModuleType("torch.cuda")
    vars(twin).update(vars(torch.cuda))
    stream = _Stream()
    vars(twin).update(
        current_device=lambda: torch.device("cpu"),
        Stream=_Stream,
        Event=_Stream,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda *args, **kwargs: None,
        empty_cache=lambda *args, **kwargs: None,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
    )
    return twin


class _Stream:
    """CPU twin of a CUDA stream or event: everything is done by the time it is asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait(self, other=None):
        pass

    wait_stream = wait_event = record = synchronize = wait

    def record_event(self, event=None):
        return self

    def query(self):
        return True


def compiles() -> bool:
    """Whether CUDA runs compiled code: not in deterministic mode.

    Code for the first length of a run and the code for any length that follows it round differently.
    """
    return not torch.are_deterministic_algorithms_enabled()


def compiled_on_cuda(function: Callable) -> Callable:
    """``function`` of tensors and numbers: as it is on a CPU, by ``torch.compile`` on CUDA where it ``compiles``.

    The first argument's device decides. No gradients flow through the function.
    """

    @functools.cache
    def compiled() -> Callable:
        # When it is needed first, not before: torch.compile imports a compiler, which takes seconds.
        # The first new length makes lengths dynamic; widths stay constants of the kernel.
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args):
        # Detached: torch.compile would make other versions for arguments that require gradients, and it keeps only a few.
        plain = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return (compiled() if plain[0].device.type == _COMPILED_DEVICE and compiles() else function)(*plain)

    return call
