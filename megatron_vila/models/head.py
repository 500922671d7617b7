"""Output layer and cross-entropy in one, on supervised positions only, in chunks: the logits never exist as a whole.

Under tensor parallelism the vocabulary is split over the tp group and, with Megatron sequence parallelism, each tp rank
holds a slice of the hidden states. A chunk is gathered, scored against the local part of the vocabulary and forgotten; the
backward pass does it again.

Legend: n supervised tokens held here, N supervised tokens of the CP rank, C tokens of a chunk over all tp ranks, H hidden
size, V vocabulary rows of this tp rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

CHUNK = 4096
"""Tokens scored at once over all tp ranks: 4096 x 152k float32 logits are 2.3 GiB without tensor parallelism."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's rows of the output layer: ``first .. first+rows-1`` of the true vocabulary (padding rows cut off)."""

    first: int
    rows: int
    group: dist.ProcessGroup


class HeadOutput(NamedTuple):
    """``loss_sum`` [] over the supervised tokens of this CP rank, equal on its tp ranks; ``correct_n`` bool [n] tells for each
    supervised token held here, in sequence order, whether its label has the highest logit."""

    loss_sum: torch.Tensor
    correct_n: torch.Tensor


def fused_head(
    hidden_nH: torch.Tensor, weight_VH: torch.Tensor, labels_n: torch.Tensor, counts: list[int], vocabulary: Vocabulary
) -> HeadOutput:
    """Sum of cross-entropies of supervised tokens.

    ``hidden_nH`` are the hidden states of the supervised tokens held here, ``labels_n`` int64 their labels, ``counts`` the
    number n of each tp rank (known on the host). All-gather, all-reduce and reduce-scatter over the tp group, as many on each
    rank. No supervised token at all gives an exact zero with zero gradients. Logits are formed in the dtype of the hidden
    states, everything after them in float32 at least.
    """
    return HeadOutput(*_FusedHead.apply(hidden_nH, weight_VH, labels_n, counts, vocabulary))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nH, weight_VH, labels_n, counts, vocabulary):
        wide = torch.promote_types(hidden_nH.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden_nH.device)
        correct_n = torch.zeros(labels_n.shape, dtype=torch.bool, device=hidden_nH.device)
        log_sums = []
        for chunk in _chunks(counts, vocabulary.group.size()):
            hidden_CH, labels_C = chunk.gather(hidden_nH, vocabulary), chunk.gather(labels_n, vocabulary, fill=-1)
            logits_CV = _logits(hidden_CH, weight_VH, vocabulary)
            top_C = logits_CV.max(dim=1).values if vocabulary.rows else logits_CV.new_full(labels_C.shape, -torch.inf)
            _all_reduce(top_C, dist.ReduceOp.MAX, vocabulary)
            target_C = _pick(logits_CV, labels_C, vocabulary)
            _all_reduce(target_C, dist.ReduceOp.SUM, vocabulary)
            sums_C = logits_CV.sub_(top_C[:, None]).exp_().sum(dim=1)
            _all_reduce(sums_C, dist.ReduceOp.SUM, vocabulary)
            log_sum_C = sums_C.log_().add_(top_C)
            loss_sum += torch.where(labels_C >= 0, log_sum_C - target_C, 0).sum()
            correct_n[chunk.mine(len(correct_n))] = chunk.share(target_C == top_C, vocabulary, len(correct_n))
            log_sums.append(log_sum_C)
        ctx.save_for_backward(hidden_nH, weight_VH, labels_n, *log_sums)
        ctx.counts, ctx.vocabulary = counts, vocabulary
        ctx.mark_non_differentiable(correct_n)
        return loss_sum, correct_n

    @staticmethod
    def backward(ctx, grad, _):
        hidden_nH, weight_VH, labels_n, *log_sums = ctx.saved_tensors
        vocabulary = ctx.vocabulary
        dhidden_nH = torch.zeros_like(hidden_nH)
        need_weight = ctx.needs_input_grad[1]
        dweight_VH = torch.zeros_like(weight_VH, dtype=grad.dtype) if need_weight else None
        for chunk, log_sum_C in zip(_chunks(ctx.counts, vocabulary.group.size()), log_sums, strict=True):
            hidden_CH, labels_C = chunk.gather(hidden_nH, vocabulary), chunk.gather(labels_n, vocabulary, fill=-1)
            dlogits_CV = _logits(hidden_CH, weight_VH, vocabulary).sub_(log_sum_C[:, None]).exp_()
            local_C = labels_C - vocabulary.first
            here_C = (local_C >= 0) & (local_C < vocabulary.rows)
            if vocabulary.rows:
                index_C1 = local_C.clamp(0, vocabulary.rows - 1)[:, None]
                dlogits_CV.scatter_add_(1, index_C1, -here_C[:, None].to(dlogits_CV.dtype))
            dlogits_CV = dlogits_CV.mul_(torch.where(labels_C >= 0, grad, 0)[:, None]).to(hidden_CH.dtype)
            chunk.scatter(dlogits_CV @ weight_VH[: vocabulary.rows], dhidden_nH, vocabulary)
            if need_weight:
                dweight_VH[: vocabulary.rows] += dlogits_CV.t() @ hidden_CH
        return dhidden_nH, dweight_VH.to(weight_VH.dtype) if need_weight else None, None, None, None


