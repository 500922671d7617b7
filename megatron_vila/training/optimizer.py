"""DDP, Adam with Megatron's distributed optimizer, learning rates per part, and the guarded step.

Parameter names decide the part: ``vision.*``, ``projector.*``, everything else is the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule

from megatron_vila.config.schema import OptimConfig, PartConfig, TrainConfig
from megatron_vila.errors import SettingError
from megatron_vila.plan.validate import warmup_steps
from megatron_vila.training.offload import StreamedAdam, offload_state

PARTS = ("vision", "projector", "llm")


def part_of(name: str) -> str:
    """The part of the model that the parameter ``name`` belongs to; DDP's ``module.`` prefixes do not matter."""
    top = name.replace("module.", "").split(".", 1)[0]
    return top if top in PARTS else "llm"


def wrap_ddp(model: MegatronModule, optim: OptimConfig, overlap_grad_reduce: bool | None = None) -> DistributedDataParallel:
    """Megatron's DDP around ``model``, and the hooks that Megatron's schedules look for in its ``config``.

    Freeze parameters before: DDP makes buffers for what is trainable now. Gradients have the parameters' dtype, or float32
    for 16-bit parameters with ``optim.grad_reduce_fp32``. They are reduced over dp x cp, by default during the backward pass
    on CUDA and after it on a CPU. Initial weights must be equal on all replicas: nothing is broadcast.
    """
    parameters, config = list(model.parameters()), model.config
    if overlap_grad_reduce is None:
        overlap_grad_reduce = parameters[0].is_cuda
    is_16_bit = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=optim.grad_reduce_fp32 and is_16_bit,
        overlap_grad_reduce=overlap_grad_reduce,
    )
    wrapped = DistributedDataParallel(config, ddp_config, model)
    config.finalize_model_grads_func = finalize_gradients
    config.no_sync_func = wrapped.no_sync
    return wrapped


def finalize_gradients(model, num_tokens=None, pg_collection=None, force_all_reduce=False) -> None:
    """Megatron's ``finalize_model_grads`` with a division by the token count that keeps float64 gradients exact.

    (Megatron multiplies by a float32 reciprocal.) ``num_tokens`` counts this CP rank's supervised tokens of the step, on the
    last stage. Collectives: Megatron's own, then a broadcast of the count over pp and its sum over dp x cp.
    """
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    if num_tokens is None:
        return
    last_stage = dist.get_process_group_ranks(pg_collection.pp)[-1]
    dist.broadcast(num_tokens, src=last_stage, group=pg_collection.pp)
    dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
    # A number, although the host waits for it (it waits for the loss next anyway): with a tensor, scaling 9 GB of 16-bit
    # gradients took 22 ms on an H100.
    scale = 1.0 / max(num_tokens.item(), 1)
    for chunk in model:
        chunk.scale_gradients(scale)


def build_optimizer(
    model_chunks: Sequence[DistributedDataParallel], optim: OptimConfig, train: TrainConfig, dtype: torch.dtype
) -> tuple[DistributedOptimizer, OptimizerParamScheduler]:
    """Adam on dp x cp shards of the trainable parameters, and the schedule of its learning rates.

    ``dtype`` is that of the parameters; bfloat16 ones get float32 main copies. ``optim.offload_fraction`` of the state lives in
    host memory. Norms and biases have no weight decay. The scheduler counts steps: call ``scheduler.step(1)`` after each; as
    usual in Megatron the first step of a warm-up has rate 0.
    Raises ``SettingError`` if float64 parameters are on CUDA.
    Collective over all ranks.
    """
    if dtype == torch.float64 and next(model_chunks[0].parameters()).is_cuda:
        raise SettingError(
            "train.precision=fp64: Megatron's distributed optimizer has no float64 on CUDA; use fp32 or bf16"
        )
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=min(optim.min_lr, optim.lr),
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    # What Megatron derives from optimizer_cpu_offload with use_precision_aware_optimizer: the shards that Adam is given are those
    # of the 16-bit weights, without float32 copies on the device. The two settings themselves would build Adam for whole weights.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = optim.offload_fraction > 0
    # The standard overrides are passed by hand because leaving them out means different things in 0.16.1 and 0.19.2.
    overrides = {**get_standard_config_overrides(config), **_rates_per_part(optim)}
    # torch's optimizers want leaves: shards of float32 weights are leaves only if autograd does not see how they are cut.
    with torch.set_grad_enabled(optim.offload_fraction == 0):
        chained = get_megatron_optimizer(
            config, list(model_chunks), config_overrides=overrides, use_gloo_process_groups=False
        )
    # Without experts there is one optimizer in the chain.
    (optimizer,) = chained.chained_optimizers
    _prefer_fused_adam(optimizer.optimizer)
    if optim.offload_fraction:
        offload_state(optimizer, optim.offload_fraction)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps(optim, train),
        lr_decay_steps=train.steps,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def learning_rates(optimizer: DistributedOptimizer, optim: OptimConfig) -> dict[str, float]:
    """The current learning rate of each trainable part; the same on every rank, whichever parts it holds."""
    current = {group["max_lr"]: group["lr"] for group in optimizer.param_groups}
    parts = {part: getattr(optim, part) for part in PARTS}
    # A part whose rate has no group holds no parameter anywhere.
    return {name: current.get(_peak(part, optim), 0.0) for name, part in parts.items() if part.trainable}


