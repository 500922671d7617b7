"""Every attention kernel against plain autograd (float64, CPU) and against the float64 reference (bfloat16, CUDA).

Legend: T query tokens, U key tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.parallel.kernels import Segments, select_kernel
from megatron_vila.parallel.kernels.cpu import CpuKernel
from megatron_vila.parallel.kernels.cudnn import CudnnKernel
from megatron_vila.parallel.kernels.fa4 import CHECKED_HEAD_DIMS
from megatron_vila.parallel.kernels.reference import ReferenceKernel
from tests.gpu import lacking, on_gpus

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
NAMES = ("out", "lse", "dq", "dk", "dv")


def plain_attention(q_THD, k_UKD, v_UKD, segments, causal, scale):
    """out and log-sum-exp by textbook operations in the dtype of the inputs."""
    groups = q_THD.shape[1] // k_UKD.shape[1]
    outs, lses = [], []
    for bounds in segments.bounds:
        q, k, v = q_THD[bounds.q], k_UKD[bounds.k], v_UKD[bounds.k]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("thd,uhd->htu", q, k) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        if k.shape[0] == 0:
            outs.append(q * 0)
        else:
            outs.append(torch.einsum("htu,uhd->thd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def plain_pass(q, k, v, dout, segments, causal, scale):
    """NAMES by autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = plain_attention(q, k, v, segments, causal, scale)
    grads = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def kernel_pass(kernel, q, k, v, dout, segments, causal, scale):
    out, lse = kernel.forward(q, k, v, segments, causal, scale)
    return dict(zip(NAMES, (out, lse, *kernel.backward(dout, q, k, v, out, lse, segments, causal, scale)), strict=True))


def two_block_pass(kernel, q, k, v, dout, first, rest, scale):
    """Keys in two blocks: outputs merged by log-sum-exp, then each block's backward pass with the merged ones."""
    index_a, index_b = block_indices(first, rest)
    blocks = [(k[index], v[index], part) for index, part in ((index_a, first), (index_b, rest))]
    (out_a, lse_a), (out_b, lse_b) = (kernel.forward(q, kb, vb, part, False, scale) for kb, vb, part in blocks)
    lse = torch.logaddexp(lse_a, lse_b)
    weigh_a, weigh_b = ((one - lse).exp().t().unsqueeze(-1) for one in (lse_a, lse_b))
    out = (out_a * weigh_a + out_b * weigh_b).to(q.dtype)
    dq, dk, dv = torch.zeros_like(q, dtype=lse.dtype), torch.empty_like(k), torch.empty_like(v)
    for (kb, vb, part), index in zip(blocks, (index_a, index_b), strict=True):
        dq_part, dk[index], dv[index] = kernel.backward(dout, q, kb, vb, out, lse, part, False, scale)
        dq += dq_part
    return dict(zip(NAMES, (out, lse, dq.to(q.dtype), dk, dv), strict=True))


def block_indices(first, rest):
    """Places of the keys of both blocks when each segment's keys are those of ``first``, then those of ``rest``."""
    places = ([], [])
    start = 0
    for lengths in zip(first.lengths_k, rest.lengths_k, strict=True):
        for place, length in zip(places, lengths, strict=True):
            place.extend(range(start, start + length))
            start += length
    return (torch.tensor(place, dtype=torch.int64) for place in places)


def inputs(segments, heads, kv_heads, head_dim, dtype=torch.float64, device=CPU, seed=0):
    """q, k, v, dout; the first three are strided views of one fused tensor each, as a projection leaves them."""
    make = torch.Generator(device).manual_seed(seed)
    draw = {"generator": make, "dtype": torch.float32, "device": device}
    q = torch.randn(segments.tokens_q, heads + 1, head_dim, **draw).to(dtype)[:, 1:]
    kv = torch.randn(segments.tokens_k, 2 * kv_heads, head_dim, **draw).to(dtype)
    dout = torch.randn(segments.tokens_q, heads, head_dim, **draw).to(dtype)
    return q, kv[:, :kv_heads], kv[:, kv_heads:], dout


