"""Output layer and cross-entropy in one, on supervised positions only, in pieces: the logits never exist as a whole.

The forward pass goes through the tokens. It also forms the gradient of the hidden states at once, while it has the logits, so
that they are not formed again for it. The backward pass goes through the vocabulary, forms the logits of a block of rows once
more and finishes the weight gradient of these rows, so sums in float32 never need a buffer of the size of the weight. These are
four matrix products in all; in 16 bit each gradient is rounded once.

Under tensor parallelism the vocabulary is split over the tp group and, with Megatron sequence parallelism, each tp rank
holds a slice of the hidden states, gathered piece by piece.

Legend: n supervised tokens held here, R tp ranks, L most supervised tokens of a tp rank, P tokens of a piece over all tp ranks,
C those scored at once, H hidden size, V vocabulary rows of this tp rank, W rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_vila.accelerator import compiled_on_cuda
from megatron_vila.models.decoder.weight_gradient import add_product, nothing
from megatron_vila.plan.budgets import HEAD_LOGIT_BYTES


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
    hidden_nH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_n: torch.Tensor,
    counts: Sequence[int],
    vocabulary: Vocabulary,
    logit_bytes: int = HEAD_LOGIT_BYTES,
    soft_cap: float | None = None,
) -> HeadOutput:
    """Sum of cross-entropies of supervised tokens.

    ``hidden_nH`` are the hidden states of the supervised tokens held here, ``labels_n`` int64 their labels, ``counts`` the
    number n of each tp rank (known on the host), ``logit_bytes`` what logits and their gradients may take at once. All-gather,
    all-reduce and reduce-scatter over the tp group, as many on each rank; ``weight_VH`` has as many rows on each. Without any
    supervised token the loss is an exact zero with zero gradients. Everything after the logits is in float32 at least; on CUDA
    the logits of 16-bit operands are too. With ``soft_cap`` a logit x is soft_cap * tanh(x / soft_cap), as in Gemma 2.

    A weight with a ``main_grad`` (Megatron's DDP) gets its gradient added there, and an empty one through autograd. Gradients
    can be taken once: a second backward pass through the same output raises ``RuntimeError``.
    """
    learns = torch.is_grad_enabled()
    return HeadOutput(*_FusedHead.apply(hidden_nH, weight_VH, labels_n, counts, vocabulary, logit_bytes, soft_cap, learns))


class ForwardTile(NamedTuple):
    """Tokens over all tp ranks whose logits' gradients (16 bit in bf16 training) meet the weight in one product, and how many
    of them have float32 logits at the same time."""

    tokens: int
    scored: int

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, logit_bytes: int) -> ForwardTile:
        # Two scores per product: the product with the weight is the only one that needs many tokens to fill a GPU.
        tokens = _round_down(2 * logit_bytes // (rows * (2 * dtype.itemsize + _wide(dtype).itemsize)), 256)
        return cls(tokens, -(-tokens // 2))


class BackwardTile(NamedTuple):
    """Tokens over all tp ranks and vocabulary rows whose logits are formed at once."""

    tokens: int
    rows: int

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, logit_bytes: int) -> BackwardTile:
        # A square needs the fewest reads of weight and hidden states.
        side = _round_down(math.isqrt(logit_bytes // (dtype.itemsize + _wide(dtype).itemsize)), 128)
        blocks = -(-rows // side)
        # The same rows whatever the number of tokens: compiled code keeps their number as a constant.
        return cls(side, min(side, _round_up(-(-rows // blocks), 128)))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_nH, weight_VH, labels_n, counts, vocabulary, logit_bytes, soft_cap, learns):
        rows, tp, longest, wide = vocabulary.rows, len(counts), max(counts), _wide(hidden_nH.dtype)
        need_hidden, need_weight = (learns and need for need in ctx.needs_input_grad[:2])
        labels_RL = _gather(labels_n, slice(0, longest), vocabulary, fill=-1).view(tp, longest)
        # -1 where the label is not among this rank's rows.
        local_RL = labels_RL - vocabulary.first
        local_RL.masked_fill_((local_RL < 0) | (local_RL >= rows), -1)
        log_sum_RL = local_RL.new_empty(local_RL.shape, dtype=wide)
        correct_RL = local_RL.new_empty(local_RL.shape, dtype=torch.bool)
        loss_sum = hidden_nH.new_zeros((), dtype=wide)
        dhidden_nH = torch.empty_like(hidden_nH) if need_hidden else None

        tile = ForwardTile.of(len(weight_VH), hidden_nH.dtype, logit_bytes)
        share = max(min(tile.tokens // tp, longest), 1)
        logits_CV = _scratch(min(tile.scored, share * tp), rows, hidden_nH, wide)
        dlogits_PV = _scratch(share * tp if need_hidden else 0, rows, hidden_nH, hidden_nH.dtype)
        for tokens in _slices(longest, share):
            hidden_PH = _gather(hidden_nH, tokens, vocabulary)
            labels_P, local_P = labels_RL[:, tokens].flatten(), local_RL[:, tokens].flatten()
            log_sum_P, correct_P = log_sum_RL.new_empty(len(labels_P)), correct_RL.new_empty(len(labels_P))
            for part in _slices(len(labels_P), tile.scored):
                # A copy: compiled code would have a version for each kind of view.
                supervised_C, local_C = labels_P[part] >= 0, local_P[part].clone()
                logits = logits_CV[: len(local_C)]
                top_C, sums_C, target_C = _score(hidden_PH[part], weight_VH[:rows], local_C, logits, soft_cap)
                own_top_C = top_C.clone()
                _all_reduce(top_C, dist.ReduceOp.MAX, vocabulary)
                _all_reduce(target_C, dist.ReduceOp.SUM, vocabulary)
                sums_C *= (own_top_C - top_C).exp_()
                _all_reduce(sums_C, dist.ReduceOp.SUM, vocabulary)
                log_sum_C = sums_C.log_().add_(top_C)
                loss_sum += torch.where(supervised_C, log_sum_C - target_C, 0).sum()
                correct_P[part] = target_C == top_C
                # Fillers get probability zero everywhere, hence no gradient.
                log_sum_P[part] = log_sum_C.masked_fill_(~supervised_C, torch.inf)
                if need_hidden and rows:
                    _write_dlogits(logits, log_sum_C, local_C, dlogits_PV[part], soft_cap)
            log_sum_RL[:, tokens] = log_sum_P.view(tp, -1)
            correct_RL[:, tokens] = correct_P.view(tp, -1)
            if need_hidden:
                _scatter_product(dlogits_PV[: len(labels_P)], weight_VH[:rows], dhidden_nH, tokens, vocabulary)

        ctx.save_for_backward(*((hidden_nH, weight_VH, local_RL, log_sum_RL) if need_weight else ()))
        ctx.dhidden_nH, ctx.vocabulary, ctx.logit_bytes = dhidden_nH, vocabulary, logit_bytes
        ctx.soft_cap = soft_cap
        ctx.main_grad = getattr(weight_VH, "main_grad", None)
        correct_n = correct_RL[vocabulary.group.rank(), : len(labels_n)]
        ctx.mark_non_differentiable(correct_n)
        return loss_sum, correct_n

    @staticmethod
    def backward(ctx, grad, _):
        dhidden_nH, ctx.dhidden_nH = ctx.dhidden_nH, None
        if ctx.needs_input_grad[0]:
            if dhidden_nH is None:
                raise RuntimeError("the gradients of this fused_head output were taken before; call fused_head again")
            _scale(dhidden_nH, grad)
        dweight_VH = None
        if ctx.needs_input_grad[1]:
            hidden_nH, weight_VH, local_RL, log_sum_RL = ctx.saved_tensors
            sum_VH = torch.zeros_like(weight_VH) if ctx.main_grad is None else ctx.main_grad
            if local_RL.numel():
                logits_of = (hidden_nH, weight_VH, local_RL, log_sum_RL)
                _add_dweight(sum_VH, *logits_of, grad, ctx.vocabulary, ctx.logit_bytes, ctx.soft_cap)
            dweight_VH = sum_VH if ctx.main_grad is None else nothing(weight_VH)
        return dhidden_nH, dweight_VH, None, None, None, None, None, None


def _add_dweight(sum_VH, hidden_nH, weight_VH, local_RL, log_sum_RL, grad, vocabulary, logit_bytes, soft_cap) -> None:
    """Add the gradient of the weight, times ``grad``, to ``sum_VH``, block by block of its rows."""
    tp, longest = local_RL.shape
    wide = log_sum_RL.dtype
    tile = BackwardTile.of(len(weight_VH), hidden_nH.dtype, logit_bytes)
    share = max(min(tile.tokens // tp, longest), 1)
    # Copies: compiled code would have a version for each kind of view.
    pieces = [
        (tokens, local_RL[:, tokens].flatten(), log_sum_RL[:, tokens].flatten().clone())
        for tokens in _slices(longest, share)
    ]
    logits_PW, dlogits_PW = (_scratch(share * tp, tile.rows, hidden_nH, dtype) for dtype in (wide, hidden_nH.dtype))
    # One piece is summed within the product, whatever the dtype; several need float32 in between.
    sums_apart = sum_VH.dtype != wide and len(pieces) > 1
    sums_WH = sum_VH.new_empty(tile.rows if sums_apart else 0, sum_VH.shape[1], dtype=wide)
    for block in _slices(len(weight_VH), tile.rows):
        mine_WH = sum_VH[block.start : min(block.stop, vocabulary.rows)]
        count = len(mine_WH)
        into_WH = sums_WH[:count].zero_() if sums_apart else mine_WH
        for tokens, local_P, log_sum_P in pieces:
            hidden_PH = _gather(hidden_nH, tokens, vocabulary)
            if not count:
                continue
            logits, dlogits = logits_PW[: len(local_P)], dlogits_PW[: len(local_P)]
            _write_logits(hidden_PH, weight_VH[block.start : block.start + count], logits[:, :count], soft_cap)
            # Whole tiles, so that no other width is compiled; what lies beyond the last row is never read.
            _write_scaled_dlogits(logits, log_sum_P, local_P - block.start, grad, dlogits, soft_cap)
            for part in _fast_parts(count):
                add_product(dlogits[:, part].t(), hidden_PH, into_WH[part])
        if sums_apart:
            mine_WH.add_(into_WH)


# ---------------------------------------------------------------------------------------------------------------------
# a piece's logits and their gradients


def _score(hidden_CH, weight_VH, local_C, logits_CV, soft_cap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the logits; highest one, sum of exponentials relative to it, and the label's logit (0 if not here), each [C]."""
    if not len(weight_VH):
        top_C = logits_CV.new_full(local_C.shape, -torch.inf)
        return top_C, torch.zeros_like(top_C), torch.zeros_like(top_C)
    _write_logits(hidden_CH, weight_VH, logits_CV, soft_cap)
    return _scan(logits_CV, local_C)


def _write_logits(hidden_CH, weight_VH, logits_CV, soft_cap) -> None:
    for part in _fast_parts(len(weight_VH)):
        _product(hidden_CH, weight_VH[part].t(), logits_CV[:, part])
    if soft_cap is not None:
        _cap(logits_CV, soft_cap)


@compiled_on_cuda
def _cap(logits_CV, soft_cap):
    logits_CV.copy_((logits_CV / soft_cap).tanh() * soft_cap)


@compiled_on_cuda
def _scan(logits_CV, local_C):
    top_C1 = logits_CV.amax(1, keepdim=True)
    sums_C1 = (logits_CV - top_C1).exp().sum(1, keepdim=True)
    target_C1 = logits_CV.gather(1, local_C.clamp(min=0)[:, None])
    return top_C1[:, 0], sums_C1[:, 0], torch.where(local_C >= 0, target_C1[:, 0], 0)


def _dlogits(logits_PW, log_sum_P, local_P, soft_cap):
    probabilities_PW = (logits_PW - log_sum_P[:, None]).exp()
    columns_W = torch.arange(logits_PW.shape[1], device=logits_PW.device)
    dlogits_PW = torch.where(columns_W == local_P[:, None], probabilities_PW - 1, probabilities_PW)
    return dlogits_PW if soft_cap is None else dlogits_PW * (1 - (logits_PW / soft_cap) ** 2)


# Forward and backward pass each have their own function: each is compiled for its own width.
@compiled_on_cuda
def _write_dlogits(logits_CV, log_sum_C, local_C, out_CV, soft_cap):
    out_CV.copy_(_dlogits(logits_CV, log_sum_C, local_C, soft_cap))


@compiled_on_cuda
def _write_scaled_dlogits(logits_PW, log_sum_P, local_P, scale, out_PW, soft_cap):
    out_PW.copy_(_dlogits(logits_PW, log_sum_P, local_P, soft_cap) * scale)


@compiled_on_cuda
def _scale(x, factor):
    x.copy_(x.to(_wide(x.dtype)) * factor)


def _write_dhidden(dlogits_PV, weight_VH, out_PH) -> None:
    """out = dlogits @ weight; zero on a rank that holds padding rows only."""
    out_PH.zero_()
    # The few rows first: the sum is rounded when the many are added.
    for part in reversed(list(_fast_parts(len(weight_VH)))):
        add_product(dlogits_PV[:, part], weight_VH[part], out_PH)


def _fast_parts(rows: int) -> Iterator[slice]:
    """The vocabulary rows in two products: a multiple of 8, and what is left.

    An odd width throws a whole product off the tensor cores' fast path: with 128,257 rows forward and hidden-state products
    ran at 99 and 134 TFLOP/s on an H100.
    """
    return _slices(rows, _round_down(rows, 8))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b; 16-bit operands have a float32 product on CUDA, on a CPU it is rounded in between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


# ---------------------------------------------------------------------------------------------------------------------
# pieces and the tp group


def _gather(x: torch.Tensor, tokens: slice, vocabulary: Vocabulary, fill: float = 0) -> torch.Tensor:
    """Rows ``tokens`` of ``x`` [n, ...] from all tp ranks, rank by rank, missing rows filled. All-gather over tp."""
    part, tp = x[tokens], vocabulary.group.size()
    if tp == 1:
        return part
    size = tokens.stop - tokens.start
    padded = x.new_full((size, *x.shape[1:]), fill)
    padded[: len(part)] = part
    out = x.new_empty(size * tp, *x.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=vocabulary.group)
    return out


def _scatter_product(dlogits_PV, weight_VH, out_nH, tokens: slice, vocabulary: Vocabulary) -> None:
    """Sum the tp ranks' products and keep the rows of tokens held here. Reduce-scatter over tp."""
    held = out_nH[tokens]
    if vocabulary.group.size() == 1:
        _write_dhidden(dlogits_PV, weight_VH, held)
        return
    partial, grads_CH = (held.new_empty(n, held.shape[1]) for n in (len(dlogits_PV), tokens.stop - tokens.start))
    _write_dhidden(dlogits_PV, weight_VH, partial)
    dist.reduce_scatter_tensor(grads_CH, partial, group=vocabulary.group)
    held.copy_(grads_CH[: len(held)])


def _all_reduce(x: torch.Tensor, op, vocabulary: Vocabulary) -> None:
    if vocabulary.group.size() > 1:
        dist.all_reduce(x, op, group=vocabulary.group)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _scratch(tokens: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, columns], uninitialized. Rows start at multiples of 16 bytes, which tensor cores need to be fast."""
    return like.new_empty(tokens, _round_up(columns, 8), dtype=dtype)[:, :columns]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _round_down(number: int, unit: int) -> int:
    """The multiple of ``unit`` below; less than one unit stays as it is, but positive."""
    return number - number % unit if number >= unit else max(number, 1)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