@torch.no_grad()
def apply_step(optimizer: DistributedOptimizer, loss_is_finite: bool = True) -> tuple[bool, float]:
    """Clip the gradients and step, unless a gradient, or the loss on any rank, is not finite.

    Returns (updated, gradient norm), the same on every rank. If it is not updated, no weight and no optimizer state has changed
    anywhere, and the norm is inf or nan. The norm is that of the whole model before clipping, summed in float64.
    Collectives: one sum over all ranks, then Megatron's all-gather of the new weights over dp x cp.
    """
    optimizer.prepare_grads()
    # Each gradient once over all ranks: copies under tp and of tied embeddings are left out. Renamed in 0.19.
    grads_for_norm = getattr(optimizer, "get_main_grads_for_grad_norm", None) or optimizer.get_grads_for_grad_norm
    grads = grads_for_norm()
    device = grads[0].device if grads else optimizer.get_loss_scale().device
    squares = torch.zeros(1, dtype=torch.float64, device=device)
    if grads:
        squares += torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()
    if not loss_is_finite:
        squares.fill_(math.nan)
    dist.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
    norm = math.sqrt(squares.item())
    if not math.isfinite(norm):
        return False, norm
    limit = optimizer.config.clip_grad
    if 0 < limit < norm:
        _scale_gradients(optimizer, limit / (norm + 1e-6))
    optimizer.step_with_ready_grads()
    return True, norm


def _scale_gradients(optimizer: DistributedOptimizer, factor: float) -> None:
    if isinstance(optimizer.optimizer, StreamedAdam):
        # It scales the gradients after it has cast them to float32, so 16-bit gradients are not rounded once more.
        optimizer.optimizer.grad_scale = factor
        return
    gradients = [parameter.grad for parameter in optimizer.get_parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def _peak(part: PartConfig, optim: OptimConfig) -> float:
    return optim.lr if part.lr is None else part.lr


def _rates_per_part(optim: OptimConfig) -> dict[ParamKey, dict[str, float]]:
    overrides = {}
    for name in PARTS:
        part = getattr(optim, name)
        if part.lr is not None:
            matches = ParamWithNamePredicate(f"part {name}", lambda _, parameter, name=name: part_of(parameter) == name)
            rates = {"max_lr": part.lr, "min_lr": min(optim.min_lr, part.lr)}
            overrides[ParamKey(with_name_predicate=matches)] = rates
    return overrides


def _prefer_fused_adam(inner: torch.optim.Optimizer) -> None:
    """Use torch's fused Adam on CUDA if Megatron, without Transformer Engine, took torch's: by default that keeps temporaries as
    large as the parameters."""
    if isinstance(inner, torch.optim.AdamW):
        for group in inner.param_groups:
            if any(parameter.is_cuda for parameter in group["params"]):
                group["fused"], group["foreach"] = True, False
