"""A few queries against long cached keys and values: attention while an answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Cached(NamedTuple):
    """Keys and values of one part; the first ``length`` tokens count."""

    k_UKD: torch.Tensor
    v_UKD: torch.Tensor
    k_scale_UK: torch.Tensor | None
    v_scale_UK: torch.Tensor | None
    length: torch.Tensor
    most: int


def attend_cached(q_BHD: torch.Tensor, parts: Sequence[tuple[Cached, tuple[int, ...]]], scale: float):
    """Softmax attention of each row's one token to the keys of all parts that name the row: out [B, H, D], log-sum-exp [H, B]."""
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    out_BHD = q_BHD.new_zeros(q_BHD.shape, dtype=wide)
    lse_HB = q_BHD.new_full((q_BHD.shape[1], q_BHD.shape[0]), -torch.inf, dtype=wide)
    for part, rows in parts:
        length = int(part.length)
        if not length:
            continue
        k, v = part.k_UKD[:length].to(wide), part.v_UKD[:length].to(wide)
        if part.k_scale_UK is not None and part.v_scale_UK is not None:
            k, v = k * part.k_scale_UK[:length, :, None], v * part.v_scale_UK[:length, :, None]
        q = q_BHD[list(rows)].to(wide).unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("bkgd,ukd->bkgu", q, k) * scale
        outs, lses = torch.einsum("bkgu,ukd->bkgd", scores.softmax(-1), v).flatten(1, 2), scores.logsumexp(-1).flatten(1)
        for place, row in enumerate(rows):
            total = torch.logaddexp(lse_HB[:, row], lses[place])
            mine, other = (lse_HB[:, row] - total).exp(), (lses[place] - total).exp()
            out_BHD[row] = out_BHD[row] * mine[:, None] + outs[place] * other[:, None]
            lse_HB[:, row] = total
    return out_BHD, lse_HB