lengths = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)
groups = st.sampled_from([(1, 1), (4, 2), (6, 1), (7, 7)])
cpu_kernels = pytest.mark.parametrize("kernel", [CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)


@cpu_kernels
@settings(deadline=None, max_examples=60)
@given(lengths=lengths, heads=groups, seed=st.integers(0, 99))
def test_causal_attention_of_packed_documents_and_its_gradients_are_exact(kernel, lengths, heads, seed):
    segments = Segments(lengths, lengths)
    q, k, v, dout = inputs(segments, *heads, 8, seed=seed)
    if not lengths:
        out, lse = kernel.forward(q, k, v, segments, True, 0.3)
        assert (out.shape, lse.shape) == (q.shape, (heads[0], 0))
        return
    expected = plain_pass(q, k, v, dout, segments, True, 0.3)
    torch.testing.assert_close(kernel_pass(kernel, q, k, v, dout, segments, True, 0.3), expected, **EXACT)


@cpu_kernels
@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=4), heads=groups)
def test_full_attention_takes_different_numbers_of_queries_and_keys_and_none_of_either(kernel, pairs, heads):
    segments = Segments(*(tuple(side) for side in zip(*pairs, strict=True)))
    given_inputs = inputs(segments, *heads, 8)
    expected = plain_pass(*given_inputs, segments, False, 0.3)
    torch.testing.assert_close(kernel_pass(kernel, *given_inputs, segments, False, 0.3), expected, **EXACT)