@dataclass(frozen=True)
class _Chunk:
    """Supervised tokens ``start .. start+size-1`` of every tp rank (fewer where a rank has no more)."""

    start: int
    size: int

    def mine(self, held: int) -> slice:
        return slice(min(self.start, held), min(self.start + self.size, held))

    def gather(self, x: torch.Tensor, vocabulary: Vocabulary, fill: float = 0) -> torch.Tensor:
        """[n, ...] held here to [size * tp, ...] of all tp ranks, missing rows filled."""
        part = x[self.mine(len(x))]
        if vocabulary.group.size() == 1:
            return part
        padded = x.new_full((self.size, *x.shape[1:]), fill)
        padded[: len(part)] = part
        out = x.new_empty(self.size * vocabulary.group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, padded, group=vocabulary.group)
        return out

    def scatter(self, grads_CH: torch.Tensor, out_nH: torch.Tensor, vocabulary: Vocabulary) -> None:
        """Sum the tp ranks' partial gradients and keep the rows of tokens held here."""
        if vocabulary.group.size() > 1:
            partial, grads_CH = grads_CH, grads_CH.new_empty(self.size, grads_CH.shape[1])
            dist.reduce_scatter_tensor(grads_CH, partial, group=vocabulary.group)
        held = out_nH[self.mine(len(out_nH))]
        held.copy_(grads_CH[: len(held)])

    def share(self, x_C: torch.Tensor, vocabulary: Vocabulary, held: int) -> torch.Tensor:
        """The rows of ``x_C`` that belong to tokens held here."""
        mine = self.mine(held)
        first = vocabulary.group.rank() * self.size
        return x_C[first : first + mine.stop - mine.start]


def _chunks(counts: list[int], tp: int) -> list[_Chunk]:
    longest, size = max(counts), max(CHUNK // tp, 1)
    return [_Chunk(start, min(size, longest - start)) for start in range(0, longest, size)]


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    logits_CV = hidden_CH @ weight_VH[: vocabulary.rows].t()
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))


def _pick(logits_CV: torch.Tensor, labels_C: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Logit of each label where this rank holds it, else 0."""
    local_C = labels_C - vocabulary.first
    here_C = (local_C >= 0) & (local_C < vocabulary.rows)
    if not vocabulary.rows:
        return logits_CV.new_zeros(labels_C.shape)
    picked_C = logits_CV.gather(1, local_C.clamp(0, vocabulary.rows - 1)[:, None])[:, 0]
    return torch.where(here_C, picked_C, 0)


def _all_reduce(x: torch.Tensor, op, vocabulary: Vocabulary) -> None:
    if vocabulary.group.size() > 1:
        dist.all_reduce(x, op, group=vocabulary.group)
