"""Attention of vision towers that pack many frames or windows into one row: those of one length run as one batch.

With sdpa, towers as Qwen2.5-VL's call attention once for each frame or window, which is thousands of small calls in every layer.
Where a flash attention is asked for, they make one call and hand over the bounds.

Legend: T patches of the row, P parts (frames or windows) of one length t, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

TOWER_ATTENTION = "mm_sp_flash_tower"
"""The name under which Transformers knows this attention. Towers hand over bounds to names that hold "flash"."""


@dataclass(frozen=True)
class _Parts:
    """The parts of a row in groups of one length: ``groups`` has (P, t) of each. ``order`` int64 [T] has the patches group by
    group, ``back`` [T] undoes it; both are None where all parts are equally long."""

    groups: tuple[tuple[int, int], ...]
    order_T: torch.Tensor | None
    back_T: torch.Tensor | None

    @classmethod
    def of(cls, bounds: torch.Tensor) -> _Parts:
        starts = bounds.cpu().numpy()
        lengths = np.diff(starts)
        kinds = [int(length) for length in np.unique(lengths) if length]
        members = [np.flatnonzero(lengths == length) for length in kinds]
        groups = tuple((len(parts), length) for parts, length in zip(members, kinds, strict=True))
        if len(kinds) < 2:
            return cls(groups, None, None)
        places = [
            (starts[parts][:, None] + np.arange(length)).ravel() for parts, length in zip(members, kinds, strict=True)
        ]
        order = np.concatenate(places)
        order_T, back_T = (torch.from_numpy(x).to(bounds.device) for x in (order, np.argsort(order)))
        return cls(groups, order_T, back_T)


_known: Any = WeakTensorKeyDictionary()
"""The parts of each tensor of bounds: all layers of a tower are given the same one, and only the first waits for the device."""


def tower_attention(
    module: Any,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_unused,
) -> tuple[torch.Tensor, None]:
    """Attention [1, T, H, D] of each patch to those of its part, for Transformers' ``AttentionInterface``. ``cu_seq_lens_q``
    int [parts + 1] are the bounds of the parts. No collective."""
    assert cu_seq_lens_q is not None and attention_mask is None
    parts = _known.get(cu_seq_lens_q)
    if parts is None:
        parts = _known[cu_seq_lens_q] = _Parts.of(cu_seq_lens_q)
    qkv_THD = [x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD)]
    if parts.order_T is not None:
        qkv_THD = [x.index_select(0, parts.order_T) for x in qkv_THD]
    made, first = [], 0
    for count, length in parts.groups:
        q, k, v = (x[first : first + count * length].unflatten(0, (count, length)).transpose(1, 2) for x in qkv_THD)
        out_PHtD = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        made.append(out_PHtD.transpose(1, 2).flatten(0, 1))
        first += count * length
    out_THD = torch.cat(made) if len(made) != 1 else made[0]
    return (out_THD if parts.back_T is None else out_THD.index_select(0, parts.back_T))[None], None
