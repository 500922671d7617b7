"""Adam's state in host memory: Megatron's ``HybridDeviceOptimizer``, made for the shards of the distributed optimizer.

A share of this rank's parameter shards is updated by the CPU: the float32 main weights, both moments and a page-locked copy of
the gradient live in host memory, the device keeps nothing but weights and gradient buffers. Gradients go out on a stream of
their own while the CPU works on the parameters before them; new weights come back in their own dtype.

Four things of Megatron-Core 0.16.1 and 0.19.2 (the same file in both) are done otherwise here:

* Its factory first builds the optimizer for the whole parameters, with float32 copies on host and device, then once more for the
  shards, and the first one lives until the garbage collector runs. Here it is built once, for the shards.
* It asks each tensor whether it ``is_cuda``. Here the share alone decides, so the same code runs on a CPU.
* Its main weights are not page-locked: each copy back waits, moves 4 bytes per 16-bit weight and needs a float32 temporary on
  the device. Here the page-locked gradient, used by then, carries the weights back.
* It casts the device's own 16-bit gradients on the stream that copies out, which Adam on the device does not wait for, and leaves
  float32 weights that stay on the device without a gradient.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vila.config.memory import GIB


class OffloadError(MemoryError):
    """The host does not page-lock what ``optim.offload_fraction`` asks for."""


def offload_state(optimizer: DistributedOptimizer, fraction: float) -> None:
    """Move the share ``fraction`` of the state that ``optimizer`` is going to have to the host.

    ``optimizer`` has made no step, and its configuration has it put the gradients of its shards beside the 16-bit weights
    (``use_precision_aware_optimizer_no_fp8_or_ds_fp8``). No collectives. Raises ``OffloadError``.
    """
    inner = optimizer.optimizer
    if inner is not None:  # a rank without anything to train
        optimizer.optimizer = OffloadedAdam(inner.param_groups, fraction, type(inner))


class OffloadedAdam(HybridDeviceOptimizer):
    """Adam in two parts, both on float32 main weights: torch's fused AdamW on the CPU and ``device_adam`` on the device.

    ``param_groups`` and ``state`` are keyed by the shards of the model's weights; the state of 16-bit ones has their main weights
    as ``master_param``. The gradient of a shard is its ``decoupled_grad``. ``grad_scale`` multiplies the gradients of the next
    step. ``fraction`` counts elements; the parameter that crosses it goes to the host as a whole.
    """

    def __init__(self, groups: list[dict[str, Any]], fraction: float, device_adam: type[torch.optim.Optimizer]) -> None:
        for group in groups:
            # The loops of plain torch are slow on a CPU and need temporaries as large as the parameters on a device.
            group["fused"], group["foreach"] = True, False
        self.grad_scale = 1.0
        self._host_gradients = torch.empty(0)
        super().__init__(
            groups,
            offload_fraction=fraction,
            cpu_optimizer_cls=torch.optim.AdamW,
            gpu_optimizer_cls=device_adam,
            param_update_in_fp32=True,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
        self._lay_out_gradients()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all weights of this rank. The device may still be copying when it returns, in the order of its stream."""
        on_device = [(shard, main) for shard, main in self.param_to_inner_param.items() if not self._on_host(shard)]
        for shard, main in on_device:
            main.grad = self._gradient(shard, main.dtype)
        with _all_threads():
            super().step(closure)
        for _, main in on_device:
            main.grad = None
        self.grad_scale = 1.0

    @torch.no_grad()
    def update_fp32_param_by_new_param(self) -> None:
        """Take the main weights anew from the model's weights; those of float32 weights on the host are copies too."""
        for shard, main in self.param_to_inner_param.items():
            if main is not shard:
                main.copy_(shard)

    def mirror_state(self) -> None:
        """Show in ``state`` what was put into the state of the two parts."""
        self._sync_sub_optimizers_state_to_hdo()

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of state and main weights on the device, and of these and of gradients on the host."""
        held = {True: self._host_gradients.nbytes, False: 0}
        for shard, main in self.param_to_inner_param.items():
            state = [value for key, value in self.state.get(shard, {}).items() if key != "master_param"]
            tensors = [*state, main] if main is not shard else state
            held[self._on_host(shard)] += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return held[False], held[True]

    def _on_host(self, shard: torch.Tensor) -> bool:
        return shard in self.gpu_params_map_cpu_copy

    def _gradient(self, shard: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The scaled gradient of a shard on its device: the gradient buffer itself unless that has 16 bits."""
        gradient = shard.decoupled_grad.to(dtype)
        return gradient if self.grad_scale == 1.0 else gradient.mul_(self.grad_scale)

    # ------------------------------------------------------------------------------------------------------------------
    # called by Megatron's class

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[list, list, dict, dict, dict]:
        """Groups of the host and of the device, shard -> host copy and back, and 16-bit shard -> float32 main weights."""
        shards = [shard for group in self.param_groups for shard in group["params"]]
        wanted, taken = offload_fraction * sum(shard.numel() for shard in shards), 0
        host_groups, device_groups = [], []
        to_host: dict[torch.Tensor, torch.Tensor] = {}
        to_float32: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            host, device = [], []
            for shard in group["params"]:
                is_16_bit = shard.dtype in (torch.bfloat16, torch.float16)
                dtype = torch.float32 if is_16_bit else shard.dtype
                if taken < wanted:
                    taken += shard.numel()
                    main = torch.empty(shard.shape, dtype=dtype, device="cpu").copy_(shard.detach())
                    to_host[shard] = main
                    host.append(main)
                else:
                    main = shard.detach().to(dtype) if is_16_bit else shard
                    device.append(main)
                if is_16_bit:
                    to_float32[shard] = main
            host_groups += [{**group, "params": host}] if host else []
            device_groups += [{**group, "params": device}] if device else []
        from_host = {main: shard for shard, main in to_host.items()}
        return host_groups, device_groups, to_host, from_host, to_float32

    def _set_sub_optimizer_grads(self) -> None:
        """Start to copy gradients to the host, on the stream for that, with an event after each parameter."""
        for part in self.cpu_optimizers:
            for main in _parameters(part):
                shard = self.cpu_copys_map_gpu_param[main]
                main.grad.copy_(self._gradient(shard, main.dtype), non_blocking=True)
            self._cpu_optimizer_map_data_event[part] = self._d2h_stream.record_event()

    def _register_param_copy_back_gpu_hook(self) -> None:
        for part in self.sub_optimizers:
            part.register_step_post_hook(self._copy_back)

    def _copy_back(self, part: torch.optim.Optimizer, args, kwargs) -> None:
        for main in _parameters(part):
            shard = self.inner_param_to_orig_param[main]
            if self._on_host(shard):
                # The next step's gradients are copied out after this copy, by the order of streams.
                carried = main.grad.view(shard.dtype)[: main.numel()]
                shard.data.copy_(carried.copy_(main), non_blocking=True)
            elif main is not shard:
                shard.data.copy_(main)

    def _lay_out_gradients(self) -> None:
        """One page-locked buffer for all gradients on the host."""
        mains = list(self.cpu_copys_map_gpu_param)
        if not mains:
            return
        buffer = torch.empty(sum(main.numel() for main in mains), dtype=mains[0].dtype, device="cpu")
        if any(shard.is_cuda for shard in self.gpu_params_map_cpu_copy):
            _page_lock(buffer, self.offload_fraction)
        self._host_gradients = buffer
        for main, gradient in zip(mains, buffer.split([main.numel() for main in mains]), strict=True):
            main.grad = gradient


