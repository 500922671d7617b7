"""A few queries against long cached keys and values: attention while an answer is written.

Rows are sequences with one new token each. A row sees the keys of one or more parts; rows of one video share its part, and each
has one of its own. On CUDA a Triton kernel reads every part once for all its rows (``decode_triton``); everywhere else, and for
dtypes it does not know, PyTorch goes through the keys block by block.

Legend: B rows, U keys a part has room for, u those of a block, H query heads, K key/value heads, R = H/K heads per group, D head
dim, M queries of a part (its rows times R).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch

from megatron_vila.parallel.kernels.decode_work import Cached, Part

__all__ = ["Cached", "attend_cached"]

_BLOCK_KEYS = 4096
_BLOCK_SCORES = 1 << 20


def attend_cached(q_BHD: torch.Tensor, parts: Sequence[Part], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each row's one token to all keys of the parts that name the row.

    ``parts``: (keys and values, rows that see them); keys are those of all parts of a row together. Query head h uses key/value
    head h // (H / K). Returns out [B, H, D] and the natural log-sum-exp [H, B] of the scaled scores, both float32 (float64 for
    float64 queries). A row without keys has output 0 and log-sum-exp -inf.

    On CUDA the first call with the same tensors copies their addresses to the device; later ones do not wait for it. For a CUDA
    graph call once before the capture, and keep the tensors as long as the graph.
    Raises ``ValueError`` for shapes, dtypes and rows that do not fit. No collectives, no gradients.
    """
    _check(q_BHD, parts)
    if _triton_takes(q_BHD, parts):
        from megatron_vila.parallel.kernels import decode_triton

        return decode_triton.attend(q_BHD, parts, scale)
    return _attend_in_blocks(q_BHD, parts, scale)


