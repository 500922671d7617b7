"""On GPUs with NCCL in bfloat16: every layout errs about as little as one GPU does, with each CUDA kernel.

So does every memory policy, and with all that overlaps results repeat bit by bit. Run with ``MEGATRON_VILA_TEST_GPU=1 bash
tests/run.sh tests/parallel/test_gpu_layouts.py``.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config, MemoryConfig, ParallelConfig
from megatron_vila.parallel.kernels.cudnn import CudnnKernel
from tests import samples
from tests.gpu import on_gpus
from tests.parallel import contract
from tests.parallel.test_gradient_contract import MEMORY_POLICIES, MIXED_ROWS
from tests.ranks import pool

CUDA_KERNELS = ("cudnn", "flash2", "fa4")
LAYOUTS = [ParallelConfig(ulysses=2), ParallelConfig(ring=2), ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig()]
ERROR_BUDGET = 3.0
"""Largest gradient error of a layout as a multiple of one GPU's, both against the float64 truth."""
KERNEL_BUDGET = 1.25
"""Error of a gradient with a kernel as a multiple of that with exact attention, all else in bfloat16 in both, where the latter
is too large for the bound of the others: those of the tower's queries and keys are."""
IN_CHUNKS = ParallelConfig(ulysses=2, ulysses_chunks=2)


def long_rows(unit: int) -> contract.Rows:
    return [[samples.document(f"long-{n}", "F" * frames + "t" * unit * 16)] for n, frames in enumerate((unit, unit // 2, unit))]


ROWS = {"mixed": MIXED_ROWS, "one document each": 2 * long_rows(16)}


def rows_of(kernel: str) -> str:
    """Short documents side by side cuDNN leaves to another kernel."""
    return "one document each" if kernel == "cudnn" else "mixed"


def _config(kernel: str) -> Config:
    config = samples.config(heads=16, kv_heads=4, layers=4)
    llm = dataclasses.replace(config.model.llm, hidden_size=256, head_dim=64, ffn_hidden_size=512, rope_theta=10000.0)
    # Small enough weights that bfloat16 is meaningful.
    # A tower that keeps nothing: frames of the next micro-batch are encoded on a stream of their own.
    vision = dataclasses.replace(config.model.vision, recompute=True)
    model = dataclasses.replace(config.model, llm=llm, vision=vision, init_std=0.05, attention=kernel)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """File with the truth of some rows, written once."""

    @functools.cache
    def path(rows: str):
        file = tmp_path_factory.mktemp("truth") / "truth.pt"
        contract.write_truth_in_a_process_without_gpus(_config("reference"), ROWS[rows], file)
        return file

    return path


@pytest.fixture(scope="module")
def one_gpu(truth):
    """Errors of one GPU with a kernel, measured once."""

    @functools.cache
    def errors(kernel: str, rows: str) -> dict[str, float]:
        [single] = pool.run(1, compare, _config(kernel), rows, ParallelConfig(), truth(rows))
        return single

    return errors


def compare(rank: int, config: Config, rows: str, parallel: ParallelConfig, path) -> dict[str, float]:
    """As ``contract.compare``; with cuDNN each decoder layer must have given it every row, whole."""
    called, forward = [], CudnnKernel._forward

    def counted(self, q_THD, k_UKD, v_UKD, segments, causal, scale):
        _, for_another = self._split(segments)
        called.append(causal and not for_another.segments.pairs)
        return forward(self, q_THD, k_UKD, v_UKD, segments, causal, scale)

    CudnnKernel._forward = counted
    try:
        errors = contract.compare(rank, config, ROWS[rows], parallel, path, torch.bfloat16)
    finally:
        CudnnKernel._forward = forward
    if config.model.attention == "cudnn":
        replicas = dist.get_world_size() // (parallel.tp * parallel.pp * parallel.ulysses * parallel.ring)
        assert sum(called) == len(ROWS[rows]) // replicas * config.model.llm.num_layers // parallel.pp
    return errors


@pytest.mark.parametrize("kernel", [on_gpus(name, kernel=name) for name in CUDA_KERNELS])
def test_one_gpu_errs_about_as_little_as_with_exact_attention(one_gpu, kernel):
    found, exact = (one_gpu(name, rows_of(kernel)) for name in (kernel, "reference"))
    assert {n: (e, exact[n]) for n, e in found.items() if not e < max(0.1, KERNEL_BUDGET * exact[n])} == {}
    assert max(exact.values()) < 0.15
    assert not larger(found, exact)


def larger(errors: dict[str, float], single: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Errors beyond the budget, each with the one it is compared with."""
    worst = max(single.values())
    return {n: (e, single[n]) for n, e in errors.items() if not e <= ERROR_BUDGET * max(single[n], worst / 10)}


def check(config: Config, parallel: ParallelConfig, truth, one_gpu) -> None:
    """No gradient of two GPUs errs much more than on one."""
    rows = rows_of(config.model.attention)
    single = one_gpu(config.model.attention, rows)
    for errors in pool.run(2, compare, config, rows, parallel, truth(rows)):
        wrong = larger(errors, single)
        assert not wrong, f"{config.model.attention} {config.memory} {parallel}: {wrong}"
        print(parallel, f"worst {max(errors.values()):.2e} (one GPU {max(single.values()):.2e}), loss {errors['loss']:.2e}")


@pytest.mark.parametrize(
    ("kernel", "parallel"), [on_gpus(name, layout, kernel=name, gpus=2) for name in CUDA_KERNELS for layout in LAYOUTS]
)
def test_every_layout_errs_about_as_little_as_one_gpu(truth, one_gpu, kernel, parallel):
    check(_config(kernel), parallel, truth, one_gpu)


@pytest.mark.parametrize("parallel", [on_gpus(p, kernel="fa4", gpus=2) for p in (LAYOUTS[0], IN_CHUNKS, LAYOUTS[1])])
@pytest.mark.parametrize("policy", MEMORY_POLICIES)
def test_every_memory_policy_errs_about_as_little_as_none_on_one_gpu(truth, one_gpu, policy, parallel):
    config = _config("fa4")
    config.memory = MemoryConfig(**MEMORY_POLICIES[policy])
    check(config, parallel, truth, one_gpu)


@pytest.mark.parametrize(
    ("kernel", "dtype", "unit", "times"),
    [("cpu", torch.float64, 2, 2), on_gpus("fa4", torch.bfloat16, 128, 8, kernel="fa4", gpus=2)],
    ids=["cpu", "gpus"],
)
@pytest.mark.parametrize(
    ("parallel", "offload_gib"),
    [(ParallelConfig(ulysses=2), 1.0), (IN_CHUNKS, 1.0), (ParallelConfig(ring=2), 2e-3)],
    ids=["ulysses", "chunks", "ring, part on the host"],
)
def test_with_all_that_overlaps_gradients_repeat_bit_by_bit(kernel, dtype, unit, times, parallel, offload_gib):
    """Exchanges, blocks of the ring, copies to the host, the next frames and the reduction of gradients run beside other work."""
    config = _config(kernel)
    config.train.deterministic = True
    config.memory = MemoryConfig(recompute="attention_output", block_layers=2, mlp_tile=256, offload_gib=offload_gib)
    assert pool.run(2, contract.repeat, config, long_rows(unit), parallel, dtype, times) == [[], []]