def _parameters(part: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in part.param_groups:
        yield from group["params"]


def parts_of(inner: torch.optim.Optimizer | None) -> Iterable[torch.optim.Optimizer]:
    """The optimizers that hold state: ``inner`` itself, or the two parts of an offloaded one."""
    if inner is None:
        return []
    return inner.sub_optimizers if isinstance(inner, OffloadedAdam) else [inner]


def _page_lock(buffer: torch.Tensor, fraction: float) -> None:
    """Page-lock exactly ``buffer`` until it is freed: torch's own allocator rounds sizes up to powers of two."""
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    error = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    if error:
        raise OffloadError(
            f"the host does not page-lock {buffer.nbytes / GIB:.1f} GiB for the gradients of this rank (CUDA error {error}); "
            f"lower optim.offload_fraction={fraction:g}, or raise the limit of locked memory (ulimit -l, or --ulimit "
            "memlock=-1 of the container)"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False


@contextmanager
def _all_threads() -> Iterator[None]:
    """This rank's share of the cores: torchrun leaves a process one thread, too few for billions of parameters."""
    before = torch.get_num_threads()
    on_node = os.environ.get("LOCAL_WORLD_SIZE")
    ranks = int(on_node) if on_node else min(dist.get_world_size(), torch.cuda.device_count() or dist.get_world_size())
    torch.set_num_threads(max(before, len(os.sched_getaffinity(0)) // ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)