def _triton_takes(q_BHD: torch.Tensor, parts: Sequence[Part]) -> bool:
    """Whether the Triton kernel is for this device and these dtypes."""
    if q_BHD.device.type != "cuda" or q_BHD.dtype not in (torch.bfloat16, torch.float16):
        return False
    return _has_triton() and all(part.k_UKD.dtype in (q_BHD.dtype, torch.float8_e4m3fn) for part, _ in parts)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _attend_in_blocks(q_BHD: torch.Tensor, parts: Sequence[Part], scale: float):
    """Never more than ``_BLOCK_SCORES`` scores or ``_BLOCK_KEYS`` keys in the dtype of the computation at a time."""
    dtype = torch.promote_types(q_BHD.dtype, torch.float32)
    out_BHD = q_BHD.new_zeros(q_BHD.shape, dtype=dtype)
    lse_BH = q_BHD.new_full(q_BHD.shape[:2], -torch.inf, dtype=dtype)
    for part, rows in parts:
        index = list(rows)
        q_nKRD = q_BHD[index].to(dtype).unflatten(1, (part.k_UKD.shape[1], -1))
        q_KMD = q_nKRD.transpose(0, 1).flatten(1, 2) * scale
        # A CPU's length is known; a device's is not waited for.
        on_host = part.length.device.type == "cpu"
        stop = min(int(part.length), part.most) if on_host else part.most
        keys = max(1, min(_BLOCK_KEYS, _BLOCK_SCORES // (q_KMD.shape[0] * q_KMD.shape[1])))
        for first in range(0, stop, keys):
            last = min(first + keys, stop)
            hidden_u = None if on_host else torch.arange(first, last, device=q_BHD.device) >= part.length
            out_KMD, lse_KM = _attend_block(q_KMD, *_block(part, first, last, dtype), hidden_u)
            out_nHD = out_KMD.unflatten(1, q_nKRD.shape[::2]).transpose(0, 1).flatten(1, 2)
            lse_nH = lse_KM.unflatten(1, q_nKRD.shape[::2]).transpose(0, 1).flatten(1, 2)
            out_BHD[index], lse_BH[index] = _merged(out_BHD[index], lse_BH[index], out_nHD, lse_nH)
    return out_BHD, lse_BH.t()


def _block(part: Cached, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [K, u, D] of some tokens, in ``dtype``."""
    k_uKD, v_uKD = (x[first:last].to(dtype) for x in (part.k_UKD, part.v_UKD))
    if part.k_scale_UK is not None and part.v_scale_UK is not None:
        k_uKD = k_uKD * part.k_scale_UK[first:last].unsqueeze(-1)
        v_uKD = v_uKD * part.v_scale_UK[first:last].unsqueeze(-1)
    return k_uKD.transpose(0, 1), v_uKD.transpose(0, 1)


def _attend_block(q_KMD, k_KuD, v_KuD, hidden_u: torch.Tensor | None):
    """Normalized output [K, M, D] and log-sum-exp [K, M] over one block of keys, without those that are hidden."""
    scores_KMu = q_KMD @ k_KuD.transpose(1, 2)
    if hidden_u is not None:  # what stands behind the length may be no number
        scores_KMu = scores_KMu.masked_fill(hidden_u, -torch.inf)
        v_KuD = v_KuD.masked_fill(hidden_u.unsqueeze(-1), 0)
    lse_KM = scores_KMu.logsumexp(-1)
    return (scores_KMu - _finite(lse_KM).unsqueeze(-1)).exp() @ v_KuD, lse_KM


def _merged(out_nHD, lse_nH, more_nHD, more_lse_nH):
    total_nH = torch.logaddexp(lse_nH, more_lse_nH)
    weight_nH1, more_weight_nH1 = ((x - _finite(total_nH)).exp().unsqueeze(-1) for x in (lse_nH, more_lse_nH))
    return out_nHD * weight_nH1 + more_nHD * more_weight_nH1, total_nH


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """0 where there are no keys, so that nothing subtracts infinity from infinity."""
    return lse.masked_fill(lse == -torch.inf, 0)


def _check(q_BHD: torch.Tensor, parts: Sequence[Part]) -> None:
    if q_BHD.dim() != 3:
        raise ValueError(f"queries must be [rows, heads, head dim], not {tuple(q_BHD.shape)}")
    rows_B, heads, head_dim = q_BHD.shape
    for part, rows in parts:
        k, v = part.k_UKD, part.v_UKD
        if k.dim() != 3 or k.shape != v.shape or k.dtype != v.dtype or k.shape[2] != head_dim or heads % k.shape[1]:
            raise ValueError(
                f"queries [{rows_B}, {heads}, {head_dim}] cannot attend to keys {tuple(k.shape)} in {k.dtype} and values "
                f"{tuple(v.shape)} in {v.dtype}; both must be [tokens, K, {head_dim}] with K dividing {heads}"
            )
        for scales in (part.k_scale_UK, part.v_scale_UK):
            if (scales is None) != (k.dtype != torch.float8_e4m3fn):
                raise ValueError(f"keys in {k.dtype} {'need' if scales is None else 'have no'} scales [tokens, K]")
            if scales is not None and (scales.shape != k.shape[:2] or scales.dtype != torch.float32):
                raise ValueError(
                    f"scales must be float32 {tuple(k.shape[:2])}, not {scales.dtype} {tuple(scales.shape)}"
                )
        if part.most > k.shape[0]:
            raise ValueError(f"a length of up to {part.most} does not fit into room for {k.shape[0]} tokens")
        if part.length.dtype != torch.int32 or part.length.numel() != 1 or part.length.device != k.device:
            raise ValueError(f"the length of a part must be one int32 on {k.device}, not {part.length}")
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < rows_B for row in rows):
            raise ValueError(f"a part names rows {rows}; each must be one of {rows_B}, and once only")
    kinds = {(part.k_UKD.shape[1], part.k_UKD.dtype) for part, _ in parts}
    if len(kinds) > 1:
        raise ValueError(f"parts have different numbers of key/value heads or dtypes: {sorted(map(str, kinds))}")
