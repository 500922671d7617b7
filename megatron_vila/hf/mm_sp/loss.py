"""Output layer and loss of MM-SP under Transformers: logits of all tokens are never formed, the loss is a mean over the group.

Legend: s local tokens, n supervised ones among them, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig

from megatron_vila.models.loss import Vocabulary, fused_head

_SOFT_CAP = "final_logit_softcapping"


class FusedHead:
    """Replaces the ``forward`` of a model's output layer while MM-SP is on.

    After ``expect`` was given labels it returns the summed cross-entropy instead of logits, computed in chunks of tokens
    (``models/loss.py``). It computes inside the layer's own call, where FSDP2 has gathered the layer's weight. A model with
    ``final_logit_softcapping`` in its ``config`` caps what the layer returns, which would then be the loss; so the cap is taken
    here instead, and is not in the configuration during such a call.
    """

    def __init__(self, layer: nn.Linear, alone: dist.ProcessGroup, config: PreTrainedConfig) -> None:
        self.layer, self._alone, self._config = layer, alone, config
        self._soft_cap: float | None = getattr(config, _SOFT_CAP, None)
        self._labels_n: torch.Tensor | None = None
        self._selected_n: torch.Tensor | None = None

    def install(self) -> None:
        """Replace the layer's ``forward``."""
        self.layer.forward = self._forward  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Give the layer its own ``forward`` back."""
        del self.layer.forward
        self.expect(None, None)

    def expect(self, labels_n: torch.Tensor | None, selected_n: torch.Tensor | None) -> None:
        """Set the labels, int64 [n], for the next call; with None it returns logits. ``selected_n`` int64 [n] are the indices of
        the tokens that it takes, None for all: some models have no argument for that."""
        self._labels_n, self._selected_n = labels_n, selected_n
        if self._soft_cap is not None:
            setattr(self._config, _SOFT_CAP, self._soft_cap if labels_n is None else None)

    def _forward(self, hidden_1sH: torch.Tensor) -> torch.Tensor:
        """Loss sum [], or logits [1, n, V] of a batch without labels. No collective."""
        hidden_1nH = hidden_1sH if self._selected_n is None else hidden_1sH.index_select(1, self._selected_n)
        if self._labels_n is None:
            return nn.functional.linear(hidden_1nH, self.layer.weight)
        weight_VH = self.layer.weight
        if torch.is_autocast_enabled(weight_VH.device.type):
            # What the layer's own product would do.
            dtype = torch.get_autocast_dtype(weight_VH.device.type)
            hidden_1nH, weight_VH = hidden_1nH.to(dtype), weight_VH.to(dtype)
        vocabulary = Vocabulary(first=0, rows=weight_VH.shape[0], group=self._alone)
        counts = [len(self._labels_n)]
        return fused_head(hidden_1nH[0], weight_VH, self._labels_n, counts, vocabulary, soft_cap=self._soft_cap).loss_sum


def mean_over_group(
    loss_sum: torch.Tensor, supervised: int, total: int | torch.Tensor | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """Mean loss [] of all supervised tokens of ``group``, the same on each of its ranks.

    ``loss_sum`` [] and the number ``supervised`` of tokens are those of this rank. ``total`` replaces the number of supervised
    tokens of the group, for steps of several micro-batches. The gradient is scaled so that its *average* over the ranks of
    ``group``, which FSDP2 and DDP form, is the gradient of the mean. Without any supervised token the loss is zero. All-reduce
    over ``group``.
    """
    return _GroupMean.apply(loss_sum, supervised, total, group)


class _GroupMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_sum, supervised, total, group):
        sums = torch.stack([loss_sum.detach(), torch.full_like(loss_sum, supervised)])
        dist.all_reduce(sums, group=group)
        count = (sums[1] if total is None else torch.as_tensor(total).to(sums)).clamp(min=1)
        ctx.save_for_backward(group.size() / count)
        return sums[0] / count

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        return grad * scale, None, None, None