@cpu_kernels
@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=3),
    heads=groups,
)
def test_blocks_of_keys_merged_by_log_sum_exp_return_the_gradients_of_the_whole(kernel, sizes, heads):
    queries, front, back = (tuple(side) for side in zip(*sizes, strict=True))
    whole = Segments(queries, tuple(a + b for a, b in zip(front, back, strict=True)))
    q, k, v, dout = inputs(whole, *heads, 8)
    expected = plain_pass(q, k, v, dout, whole, False, 0.3)
    parts = Segments(queries, front), Segments(queries, back)
    torch.testing.assert_close(two_block_pass(kernel, q, k, v, dout, *parts, 0.3), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_kernel_keeps_the_dtype_of_its_inputs_and_returns_log_sum_exp_in_float32(dtype):
    segments = Segments((5, 9, 3), (5, 9, 3))
    given_inputs = inputs(segments, 4, 2, 16, dtype)
    results = kernel_pass(CpuKernel(), *given_inputs, segments, True, 0.25)
    truth = kernel_pass(ReferenceKernel(), *given_inputs, segments, True, 0.25)
    assert {name: x.dtype for name, x in results.items()} == {**dict.fromkeys(NAMES, dtype), "lse": torch.float32}
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(results, truth, rtol=tolerance, atol=tolerance)


def test_a_row_without_keys_gets_output_zero_and_log_sum_exp_minus_infinity():
    segments = Segments((2, 3), (4, 0))
    q, k, v, _ = inputs(segments, 4, 2, 8)
    out, lse = CpuKernel().forward(q, k, v, segments, False, 1.0)
    assert not out[2:].any()
    assert (lse[:, 2:] == -torch.inf).all()
    assert lse[:, :2].isfinite().all()


def test_cumulative_lengths_are_made_once_for_all_layers():
    segments = Segments((2, 0, 3), (4, 1, 0))
    cu_q, cu_k = segments.cu_seqlens(CPU)
    assert (cu_q.tolist(), cu_k.tolist(), cu_q.dtype) == ([0, 2, 2, 5], [0, 4, 5, 5], torch.int32)
    assert segments.cu_seqlens(CPU)[0] is cu_q
    assert (segments.tokens_q, segments.tokens_k, segments.max_q, segments.max_k) == (5, 5, 3, 4)


@pytest.mark.parametrize(
    ("shapes", "segments", "causal", "message"),
    [
        (((4, 2, 8), (4, 2, 8)), ((3,), (4,)), False, "4 queries and 4 keys do not fill segments of 3 queries"),
        (((4, 3, 8), (4, 2, 8)), ((4,), (4,)), False, "3 query heads are not a multiple of 2 key/value heads"),
        (((4, 2, 8), (3, 2, 8)), ((4,), (3,)), True, "as many queries as keys"),
        (((4, 2, 8), (4, 2, 16)), ((4,), (4,)), False, "q [T, H, D] and k, v [U, K, D]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shapes, segments, causal, message):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError) as error:
        CpuKernel().forward(q, k, k, Segments(*segments), causal, 1.0)
    assert message in str(error.value)


def test_segments_of_queries_and_keys_must_pair():
    with pytest.raises(ValueError, match="2 query segments do not pair with 1 key segments"):
        Segments((1, 2), (3,))


def test_auto_selects_the_cpu_kernel_on_a_cpu():
    assert select_kernel("auto", 128, torch.float32, CPU).name == "cpu"


def test_the_reference_runs_only_when_asked():
    assert select_kernel("reference", 128, torch.float32, CPU, deterministic=True).name == "reference"
    with pytest.raises(ValueError, match="finds no kernel .* on meta .*fa4: .*model.attention=reference"):
        select_kernel("auto", 128, torch.float32, torch.device("meta"))


@pytest.mark.parametrize("name", ["fa4", "cudnn", "flash2"])
def test_a_gpu_kernel_on_a_cpu_says_what_is_missing(name):
    with pytest.raises(ValueError, match=f"model.attention={name} cannot run here: it needs an NVIDIA GPU, not cpu"):
        select_kernel(name, 128, torch.bfloat16, CPU)


def test_an_unknown_kernel_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="model.attention=fa3 is not a kernel; use auto, fa4, cudnn"):
        select_kernel("fa3", 128, torch.bfloat16, CPU)


GPU_KERNELS = ("fa4", "cudnn", "cudnn one by one", "flash2")
# Names: queries, keys, (query heads, key/value heads), head dim, causal.
GPU_ROWS = {
    "one document": ((1000,), (1000,), (8, 2), 128, True),
    "packed documents": ((1, 17, 640, 1000, 64), (1, 17, 640, 1000, 64), (8, 2), 128, True),
    "equal documents": ((384,) * 3, (384,) * 3, (8, 2), 128, True),
    "fewer queries than keys": ((300,), (1100,), (8, 2), 128, False),
    "more queries than keys": ((1100,), (300,), (8, 2), 128, False),
    "packed blocks, some empty": ((256, 0, 100, 333), (64, 50, 0, 700), (8, 2), 128, False),
    "video frames": ((729,) * 5, (729,) * 5, (4, 4), 72, False),
    "wide heads": ((500, 300), (500, 300), (4, 2), 256, True),
}


def gpu_cases(rows, names=GPU_KERNELS):
    """Kernels with the rows that they have to run here: fa4 takes its checked head dims, all others every one."""
    return [
        on_gpus(name, row, kernel=name.split()[0], id=f"{name}-{row}")
        for name in names
        for row in rows
        if name != "fa4" or GPU_ROWS[row][3] in CHECKED_HEAD_DIMS
    ]


class CudnnOneByOne(CudnnKernel):
    long_segment_tokens = 64


def gpu_kernel(name, head_dim, deterministic=False):
    if name == "cudnn one by one":
        return CudnnOneByOne()
    return select_kernel(name, head_dim, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()), deterministic)


def assert_within_budget(results, truth, plain):
    """The largest and the mean error of each result are at most twice those of textbook bfloat16 attention."""
    for name in ("out", "dq", "dk", "dv"):
        error, allowed = ((x[name].double() - truth[name]).abs() for x in (results, plain))
        assert error.max() <= 2 * allowed.max() + 1e-4, (
            f"{name}: largest error {error.max():.2e}, plain {allowed.max():.2e}"
        )
        assert error.mean() <= 2 * allowed.mean() + 1e-6, (
            f"{name}: mean error {error.mean():.2e}, plain {allowed.mean():.2e}"
        )
    torch.testing.assert_close(results["lse"].double(), truth["lse"], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("name", "row"), gpu_cases(GPU_ROWS))
def test_a_gpu_kernel_errs_at_most_twice_as_much_as_plain_bfloat16_attention(name, row):
    queries, keys, heads, head_dim, causal = GPU_ROWS[row]
    kernel, segments = gpu_kernel(name, head_dim), Segments(queries, keys)
    given_inputs = inputs(segments, *heads, head_dim, torch.bfloat16, "cuda")
    settled = segments, causal, 1 / math.sqrt(head_dim)
    truth = kernel_pass(ReferenceKernel(), *(x.double() for x in given_inputs), *settled)
    plain = plain_pass(*given_inputs, *settled)
    assert_within_budget(kernel_pass(kernel, *given_inputs, *settled), truth, plain)


@pytest.mark.parametrize("name", [on_gpus(name, kernel=name.split()[0]) for name in GPU_KERNELS])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed documents"])
def test_blocks_of_keys_merged_on_a_gpu_return_the_gradients_of_the_whole(name, packed):
    queries, front, back = ((512, 130), (300, 200), (400, 56)) if packed else ((512,), (512,), (256,))
    kernel, whole = gpu_kernel(name, 128), Segments(queries, tuple(map(sum, zip(front, back, strict=True))))
    given_inputs = inputs(whole, 8, 2, 128, torch.bfloat16, "cuda")
    scale = 1 / math.sqrt(128)
    truth = kernel_pass(ReferenceKernel(), *(x.double() for x in given_inputs), whole, False, scale)
    plain = plain_pass(*given_inputs, whole, False, scale)
    results = two_block_pass(kernel, *given_inputs, Segments(queries, front), Segments(queries, back), scale)
    assert_within_budget(results, truth, plain)


@pytest.mark.parametrize(("name", "row"), gpu_cases(["one document", "packed documents"], ["fa4", "flash2"]))
def test_a_deterministic_gpu_kernel_repeats_its_gradients_bit_by_bit(name, row):
    queries, keys, heads, head_dim, causal = GPU_ROWS[row]
    kernel, segments = gpu_kernel(name, head_dim, deterministic=True), Segments(queries, keys)
    given_inputs = inputs(segments, *heads, head_dim, torch.bfloat16, "cuda")
    runs = [kernel_pass(kernel, *given_inputs, segments, causal, 0.1) for _ in range(5)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", [on_gpus(72, kernel="fa4"), on_gpus(256, kernel="fa4")])
def test_fa4_refuses_head_dims_that_were_not_checked(head_dim):
    with pytest.raises(ValueError, match=f"head dims 64 and 128 only, not for {head_dim}"):
        gpu_kernel("fa4", head_dim)


@pytest.mark.skipif(bool(lacking("cudnn")), reason=lacking("cudnn") or "-")
def test_cudnn_is_left_out_in_deterministic_mode():
    with pytest.raises(
        ValueError, match="model.attention=cudnn cannot run here: its backward pass has no deterministic"
    ):
        select_kernel("cudnn", 128, torch.bfloat16, torch.device("cuda", 0), deterministic=True)


@pytest.mark.parametrize(("name", "row"), gpu_cases(["one document", "packed blocks, some empty", "video frames"]))
def test_no_pass_of_a_gpu_kernel_waits_for_the_device(name, row):
    queries, keys, heads, head_dim, causal = GPU_ROWS[row]
    kernel = gpu_kernel(name, head_dim)
    given_inputs = inputs(Segments(queries, keys), *heads, head_dim, torch.bfloat16, "cuda")
    kernel_pass(kernel, *given_inputs, Segments(queries, keys), causal, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel_pass(kernel, *given_inputs, Segments(queries, keys), causal, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
