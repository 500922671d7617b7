"""Attention of a few queries to long cached keys on a GPU: a split over keys, then one merge of all splits (Flash-Decoding).

Blocks of the GPU take slots (``decode_work``): a share of the keys of a part, for all queries that see it, so that a key is read
once. Where a slot starts and stops follows from the part's length, which is read on the device. Partial results are float32.

Keys in float8_e4m3fn are read as pairs in 16-bit words, the size that the tensor cores' loads can transpose, and become float16
without loss: an even and an odd half of the head dim, each with its own product.

Legend: P parts, S slots, M queries of a slot, N keys of a step, B rows, H query heads, K key/value heads, R = H/K, D head dim,
E partial results of a query.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from megatron_vila.parallel.kernels.decode_work import Cached, Part, deal_keys, deal_work

_LOG2_E = math.log2(math.e)
_MERGED_AT_ONCE = 64


class Tile(NamedTuple):
    """How a slot runs: at most ``queries`` (a power of two from 16 on), ``keys`` a step, and how many blocks fill the GPU."""

    queries: int
    keys: int
    warps: int
    stages: int
    blocks_per_sm: int


TILES = (Tile(16, 128, 4, 3, 1), Tile(32, 64, 4, 3, 2), Tile(64, 64, 4, 4, 1), Tile(128, 64, 8, 3, 1))
FP8_TILES = (Tile(16, 128, 4, 3, 2), Tile(32, 128, 4, 3, 2), Tile(64, 64, 4, 3, 2), Tile(128, 64, 8, 3, 1))
_LEAST_STEPS = 4  # steps that a split should have, so that its start and its merge do not weigh


def attend(q_BHD: torch.Tensor, parts: Sequence[Part], scale: float, tile: Tile | None = None):
    """``decode.attend_cached`` for checked inputs in the dtypes of ``decode``; ``tile`` replaces the choice among ``TILES``."""
    batch, heads, head_dim = q_BHD.shape
    out_BHD = q_BHD.new_empty(q_BHD.shape, dtype=torch.float32)
    lse_HB = q_BHD.new_empty(heads, batch, dtype=torch.float32)
    if not parts or not batch:
        return out_BHD.zero_(), lse_HB.fill_(-torch.inf)
    kv_heads, kv_dtype = parts[0][0].k_UKD.shape[1], parts[0][0].k_UKD.dtype
    fp8 = kv_dtype == torch.float8_e4m3fn
    tile = tile or _choose(FP8_TILES if fp8 else TILES, max(len(rows) for _, rows in parts) * heads // kv_heads)
    tables = _tables(parts, batch, heads, tile)
    places = tables.slots * tile.queries
    padded = max(triton.next_power_of_2(head_dim), 32 if fp8 else 16)
    some_KSMD = q_BHD.new_empty(kv_heads, places, head_dim, dtype=torch.float32)
    some_lse_KSM = q_BHD.new_empty(kv_heads, places, dtype=torch.float32)
    _attend_slots[(tables.slots * kv_heads,)](
        q_BHD.contiguous(),
        tables.queries,
        tables.slots_S5,
        tables.parts_P5,
        some_KSMD,
        some_lse_KSM,
        scale * _LOG2_E,
        tables.slots,
        K=kv_heads,
        R=heads // kv_heads,
        D=head_dim,
        PADDED=padded,
        M=tile.queries,
        N=tile.keys,
        LEAST=_LEAST_STEPS * tile.keys,
        ALIGNED=tables.aligned,
        FP8=fp8,
        FP16=q_BHD.dtype == torch.float16 or fp8,
        PLAIN=q_BHD.device.type != "cuda" or torch.cuda.get_device_capability(q_BHD.device) < (8, 9),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    columns = min(padded, 32)
    _merge_slots[(batch * heads, padded // columns)](
        some_KSMD,
        some_lse_KSM,
        tables.found_BRE,
        tables.count_BR,
        out_BHD,
        lse_HB,
        places,
        tables.found_BRE.shape[2],
        batch,
        H=heads,
        R=heads // kv_heads,
        D=head_dim,
        COLUMNS=columns,
        E=_MERGED_AT_ONCE,
        num_warps=4,
    )
    return out_BHD, lse_HB


def _choose(tiles: Sequence[Tile], queries: int) -> Tile:
    return next((tile for tile in tiles if tile.queries >= queries), tiles[-1])


class _Tables(NamedTuple):
    """``decode_work.Work`` on the device, and where the parts lie in its memory (int64)."""

    slots_S5: torch.Tensor
    queries: torch.Tensor
    found_BRE: torch.Tensor
    count_BR: torch.Tensor
    parts_P5: torch.Tensor
    slots: int
    aligned: int
    """bytes, at most 16, that divide the addresses of all keys and values"""


_KEPT: dict[tuple, _Tables] = {}
"""Tables by all that is in them. They live as long as the lengths of their parts: a CUDA graph may read them as long."""


def _tables(parts: Sequence[Part], batch: int, heads: int, tile: Tile) -> _Tables:
    device, kv_heads = parts[0][0].k_UKD.device, parts[0][0].k_UKD.shape[1]
    rows = tuple(rows for _, rows in parts)
    groups = max(math.ceil(len(seen_by) * heads / kv_heads / tile.queries) for seen_by in rows)
    budget = max(1, _processors(device) * tile.blocks_per_sm // (kv_heads * groups))
    splits = deal_keys([max(part.most, 1) for part, _ in parts], budget, _LEAST_STEPS * tile.keys)
    addresses = tuple(_addresses(part) for part, _ in parts)
    key = (device, addresses, rows, splits, batch, heads, kv_heads, tile.queries)
    if (kept := _KEPT.get(key)) is not None:
        return kept
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "attend_cached must be called once with the same tensors before it is captured in a CUDA graph"
        )
    work = deal_work(rows, splits, batch, heads, kv_heads, tile.queries)
    arrays = work.slots_S5, work.queries, work.found_BRE, work.count_BR, np.array(addresses, np.int64)
    slots_S5, queries, found_BRE, count_BR, parts_P5 = (torch.from_numpy(x).to(device) for x in arrays)
    _KEPT[key] = tables = _Tables(
        slots_S5,
        queries,
        found_BRE,
        count_BR,
        parts_P5,
        slots=len(work.slots_S5),
        aligned=math.gcd(16, *(address for part in addresses for address in part[:2])),
    )
    for part, _ in parts:
        weakref.finalize(part.length, _KEPT.pop, key, None).atexit = False
    return tables


def _addresses(part: Cached) -> tuple[int, ...]:
    """Addresses of a part's tensors, which the kernel reads as whole rows. Raises ``ValueError`` if they are strided."""
    tensors = (part.k_UKD, part.v_UKD, part.k_scale_UK, part.v_scale_UK, part.length)
    if not all(x is None or x.is_contiguous() for x in tensors):
        raise ValueError(f"cached keys, values and scales must be contiguous, not with strides {part.k_UKD.stride()}")
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _attend_slots(
    q,
    queries,
    slots_S5,
    parts_P5,
    some_KSMD,
    some_lse_KSM,
    scale,
    slots,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    FP8: tl.constexpr,
    FP16: tl.constexpr,
    PLAIN: tl.constexpr,
):
    # The heads of one share of the keys run side by side: their keys are neighbors in memory.
    head = tl.program_id(0) % K
    slot = tl.program_id(0) // K
    part = tl.load(slots_S5 + slot * 5)
    split = tl.load(slots_S5 + slot * 5 + 1)
    splits = tl.load(slots_S5 + slot * 5 + 2)
    first = tl.load(slots_S5 + slot * 5 + 3)
    count = tl.load(slots_S5 + slot * 5 + 4)
    WORD: tl.constexpr = tl.int16 if FP8 else (tl.float16 if FP16 else tl.bfloat16)
    WORDS: tl.constexpr = D // 2 if FP8 else D
    WIDTH: tl.constexpr = PADDED // 2 if FP8 else PADDED
    k = tl.multiple_of(tl.load(parts_P5 + part * 5).to(tl.pointer_type(WORD)), ALIGNED)
    v = tl.multiple_of(tl.load(parts_P5 + part * 5 + 1).to(tl.pointer_type(WORD)), ALIGNED)
    k_scale = tl.load(parts_P5 + part * 5 + 2).to(tl.pointer_type(tl.float32))
    v_scale = tl.load(parts_P5 + part * 5 + 3).to(tl.pointer_type(tl.float32))
    length = tl.load(tl.load(parts_P5 + part * 5 + 4).to(tl.pointer_type(tl.int32)))
    share = tl.maximum(tl.cdiv(tl.cdiv(length, splits), N) * N, LEAST)
    start = split * share
    stop = tl.minimum(start + share, length)

    m = tl.arange(0, M)
    words = tl.arange(0, WIDTH)
    place = tl.load(queries + first + m, mask=m < count, other=0) + head * R
    seen = (m < count)[:, None] & (words < WORDS)[None, :]
    if FP8:
        q_even = tl.load(q + place[:, None] * D + 2 * words[None, :], mask=seen, other=0).to(tl.float32)
        q_odd = tl.load(q + place[:, None] * D + 2 * words[None, :] + 1, mask=seen, other=0).to(tl.float32)
        # float16 is exact for the keys; queries fit into it once their largest number is 1.
        largest = tl.maximum(tl.max(tl.abs(q_even), 1), tl.max(tl.abs(q_odd), 1))
        largest = tl.where(largest > 0, largest, 1.0)
        q_even = (q_even / largest[:, None]).to(tl.float16)
        q_odd = (q_odd / largest[:, None]).to(tl.float16)
        q_scale = largest * scale
    else:
        q_even = tl.load(q + place[:, None] * D + words[None, :], mask=seen, other=0)
        q_odd = q_even
        q_scale = tl.full([M], 1.0, tl.float32) * scale

    best = tl.full([M], float("-inf"), tl.float32)
    # Few queries lie across warps: each thread adds up its own columns, and they meet once at the end.
    total = tl.zeros([M, N], tl.float32) if M < 64 else tl.zeros([M], tl.float32)
    even = tl.zeros([M, WIDTH], tl.float32)
    odd = tl.zeros([M, WIDTH], tl.float32)
    whole = start + tl.maximum(stop - start, 0) // N * N
    for n in tl.range(start, whole, N):
        best, total, even, odd = _step(
            q_even, q_odd, q_scale, best, total, even, odd, k, v, k_scale, v_scale, n, stop, head,
            K, WORDS, M, N, WIDTH, FP8, FP16, PLAIN, False,
        )  # fmt: skip
    if whole < stop:
        best, total, even, odd = _step(
            q_even, q_odd, q_scale, best, total, even, odd, k, v, k_scale, v_scale, whole, stop, head,
            K, WORDS, M, N, WIDTH, FP8, FP16, PLAIN, True,
        )  # fmt: skip

    total = tl.sum(total, 1) if M < 64 else total
    out = head.to(tl.int64) * slots * M + slot * M + m
    tl.store(some_lse_KSM + out, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=m < count)
    total = total * 16384.0 if FP16 else total
    if FP8:
        tl.store(some_KSMD + out[:, None] * D + 2 * words[None, :], even / total[:, None], mask=seen)
        tl.store(some_KSMD + out[:, None] * D + 2 * words[None, :] + 1, odd / total[:, None], mask=seen)
    else:
        tl.store(some_KSMD + out[:, None] * D + words[None, :], even / total[:, None], mask=seen)


