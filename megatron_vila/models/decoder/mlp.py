"""The SwiGLU MLP of a decoder layer: a backward pass of its own, and tiles of tokens whose inner values exist one at a time.

The backward pass is written out here, not left to autograd. So it does not run the down projection again, whose value is not
needed when a layer runs again for its gradients; it keeps gate and up only; and it adds weight gradients straight into Megatron's
buffers.

Legend: t tokens of this rank (S/(cp*tp)), T tokens of a tile over all tp ranks, H hidden size, F width of the MLP of this
tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory

from megatron_vila.models.decoder.fused import swiglu
from megatron_vila.models.decoder.gated import APART, products_for
from megatron_vila.models.decoder.weight_gradient import WeightGradient


def tiled(spec: ModuleSpec | partial, tile_tokens: int, swiglu_inside: bool) -> ModuleSpec | partial:
    """The same layer spec entry with ``TiledMLP`` of these settings in the place of Megatron-Core's ``MLP``."""
    if isinstance(spec, ModuleSpec):  # Megatron-Core 0.16.1
        settings = {"tile_tokens": tile_tokens, "swiglu_inside": swiglu_inside}
        return ModuleSpec(module=TiledMLP, submodules=spec.submodules, params=settings)
    build = partial(TiledMLP.as_mlp_submodule, tile_tokens=tile_tokens, swiglu_inside=swiglu_inside)
    return partial(build, **spec.keywords)


class TiledMLP(MLP):
    """Megatron-Core's MLP (gate, up and down projection without bias), in tiles above ``tile_tokens`` tokens (0: never).

    In tiles it keeps its input only, and the backward pass of a tile forms gate and up once more. Under sequence parallelism each
    tile is gathered and scattered over the tensor-parallel group on its own. ``swiglu_inside`` asks for matrix products that form
    SwiGLU themselves, if there are any for this device (``gated.products_for``).
    """

    def __init__(self, *args, tile_tokens: int, swiglu_inside: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tile_tokens, self.swiglu_inside = tile_tokens, swiglu_inside

    @classmethod
    def as_mlp_submodule(cls, submodules, config, pg_collection, *, tile_tokens: int, swiglu_inside: bool, **_unused) -> TiledMLP:
        """How a layer of Megatron-Core 0.19 builds it."""
        return cls(
            config=config,
            submodules=submodules,
            tp_group=pg_collection.tp,
            tile_tokens=tile_tokens,
            swiglu_inside=swiglu_inside,
        )

    def forward(self, hidden_t1H: torch.Tensor, *, value_needed: bool = True) -> tuple[torch.Tensor, None]:
        """[t, 1, H] to [t, 1, H], and Megatron's bias, which is None.

        Without ``value_needed``, if a layer runs for its gradients alone, the output is zeros and costs nothing.
        """
        tile = self.tile_tokens if 0 < self.tile_tokens < hidden_t1H.shape[0] else hidden_t1H.shape[0]
        if any(hasattr(linear, "lora_a") for linear in (self.linear_fc1, self.linear_fc2)):
            if tile == hidden_t1H.shape[0]:
                return self.with_updates(hidden_t1H), None
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return _TilesWithUpdates.apply(hidden_t1H, self, tile, value_needed, trained, *trained), None
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        return _SwiGLUMLP.apply(hidden_t1H.squeeze(1), *weights, self, tile, value_needed).unsqueeze(1), None

    def with_updates(self, hidden_n1H: torch.Tensor) -> torch.Tensor:
        """The MLP through autograd, for layers with LoRA updates."""
        gate_up, _ = self.linear_fc1(hidden_n1H)
        return self.linear_fc2(swiglu(gate_up))[0]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_fc1.lora_b"
        if key in state:  # gate and up are stored apart, as those of the weight are
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class _SwiGLUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_tH, fc1_FH, fc2_HF, mlp: TiledMLP, tile: int, value_needed: bool):
        ctx.mlp, ctx.tile = mlp, tile
        # The two keep gate and up in different orders.
        ctx.products = products = products_for(hidden_tH, fc1_FH, fc2_HF) if mlp.swiglu_inside else APART
        if not value_needed:
            ctx.save_for_backward(hidden_tH, None)
            return hidden_tH.new_zeros(()).expand_as(hidden_tH)
        group = mlp.linear_fc1.tp_group
        out_tH = torch.empty_like(hidden_tH)
        for tile_tH, out in zip(hidden_tH.split(tile), out_tH.split(tile), strict=True):
            gate_up_T2F, inner_TF = products.forward(_gathered(tile_tH, group), fc1_FH)
            _scattered(partial(torch.mm, inner_TF, fc2_HF.t()), out, group)
            del inner_TF
        whole = tile == len(hidden_tH)
        ctx.save_for_backward(None if whole and not fc1_FH.requires_grad else hidden_tH, gate_up_T2F if whole else None)
        return out_tH

    @staticmethod
    def backward(ctx, grad_tH):
        hidden_tH, kept_T2F = ctx.saved_tensors
        mlp, tile, products = ctx.mlp, ctx.tile, ctx.products
        fc1_FH, fc2_HF, group = mlp.linear_fc1.weight, mlp.linear_fc2.weight, mlp.linear_fc1.tp_group
        grad_tH = grad_tH.contiguous()
        dhidden_tH = torch.empty_like(grad_tH)
        grad_tiles, dhidden_tiles = grad_tH.split(tile), dhidden_tH.split(tile)
        sums = [
            WeightGradient(weight, len(grad_tiles)) if needed else None
            for weight, needed in zip((fc1_FH, fc2_HF), ctx.needs_input_grad[1:3], strict=True)
        ]
        hidden_tiles = [None] * len(grad_tiles) if hidden_tH is None else hidden_tH.split(tile)
        for hidden, grad, dhidden in zip(hidden_tiles, grad_tiles, dhidden_tiles, strict=True):
            hidden_TH = None if hidden is None else _gathered(hidden, group)
            grad_TH = _gathered(grad, group)
            gate_up_T2F = products.gate_up(hidden_TH, fc1_FH) if kept_T2F is None else kept_T2F
            inner_TF, dgate_up_T2F = products.backward(grad_TH, fc2_HF, gate_up_T2F)
            del gate_up_T2F
            if sums[1] is not None:
                sums[1].add(grad_TH, inner_TF)
            del inner_TF
            sent = _scattered(partial(products.input_gradient, dgate_up_T2F, fc1_FH), dhidden, group, wait=False)
            if sums[0] is not None:  # while the sum over tp is on its way
                products.add_weight_gradient(dgate_up_T2F, hidden_TH, sums[0])
            if sent is not None:
                sent.wait()
        return dhidden_tH, *(None if total is None else total.result() for total in sums), None, None, None


