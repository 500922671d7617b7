"""CUDA with NCCL or CPU with gloo: the one place where the two differ.

On a machine with CUDA everything here is a thin wrapper over ``torch.cuda``. Without CUDA, ``prepare`` lets Megatron-Core
(0.16.1 and 0.19.2), which is written for GPUs only, run on the CPU: every ``megatron.core`` module gets a private ``torch``
namespace whose tensor factories, devices, streams and random state are the CPU's. Code outside ``megatron.core`` keeps the
real ``torch``; no operator becomes slower.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import logging
import os
import socket
import sys
import types
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.errors import LaunchError, PeerError, SettingError, StallError

STARTED = "megatron_vila/started"
"""key of what each rank that has come to the start is: ``this_process``"""
_store: dist.Store | None = None
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
_FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "empty_strided"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)


# ---------------------------------------------------------------------------------------------------------------------
# devices and processes


def device() -> torch.device:
    """Device of this process: its own GPU (the current CUDA device) or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """torch.distributed backend of this machine: ``nccl`` with CUDA, else ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def dtype_of(precision: str) -> torch.dtype:
    """Parameter dtype of ``train.precision``: auto (bf16 with CUDA, else fp32), bf16, fp32 or fp64.

    Raises ``ValueError`` for another name.
    """
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if precision not in _DTYPES:
        raise SettingError(f"train.precision={precision!r} is unknown; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Join the default process group described by torchrun's environment; a lone process needs no environment at all.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, binds the process to its GPU, and does nothing when the
    group exists already. Collective over all processes when WORLD_SIZE is above 1, after ``meet``, whose errors it raises.
    Raises ``LaunchError`` when the environment is incomplete or names a GPU that does not exist.
    """
    import torch.distributed.nn.functional  # imported later, its default arguments would hold the group

    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise LaunchError(
                f"LOCAL_RANK={local} but this node shows {gpus} GPU(s); start at most {gpus} processes per node "
                "(torchrun --nproc-per-node) or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local)
    if dist.is_initialized():
        return
    meet(timeout_minutes)
    rank, world = rank_and_world()
    store = dist.HashStore() if world == 1 else _store
    dist.init_process_group(backend(), store=store, rank=rank, world_size=world, timeout=collective_timeout(timeout_minutes))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks: of the default group, before there is one of the environment."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet(timeout_minutes: float = 30.0) -> None:
    """Connect to what all ranks share (``shared_store``) and wait until all are there; torch would wait as well, and not say
    for whom. Nothing to do for a lone process, after an earlier call or where the default group exists.

    Raises ``LaunchError`` when the environment is incomplete. If ranks have not come within ``timeout_minutes``, one of the
    others raises ``StallError`` with their numbers, the rest ``PeerError``.
    """
    global _store
    rank, world = rank_and_world()
    if world == 1 or _store is not None or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LaunchError(f"WORLD_SIZE={world} but {', '.join(missing)} not set; start the processes with torchrun")
    timeout = collective_timeout(timeout_minutes)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("default_pg", store)
    keys = [f"{STARTED}/{other}" for other in range(world)]
    store.set(keys[rank], this_process())
    try:
        store.wait(keys, timedelta(minutes=timeout_minutes))
    except RuntimeError as error:
        there = [store.check([key]) for key in keys]
        if rank != there.index(True):
            raise PeerError("a rank has not come") from error
        missing = [str(other) for other in range(world) if not there[other]]
        shown = ", ".join(missing[:8]) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise StallError(
            f"rank {shown} has not come to the start within train.timeout_minutes={timeout_minutes:g}; look whether its process "
            "was started, and whether it stands still"
        ) from error
    _store = store


def shared_store() -> dist.Store | None:
    """A connection of its own to what all ranks share, for another thread may wait in the first one. None for a lone process
    and before the ranks have met."""
    if rank_and_world()[1] == 1:
        return None
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _store
    return None if store is None else store.clone()


def this_process() -> str:
    """How messages name this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def collective_timeout(minutes: float) -> timedelta:
    """What a process group is given for ``train.timeout_minutes``. NCCL ends the process with a raw trace: on GPUs it is a minute
    more, in which the run's ``Watch`` says which rank is missing."""
    return timedelta(minutes=minutes + (1 if torch.cuda.is_available() else 0))


def end_distributed() -> None:
    """Leave all process groups and wait for their threads; what holds a group (models, optimizers) must be out of scope.

    A gloo thread that frees its last tensor while Python shuts down aborts the process, although all work is done.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # DTensor's cache, so FSDP2's, holds meshes, and these hold groups
    if (topology := sys.modules.get("megatron_vila.parallel.topology")) is not None:
        topology.ParallelTopology.destroy()
    dist.destroy_process_group()
    collect_garbage()  # the threads live until the last reference to their group goes


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


def to_device(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """``tensor`` on ``target``. What lies on the host is copied to page-locked memory (PyTorch keeps it for the next one), from
    where a GPU takes it in the order of its stream, without the host waiting for that."""
    if target.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(target, non_blocking=True)


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
    # The fill only helps to find reads of uninitialised memory, and costs a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = False


# ---------------------------------------------------------------------------------------------------------------------
# Megatron-Core on a CPU


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
    if torch.cuda.is_available() or any(isinstance(finder, _RedirectingFinder) for finder in sys.meta_path):
        return
    finder = _RedirectingFinder(_cpu_torch())
    sys.meta_path.insert(0, finder)
    for name, module in list(sys.modules.items()):
        if name == _MCORE or name.startswith(_MCORE + "."):
            finder.redirect(module)
    _redirect_methods()


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _QUIET_LOGS)


class _RedirectingFinder(importlib.abc.MetaPathFinder):
    """Import hook: finds ``megatron.core`` modules as usual and redirects each one as soon as it is executed."""

    def __init__(self, cpu_torch: types.ModuleType):
        self._torch = cpu_torch

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _MCORE and not fullname.startswith(_MCORE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            execute = spec.loader.exec_module

            def exec_and_redirect(module):
                execute(module)
                self.redirect(module)

            spec.loader.exec_module = exec_and_redirect
        return spec

    def redirect(self, module: types.ModuleType) -> None:
        names = vars(module)
        if names.get("torch") is torch:
            names["torch"] = self._torch
        if module.__name__ == f"{_MCORE}.jit":
            module.disable_jit_fuser()
        if module.__name__ == f"{_MCORE}.tensor_parallel.random":
            module._get_cuda_rng_state = _get_rng_state
            module._set_cuda_rng_state = _set_rng_state
        # A module that was imported before prepare() may hold compiled helpers: put the plain functions back.
        for name, value in list(names.items()):
            if isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
                names[name] = value._torchdynamo_orig_callable


def _cpu_torch() -> types.ModuleType:
    """A twin of ``torch`` whose factories and ``cuda`` part live on the CPU; everything else is torch's own."""
    twin = types.ModuleType("torch", torch.__doc__)
    vars(twin).update(vars(torch))
    twin.__getattr__ = functools.partial(getattr, torch)
    twin.cuda = cuda()
    for name in _FACTORIES:
        setattr(twin, name, _on_cpu(getattr(torch, name)))
    return twin


def _on_cpu(factory):
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _Stream:
    """CPU twin of a CUDA stream or event: everything is done by the time it is asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def wait(self, stream=None):
        pass

    def record(self, stream=None):
        pass

    def record_event(self, event=None):
        return self

    def synchronize(self):
        pass

    def query(self):
        return True


@functools.cache
def cuda() -> types.ModuleType:
    """``torch.cuda``, or without CUDA a twin of it: what it is asked for is done at once, on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda
    twin = types.ModuleType("torch.cuda")
    vars(twin).update(vars(torch.cuda))
    stream = _Stream()
    twin.current_device = lambda: torch.device("cpu")
    twin.Stream = twin.Event = _Stream
    twin.current_stream = twin.default_stream = lambda device=None: stream
    twin.stream = lambda stream: contextlib.nullcontext()
    twin.synchronize = twin.empty_cache = lambda *args, **kwargs: None
    twin.manual_seed = twin.manual_seed_all = torch.manual_seed
    twin.get_rng_state, twin.set_rng_state = _get_rng_state, _set_rng_state
    return twin


def _get_rng_state(device=None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device=None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _redirect_methods() -> None:
    """Tensor and module methods that move to the GPU, and the type names that Megatron's optimizer compares with.

    Only calls from ``megatron.core`` see the difference. float64 passes for float32 in the optimizer, whose float32 path then
    keeps the parameter's own dtype throughout.
    """

    def from_mcore(part: str = "") -> bool:
        return sys._getframe(2).f_globals.get("__name__", "").startswith(_MCORE + part)

    def identity_for_mcore(original):
        @functools.wraps(original)
        def method(self, *args, **kwargs):
            return self if from_mcore() else original(self, *args, **kwargs)

        return method

    original_float = torch.Tensor.float

    @functools.wraps(original_float)
    def as_float(self, *args, **kwargs):
        if self.dtype == torch.float64 and from_mcore(".optimizer"):
            return self
        return original_float(self, *args, **kwargs)

    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def type_name(self, *args, **kwargs):
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and from_mcore():
            return result.replace("torch.", "torch.cuda.").replace("Double", "Float")
        return result

    torch.Tensor.type = type_name
    torch.Tensor.float = as_float
    torch.Tensor.cuda = identity_for_mcore(torch.Tensor.cuda)
    torch.Tensor.pin_memory = identity_for_mcore(torch.Tensor.pin_memory)
    torch.nn.Module.cuda = identity_for_mcore(torch.nn.Module.cuda)


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
        # Code that is compiled has a version for what wants gradients and another for what does not, and few versions in all.
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return (compiled() if args[0].device.type == _COMPILED_DEVICE and compiles() else function)(*args)

    return call
