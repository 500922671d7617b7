"""The SwiGLU MLP of a decoder layer, in tiles of tokens: the intermediate values of one tile exist at a time.

Legend: t tokens of this rank (S/(cp*tp)), n tokens of a tile, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory

from megatron_vila.models.fused import swiglu


def tiled(spec: ModuleSpec | partial) -> ModuleSpec | partial:
    """The same layer spec entry with ``TiledMLP`` in the place of Megatron-Core's ``MLP``."""
    if isinstance(spec, ModuleSpec):  # Megatron-Core 0.16.1
        return ModuleSpec(module=TiledMLP, submodules=spec.submodules)
    return partial(TiledMLP.as_mlp_submodule, **spec.keywords)


class TiledMLP(MLP):
    """Megatron-Core's MLP (gate, up and down projection without bias), in tiles above ``tile_tokens`` tokens (0: never).

    In tiles it keeps its input only, and the backward pass of a tile runs it once more. ``value_needed`` is False while a layer
    runs for its gradients alone: the output is then zeros and the forward pass costs nothing. Under sequence parallelism each
    tile is gathered and scattered over the tensor-parallel group on its own.
    """

    tile_tokens = 0
    value_needed = True

    def forward(self, hidden_t1H: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        """[t, 1, H] to [t, 1, H], and Megatron's bias, which is None."""
        if not 0 < self.tile_tokens < hidden_t1H.shape[0]:
            return self.whole(hidden_t1H), None
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return _Tiles.apply(hidden_t1H, self, trained, *trained), None

    def whole(self, hidden_n1H: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.linear_fc1(hidden_n1H)
        return self.linear_fc2(swiglu(gate_up))[0]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_fc1.lora_b"
        if key in state:  # gate and up are stored apart, as those of the weight are
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_t1H: torch.Tensor, mlp: TiledMLP, trained: Sequence[torch.nn.Parameter], *_):
        ctx.save_for_backward(hidden_t1H)
        ctx.mlp, ctx.trained = mlp, trained
        if not mlp.value_needed:
            return hidden_t1H.new_zeros(()).expand_as(hidden_t1H)
        out_t1H = torch.empty_like(hidden_t1H)
        for tile_n1H, out_n1H in zip(hidden_t1H.split(mlp.tile_tokens), out_t1H.split(mlp.tile_tokens), strict=True):
            out_n1H.copy_(mlp.whole(tile_n1H))
        return out_t1H

    @staticmethod
    def backward(ctx, grad_t1H: torch.Tensor):
        (hidden_t1H,) = ctx.saved_tensors
        mlp, trained = ctx.mlp, ctx.trained
        dhidden_t1H = torch.empty_like(hidden_t1H)
        # 16-bit gradients of tiles are summed in float32, as one product over all tokens would.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        tiles = (x.split(mlp.tile_tokens) for x in (hidden_t1H, grad_t1H, dhidden_t1H))
        for tile_n1H, grad_n1H, dtile_n1H in zip(*tiles, strict=True):
            tile_n1H = tile_n1H.detach().requires_grad_()
            with torch.enable_grad():
                out_n1H = mlp.whole(tile_n1H)
            grads = torch.autograd.grad(out_n1H, [tile_n1H, *trained], grad_n1H)
            dtile_n1H.copy_(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        dtypes = [parameter.dtype for parameter in trained]
        return dhidden_t1H, None, None, *(total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))