def _gathered(x_tH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all tp ranks. All-gather over the tensor-parallel group."""
    if group.size() == 1:
        return x_tH
    out = x_tH.new_empty(group.size() * len(x_tH), x_tH.shape[1])
    dist.all_gather_into_tensor(out, x_tH.contiguous(), group=group)
    return out


def _scattered(
    product: Callable[..., object], out_tH: torch.Tensor, group: dist.ProcessGroup, wait: bool = True
) -> dist.Work | None:
    """Own tokens of the sum over tp of what ``product(out=)`` writes. Reduce-scatter over the tensor-parallel group."""
    if group.size() == 1:
        product(out=out_tH)
        return None
    whole_TH = out_tH.new_empty(group.size() * len(out_tH), out_tH.shape[1])
    product(out=whole_TH)
    return dist.reduce_scatter_tensor(out_tH, whole_TH, group=group, async_op=not wait)


class _TilesWithUpdates(torch.autograd.Function):
    """Tiles of an MLP with LoRA: the backward pass of a tile runs it once more under autograd."""

    @staticmethod
    def forward(
        ctx, hidden_t1H: torch.Tensor, mlp: TiledMLP, tile: int, value_needed: bool, trained: Sequence[torch.nn.Parameter], *_
    ):
        ctx.save_for_backward(hidden_t1H)
        ctx.mlp, ctx.tile, ctx.trained = mlp, tile, trained
        if not value_needed:
            return hidden_t1H.new_zeros(()).expand_as(hidden_t1H)
        out_t1H = torch.empty_like(hidden_t1H)
        for tile_n1H, out_n1H in zip(hidden_t1H.split(tile), out_t1H.split(tile), strict=True):
            out_n1H.copy_(mlp.with_updates(tile_n1H))
        return out_t1H

    @staticmethod
    def backward(ctx, grad_t1H: torch.Tensor):
        (hidden_t1H,) = ctx.saved_tensors
        trained = ctx.trained
        dhidden_t1H = torch.empty_like(hidden_t1H)
        # 16-bit gradients of tiles are summed in float32, as one product over all tokens would.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        tiles = (x.split(ctx.tile) for x in (hidden_t1H, grad_t1H, dhidden_t1H))
        for tile_n1H, grad_n1H, dtile_n1H in zip(*tiles, strict=True):
            tile_n1H = tile_n1H.detach().requires_grad_()
            with torch.enable_grad():
                out_n1H = ctx.mlp.with_updates(tile_n1H)
            grads = torch.autograd.grad(out_n1H, [tile_n1H, *trained], grad_n1H)
            dtile_n1H.copy_(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        dtypes = [parameter.dtype for parameter in trained]
        return dhidden_t1H, None, None, None, None, *(x.to(dtype) for x, dtype in zip(sums, dtypes, strict=True))
