"""A few queries against long caches, against textbook attention in float64; the Triton kernel too, in its interpreter.

Legend: B rows, U keys a part has room for, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vila.parallel.kernels import decode
from megatron_vila.parallel.kernels.decode import Cached, attend_cached
from megatron_vila.parallel.kernels.decode_work import deal_keys, deal_work
from tests.gpu import needs_a_gpu

EXACT = {"rtol": 1e-10, "atol": 1e-12}
FP8 = torch.float8_e4m3fn
# Two videos; rows 0 and 2 see the first, row 1 the second; rows 0, 1 and 3 have tails, that of row 1 still empty.
SHARED_AND_OWN = [(70, 61, (0, 2)), (50, 50, (1,)), (8, 3, (0,)), (8, 0, (1,)), (8, 8, (3,))]


def cached(room, length, kv_heads, head_dim, dtype=torch.float64, device="cpu"):
    """A part whose memory behind ``length`` holds no numbers."""
    k_UKD, v_UKD = (torch.randn(room, kv_heads, head_dim, device=device, dtype=torch.float64) * 2 for _ in "kv")
    scales = [None, None]
    if dtype == FP8:
        scales = [x.abs().amax(-1).float() / 448 for x in (k_UKD, v_UKD)]
        k_UKD, v_UKD = (x / scale.unsqueeze(-1) for x, scale in zip((k_UKD, v_UKD), scales, strict=True))
    for x in (k_UKD, v_UKD, *(scale for scale in scales if scale is not None)):
        x[length:] = torch.nan
    k_UKD, v_UKD = k_UKD.to(dtype), v_UKD.to(dtype)
    return Cached(k_UKD, v_UKD, *scales, torch.tensor([length], dtype=torch.int32, device=device), room)


def textbook(q_BHD, parts, scale):
    """Row by row: all keys of the row's parts in one softmax, in float64."""
    out_BHD = torch.zeros(q_BHD.shape, dtype=torch.float64, device=q_BHD.device)
    lse_HB = torch.full(q_BHD.shape[1::-1], -torch.inf, dtype=torch.float64, device=q_BHD.device)
    for row, q_HD in enumerate(q_BHD.double()):
        seen = [part for part, rows in parts if row in rows]
        keys, values = ([_numbers(part, name) for part in seen] for name in "kv")
        if sum(map(len, keys)):
            k_uHD, v_uHD = (torch.cat(x).repeat_interleave(len(q_HD) // x[0].shape[1], 1) for x in (keys, values))
            scores_Hu = torch.einsum("hd,uhd->hu", q_HD, k_uHD) * scale
            out_BHD[row], lse_HB[:, row] = (
                torch.einsum("hu,uhd->hd", scores_Hu.softmax(-1), v_uHD),
                scores_Hu.logsumexp(-1),
            )
    return out_BHD, lse_HB


def _numbers(part, name):
    tokens, scale = slice(int(part.length)), getattr(part, f"{name}_scale_UK")
    x_uKD = getattr(part, f"{name}_UKD")[tokens].double()
    return x_uKD if scale is None else x_uKD * scale[tokens].double().unsqueeze(-1)


def rows_and_parts(batch, heads, kv_heads, head_dim, described, dtype=torch.float64, kv_dtype=None, device="cpu"):
    q_BHD = (torch.randn(batch, heads, head_dim, device=device) * 2).to(dtype)
    made = [(cached(room, n, kv_heads, head_dim, kv_dtype or dtype, device), rows) for room, n, rows in described]
    return q_BHD, made


def assert_equal(found, truth, **tolerance):
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y, **(tolerance or EXACT))


@pytest.mark.parametrize("heads", [(7, 1), (8, 2), (3, 3)], ids=["7 share one", "4 share one", "1 each"])
def test_rows_merge_the_keys_of_all_parts_that_name_them_and_of_no_other(heads):
    q_BHD, parts = rows_and_parts(4, *heads, 16, SHARED_AND_OWN)
    assert_equal(attend_cached(q_BHD, parts, 0.3), textbook(q_BHD, parts, 0.3))


def test_keys_are_read_block_by_block_and_the_blocks_are_merged_exactly(monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_SCORES", 7 * 8 * 2)
    q_BHD, parts = rows_and_parts(4, 8, 2, 16, SHARED_AND_OWN)
    sizes = []
    attend_block = decode._attend_block
    monkeypatch.setattr(
        decode, "_attend_block", lambda q, k, *rest: sizes.append(k.shape[1]) or attend_block(q, k, *rest)
    )
    assert_equal(attend_cached(q_BHD, parts, 0.3), textbook(q_BHD, parts, 0.3))
    assert sizes == [7] * 8 + [5] + [14] * 3 + [8] + [3] + [8]  # by 2 rows, then 1; an empty part has no block


def test_a_row_without_keys_has_output_zero_and_log_sum_exp_minus_infinity():
    q_BHD, parts = rows_and_parts(3, 4, 2, 8, [(5, 0, (0, 1)), (5, 4, (1,))])
    out_BHD, lse_HB = attend_cached(q_BHD, parts, 1.0)
    assert (out_BHD[0] == 0).all() and (out_BHD[2] == 0).all() and out_BHD[1].abs().min() > 0
    assert (lse_HB == -torch.inf).tolist() == [[True, False, True]] * 4
    out_BHD, lse_HB = attend_cached(q_BHD, [], 1.0)
    assert (out_BHD == 0).all() and (lse_HB == -torch.inf).all()


def test_float8_keys_and_values_count_with_their_scales():
    q_BHD, parts = rows_and_parts(4, 8, 2, 16, SHARED_AND_OWN, kv_dtype=FP8)
    assert_equal(attend_cached(q_BHD, parts, 0.3), textbook(q_BHD, parts, 0.3))


def test_sixteen_bit_rows_are_computed_and_returned_in_float32():
    q_BHD, parts = rows_and_parts(4, 8, 2, 16, SHARED_AND_OWN, dtype=torch.bfloat16)
    out_BHD, lse_HB = attend_cached(q_BHD, parts, 0.3)
    assert (out_BHD.dtype, lse_HB.dtype) == (torch.float32, torch.float32)
    assert_equal((out_BHD, lse_HB), textbook(q_BHD, parts, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: (part._replace(v_UKD=part.v_UKD[:, :1]), (0,)), r"values \(9, 1, 8\)"),
        (lambda part: (part._replace(k_UKD=part.k_UKD.to(FP8), v_UKD=part.v_UKD.to(FP8)), (0,)), "need scales"),
        (lambda part: (part._replace(k_scale_UK=torch.ones(9, 2)), (0,)), "have no scales"),
        (lambda part: (part._replace(most=10), (0,)), "room for 9 tokens"),
        (lambda part: (part._replace(length=torch.tensor([3])), (0,)), "one int32"),
        (lambda part: (part, (0, 0)), "once only"),
        (lambda part: (part, (2,)), "each must be one of 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    q_BHD, [(part, _)] = rows_and_parts(2, 4, 2, 8, [(9, 5, (0,))])
    with pytest.raises(ValueError, match=message):
        attend_cached(q_BHD, [change(part)], 1.0)


def test_keys_are_dealt_by_length_and_short_parts_are_not_cut():
    assert deal_keys([1_180_000], 66, 256) == (66,)
    assert deal_keys([1_180_000, 500], 66, 256) == (65, 1)
    assert deal_keys([100_000], 1000, 256) == (512,)
    assert deal_keys([1_180_000, *[500] * 15], 66, 256) == (65, *[1] * 15)
    grown = {deal_keys([1_180_000, 300 + i], 66, 256) for i in range(200)}
    assert len(grown) == 1


def test_every_query_finds_each_share_of_its_keys_once():
    rows, splits = ((0, 1, 2), (1,), (2,)), (3, 2, 1)
    work = deal_work(rows, splits, batch=4, heads=10, kv_heads=2, tile=4)
    seen = {}
    for place, (part, split, of, first, count) in enumerate(work.slots_S5.tolist()):
        assert of == splits[part] and count <= 4
        for m, query in enumerate(work.queries[first : first + count].tolist()):
            seen.setdefault(divmod(query, 10), []).append((place * 4 + m, (part, split)))
    for row in range(4):
        for r in range(5):
            found = work.found_BRE[row, r, : work.count_BR[row, r]].tolist()
            wanted = seen.get((row, r), [])
            assert sorted(found) == sorted(place for place, _ in wanted)
            shares = [(part, split) for part, by in enumerate(rows) if row in by for split in range(splits[part])]
            assert sorted(share for _, share in wanted) == shares
    assert not np.any(work.count_BR[3])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_equals_textbook_attention_in_its_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.parallel.test_decode_kernel"],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted() -> None:
    """What ``attend_cached`` does on a GPU, in this process. The interpreter multiplies no bfloat16: float16 stands for both."""
    from megatron_vila.parallel.kernels import decode_triton

    small = decode_triton.Tile(16, 32, 4, 3, 8)
    for kv_dtype in (torch.float16, FP8):
        for batch, heads, kv_heads, head_dim, described in TRITON_CASES:
            q_BHD, parts = rows_and_parts(batch, heads, kv_heads, head_dim, described, torch.float16, kv_dtype)
            found = decode_triton.attend(q_BHD, parts, head_dim**-0.5, small)
            assert_equal(found, textbook(q_BHD, parts, head_dim**-0.5), rtol=1e-2, atol=5e-3)
    assert decode_triton._KEPT
    del parts
    assert not decode_triton._KEPT  # addresses on the device go with the parts


TRITON_CASES = [
    (4, 7, 1, 32, [(300, 290, (0, 2)), *SHARED_AND_OWN[1:]]),
    (3, 16, 2, 40, [(70, 33, (2, 0, 1)), (70, 0, (1,))]),
]


@needs_a_gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("batch", [1, 5, 20])
def test_a_gpu_errs_at_most_as_much_as_rounded_weights_and_a_graph_sees_lengths_grow(kv_dtype, batch):
    described = [(9000, 8111, tuple(range(batch))), *((64, 3 * i, (i,)) for i in range(batch))]
    q_BHD, parts = rows_and_parts(batch, 28, 4, 128, described, torch.bfloat16, kv_dtype, "cuda")
    attend_cached(q_BHD, parts, 0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend_cached(q_BHD, parts, 0.05)
    for length in (8111, 1, 77):
        parts[0][0].length.fill_(length)
        graph.replay()
        assert_equal(found, textbook(q_BHD, parts, 0.05), rtol=1e-2, atol=2e-2)


if __name__ == "__main__":
    torch.manual_seed(0)
    interpreted()
