"""Sums and merges of the ring's blocks, for one document and for several, whatever the dtype they are kept in."""

import numpy as np
import pytest
import torch

from megatron_vila.parallel.ring import RingLayout
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row_plan import AttentionPlan
from megatron_vila.plan.tokens import ALL, BACK, FRONT

HEADS, DIM, RING = 3, 4, 2


def layout_of(lengths):
    """Layout and the local tokens of each part."""
    layout = RingLayout.of(AttentionPlan.of(RING * np.cumsum([0, *lengths]), GridShape(ring=RING), 0), torch.device("cpu"))
    starts = np.cumsum([0, *lengths[:-1]])
    front = np.concatenate([np.arange(s, s + n // 2) for s, n in zip(starts, lengths, strict=True)])
    back = np.concatenate([np.arange(s + n // 2, s + n) for s, n in zip(starts, lengths, strict=True)])
    return layout, {ALL: np.arange(sum(lengths)), FRONT: front, BACK: back}


lengths = pytest.mark.parametrize("lengths", [[8], [4, 12, 8]], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@dtypes
@lengths
@pytest.mark.parametrize("part", [ALL, FRONT, BACK])
def test_a_block_is_added_where_its_tokens_are(lengths, part, dtype):
    layout, tokens = layout_of(lengths)
    total, x = torch.randn(sum(lengths), HEADS, DIM).to(dtype), torch.randn(len(tokens[part]), HEADS, DIM).bfloat16()
    wanted = total.float()
    wanted[tokens[part]] += x.float()
    layout.add(total, x, part)
    assert torch.equal(total, wanted.to(dtype))


@dtypes
@lengths
@pytest.mark.parametrize("part", [ALL, BACK])
def test_a_merged_block_is_softmax_over_both_and_rounded_once(lengths, part, dtype):
    layout, tokens = layout_of(lengths)
    mine = tokens[part]
    out, part_out = (torch.randn(n, HEADS, DIM).bfloat16() for n in (sum(lengths), len(mine)))
    lse, part_lse = torch.randn(HEADS, sum(lengths)), 2 * torch.randn(HEADS, len(mine))
    weights = torch.stack([lse[:, mine], part_lse]).softmax(0).transpose(1, 2).unsqueeze(-1)
    wanted, wanted_lse = out.float(), lse.clone()
    wanted[mine] = weights[0] * out[mine].float() + weights[1] * part_out.float()
    wanted_lse[:, mine] = torch.stack([lse[:, mine], part_lse]).logsumexp(0)
    merged = out.to(dtype)
    layout.merge(merged, lse, part_out, part_lse, part)
    torch.testing.assert_close(lse, wanted_lse)
    # One step of the dtype's last bit at most, where float32 lies between two values.
    torch.testing.assert_close(merged.float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(merged[tokens[FRONT]], out.to(dtype)[tokens[FRONT]]) or part == ALL
