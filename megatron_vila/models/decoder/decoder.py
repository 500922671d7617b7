"""The decoder layers of this rank under a recompute policy that never runs attention twice.

``attention_output`` (the policy of long context) saves the output and log-sum-exp of each layer's attention and the input of
every ``block_layers``-th layer. The backward pass of a block first rebuilds the inputs of its layers from the first one (only
output projection and MLP, because attention's outputs were saved). Then it takes the layers from the last to the first: it
runs a layer once more with gradients, with the saved output in the place of attention, and goes back through it. The policy
may hold for the first layers only; the last ones, whose backward pass comes first, then save everything.

Legend: t tokens of this rank (S/(cp*tp)), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from megatron_vila.config.schema import MemoryConfig
from megatron_vila.models.decoder.saved import HostStore
from megatron_vila.parallel.attention2d import SavedAttention
from megatron_vila.parallel.megatron_attention import RowParams


def run_decoder(
    decoder: TransformerBlock, hidden_t1H: torch.Tensor | None, row: RowParams, memory: MemoryConfig, host: HostStore
) -> torch.Tensor:
    """All layers of this pipeline stage and, on the last stage, the final norm: [t, 1, H] to [t, 1, H].

    ``hidden_t1H`` is None after the first stage, where Megatron's schedule has set the input. ``host`` takes what the policy
    saves. Collectives: those of the layers, once more in the backward pass under a policy other than ``none`` (attention's
    only under ``full``).
    """
    if hidden_t1H is None:
        hidden_t1H = decoder.input_tensor
    again = 0 if memory.recompute == "none" or not torch.is_grad_enabled() else memory.recompute_layers or len(decoder.layers)
    block = None
    for layers in _blocks(decoder.layers[:again], memory):
        block = _Block(layers, hidden_t1H, row, host, memory.recompute == "attention_output", block)
        hidden_t1H = _Recompute.apply(hidden_t1H, block)
    for layer in decoder.layers[again:]:
        hidden_t1H = _run(layer, hidden_t1H, row)
    if decoder.final_layernorm is not None:
        hidden_t1H = decoder.final_layernorm(hidden_t1H)
    # Megatron's schedules refuse views as outputs of a stage.
    return make_viewless_tensor(hidden_t1H, requires_grad=True, keep_graph=True)


def _blocks(layers: Sequence[TransformerLayer], memory: MemoryConfig) -> list[list[TransformerLayer]]:
    """The layers in blocks, of one layer if attention is not saved: a longer block would have to run attention three times."""
    size = memory.block_layers if memory.recompute == "attention_output" else 1
    return [list(layers[first : first + size]) for first in range(0, len(layers), size)]


class _Recompute(torch.autograd.Function):
    """One block of layers; the inner backward pass stores the gradients of the parameters."""

    @staticmethod
    def forward(ctx, hidden_t1H: torch.Tensor, block: _Block) -> torch.Tensor:
        ctx.block = block
        return block.forward(hidden_t1H)

    @staticmethod
    def backward(ctx, grad_t1H: torch.Tensor):
        return ctx.block.backward(grad_t1H), None


class _Block:
    """Consecutive layers of one forward pass, which gets ``hidden_t1H``, and what is saved of them."""

    def __init__(
        self,
        layers: Sequence[TransformerLayer],
        hidden_t1H: torch.Tensor,
        row: RowParams,
        host: HostStore,
        saves_attention: bool,
        before: _Block | None,
    ) -> None:
        self._layers, self._row, self._before = layers, row, before
        self._input = host.save(hidden_t1H.detach())
        # None: the only layer of this block runs its attention again.
        self._attention = [SavedAttention(host.save) for _ in layers] if saves_attention else []

    def forward(self, hidden_t1H: torch.Tensor) -> torch.Tensor:
        for layer, saved in zip_longest(self._layers, self._attention):
            hidden_t1H = _run(layer, hidden_t1H, self._row.with_saved(saved))
        return hidden_t1H

    def prefetch(self, layers: int) -> None:
        """Bring back the input and what is saved of the first ``layers`` layers."""
        self._input.prefetch()
        for saved in self._attention[:layers]:
            saved.prefetch()

    def backward(self, grad_t1H: torch.Tensor) -> torch.Tensor:
        self.prefetch(len(self._layers))
        inputs = [self._input.take()]
        with torch.no_grad():
            for layer, saved in zip(self._layers[:-1], self._attention[:-1], strict=True):
                inputs.append(_without_attention(layer, inputs[-1], saved))
        for done, layer in enumerate(reversed(self._layers)):
            # For each layer done here, one layer of the block before is brought back: what this one kept is free by then.
            if self._before is not None:
                self._before.prefetch(done + 1)
            row = self._row.with_saved(self._attention.pop() if self._attention else None)
            hidden_t1H = inputs.pop().detach().requires_grad_()
            with torch.enable_grad():
                out_t1H = _run(layer, hidden_t1H, row, value_needed=False)
            torch.autograd.backward(out_t1H, grad_t1H)
            assert hidden_t1H.grad is not None, "the residual stream leads from every layer to its input"
            grad_t1H = hidden_t1H.grad
            del row, out_t1H
        self._before = None
        return grad_t1H


def _run(layer: TransformerLayer, hidden_t1H: torch.Tensor, row: RowParams, value_needed: bool = True) -> torch.Tensor:
    attention = layer.self_attention.core_attention
    return run_layer(layer, hidden_t1H, lambda qkv_s1KX: attention(qkv_s1KX, row), value_needed)


def run_layer(
    layer: TransformerLayer,
    hidden_t1H: torch.Tensor,
    attend: Callable[[torch.Tensor], torch.Tensor],
    value_needed: bool = True,
) -> torch.Tensor:
    """A pre-norm layer: h = x + attention(norm(x)), then h + mlp(norm(h)); [t, 1, H] to [t, 1, H].

    ``attend`` gets the product of query, key and value as ``MMSPAttention.forward`` does. If the output is only the root of a
    backward pass, its value is not needed, and the MLP does not compute its part. Collectives over tp, and those of ``attend``.
    """
    hidden_t1H, normed_t1H = layer.input_layernorm.with_stream(hidden_t1H)
    qkv_s1KX, _ = layer.self_attention.get_query_key_value_tensors(normed_t1H, split_qkv=False)
    return _after_attention(layer, attend(qkv_s1KX), hidden_t1H, value_needed)


def _without_attention(layer: TransformerLayer, hidden_t1H: torch.Tensor, saved: SavedAttention) -> torch.Tensor:
    """The layer's output from the saved output of its attention: no query, key or value is needed."""
    return _after_attention(layer, saved.output(), hidden_t1H)


def _after_attention(
    layer: TransformerLayer, out_t1H: torch.Tensor, hidden_t1H: torch.Tensor, value_needed: bool = True
) -> torch.Tensor:
    attended_t1H, _ = layer.self_attention.linear_proj(out_t1H)
    hidden_t1H, normed_t1H = layer.pre_mlp_layernorm.with_stream(attended_t1H, hidden_t1H)
    out_t1H, _ = layer.mlp(normed_t1H, value_needed=value_needed)
    return hidden_t1H + out_t1H