@triton.jit
def _step(
    q_even, q_odd, q_scale, best, total, even, odd, k, v, k_scale, v_scale, first, stop, head,
    K: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr,
    FP16: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add N keys from ``first`` on. Exponents are of base 2, relative to ``best``; sums for float16 are times 2^14."""
    row = head.to(tl.int64) + first * K
    n = tl.arange(0, N)
    k_words = _rows(k + row * WORDS, n, first + n < stop, K, WORDS, WIDTH, MASKED)
    v_words = _rows(v + row * WORDS, n, first + n < stop, K, WORDS, WIDTH, MASKED)
    if FP8:
        k_even, k_odd = _halves(k_words, PLAIN)
        scores = tl.dot(q_even, tl.trans(k_even))
        scores = tl.dot(q_odd, tl.trans(k_odd), acc=scores)
        k_factor = _factors(k_scale + row, n, first + n < stop, K, MASKED)
        # The weight of a value is exp2(score) times its scale: that product is kept within float16.
        v_factor = tl.maximum(_factors(v_scale + row, n, first + n < stop, K, MASKED), 8.7e-19)
        scores = scores * q_scale[:, None] * k_factor[None, :]
        if MASKED:
            scores = tl.where((first + n < stop)[None, :], scores, float("-inf"))
        exponent = ((v_factor.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)  # the least power of 2 above it
        better = tl.maximum(best, tl.max(scores + exponent[None, :], 1))
    else:
        scores = tl.dot(q_even, tl.trans(k_words)) * q_scale[:, None]
        if MASKED:
            scores = tl.where((first + n < stop)[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
    fade = tl.exp2(best - better)
    p = tl.exp2(scores - better[:, None])
    total = total * fade[:, None] + p if M < 64 else total * fade + tl.sum(p, 1)
    if FP8:
        v_even, v_odd = _halves(v_words, PLAIN)
        weights = (p * (v_factor * 16384.0)[None, :]).to(tl.float16)
        even = tl.dot(weights, v_even, acc=even * fade[:, None])
        odd = tl.dot(weights, v_odd, acc=odd * fade[:, None])
    else:
        weights = (p * 16384.0).to(tl.float16) if FP16 else p.to(tl.bfloat16)
        even = tl.dot(weights, v_words, acc=even * fade[:, None])
    return better, total, even, odd


@triton.jit
def _rows(base, n, kept, K: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """One head's words of N tokens, [N, WIDTH]."""
    words = tl.arange(0, WIDTH)
    at = base + n[:, None] * (K * WORDS) + words[None, :]
    if MASKED and WORDS < WIDTH:
        return tl.load(at, mask=kept[:, None] & (words < WORDS)[None, :], other=0)
    elif MASKED:
        return tl.load(at, mask=kept[:, None], other=0)
    elif WORDS < WIDTH:
        return tl.load(at, mask=(words < WORDS)[None, :], other=0)
    else:
        return tl.load(at)


@triton.jit
def _factors(base, n, kept, K: tl.constexpr, MASKED: tl.constexpr):
    """One head's scales of N tokens, [N]."""
    if MASKED:
        return tl.load(base + n * K, mask=kept, other=0)
    else:
        return tl.load(base + n * K)


@triton.jit
def _halves(words, PLAIN: tl.constexpr):
    """The two float8_e4m3fn of each 16-bit word as float16: those at even places and those at odd places."""
    if PLAIN:
        even = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return even, odd
    # Two words at a time: the same in 3 instructions instead of about 11.
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 sorted;
            .reg .b16 evens, odds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {evens, odds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, evens;
            cvt.rn.f16x2.e4m3x2 $1, odds;
        }
        """,
        "=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _merge_slots(
    some_KSMD,
    some_lse_KSM,
    found_BRE,
    count_BR,
    out_BHD,
    lse_HB,
    places,
    most_found,
    batch,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    E: tl.constexpr,
):
    row = tl.program_id(0) // H
    h = tl.program_id(0) % H
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    query = row * R + h % R
    count = tl.load(count_BR + query)
    base = (h // R).to(tl.int64) * places
    best = float("-inf")
    total = 0.0
    out = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, E):
        e = first + tl.arange(0, E)
        at = base + tl.load(found_BRE + query * most_found + e, mask=e < count, other=0)
        lse = tl.load(some_lse_KSM + at, mask=e < count, other=float("-inf"))
        # Slots without keys left no numbers.
        some = tl.load(
            some_KSMD + at[:, None] * D + d[None, :], mask=(lse > float("-inf"))[:, None] & (d < D), other=0.0
        )
        better = tl.maximum(best, tl.max(lse, 0))
        finite = tl.where(better > float("-inf"), better, 0.0)
        weight = tl.exp2(lse - finite)
        fade = tl.exp2(best - finite)
        total = total * fade + tl.sum(weight, 0)
        out = out * fade + tl.sum(weight[:, None] * some, 0)
        best = better
    empty = total == 0
    tl.store(out_BHD + (row * H + h) * D + d, out / tl.where(empty, 1.0, total), mask=d < D)
    lse = tl.where(empty, float("-inf"), (best + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    if tl.program_id(1) == 0:
        tl.store(lse_HB + h * batch + row, lse)
