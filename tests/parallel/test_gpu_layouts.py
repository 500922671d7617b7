"""On GPUs with NCCL in bfloat16: every layout errs about as little as one GPU does, with each CUDA kernel.

Run with ``MEGATRON_VILA_TEST_GPU=1 bash tests/run.sh tests/parallel/test_gpu_layouts.py``; skipped elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from megatron_vila.config.schema import Config, ParallelConfig
from tests import samples
from tests.gpu import on_gpus
from tests.parallel import contract
from tests.parallel.test_gradient_contract import MIXED_ROWS
from tests.ranks import pool

CUDA_KERNELS = ("cudnn", "flash2", "fa4")
LAYOUTS = [ParallelConfig(ulysses=2), ParallelConfig(ring=2), ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig()]
ERROR_BUDGET = 3.0
"""Largest gradient error of a layout as a multiple of one GPU's, both against the float64 truth."""


def _config(kernel: str) -> Config:
    config = samples.config(heads=8, kv_heads=2, layers=2)
    llm = dataclasses.replace(config.model.llm, hidden_size=256, head_dim=64, ffn_hidden_size=512, rope_theta=10000.0)
    # Small enough weights that bfloat16 is meaningful.
    # A tower that keeps nothing: frames of the next micro-batch are encoded on a stream of their own.
    vision = dataclasses.replace(config.model.vision, recompute=True)
    model = dataclasses.replace(config.model, llm=llm, vision=vision, init_std=0.05, attention=kernel)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "truth.pt"
    contract.write_truth_in_a_process_without_gpus(_config("reference"), MIXED_ROWS, path)
    return path


@pytest.fixture(scope="module")
def one_gpu(truth):
    """Errors of one GPU with a kernel, measured once."""

    @functools.cache
    def errors(kernel: str) -> dict[str, float]:
        [single] = pool.run(1, contract.compare, _config(kernel), MIXED_ROWS, ParallelConfig(), truth, torch.bfloat16)
        return single

    return errors


@pytest.mark.parametrize("kernel", [on_gpus(name, kernel=name) for name in CUDA_KERNELS])
def test_one_gpu_errs_as_little_as_bfloat16_does(one_gpu, kernel):
    assert max(one_gpu(kernel).values()) < 0.1


@pytest.mark.parametrize(
    ("kernel", "parallel"), [on_gpus(name, layout, kernel=name, gpus=2) for name in CUDA_KERNELS for layout in LAYOUTS]
)
def test_every_layout_errs_about_as_little_as_one_gpu(truth, one_gpu, kernel, parallel):
    single = one_gpu(kernel)
    worst = max(single.values())
    for errors in pool.run(2, contract.compare, _config(kernel), MIXED_ROWS, parallel, truth, torch.bfloat16):
        wrong = {n: (e, single[n]) for n, e in errors.items() if not e <= ERROR_BUDGET * max(single[n], worst / 10)}
        assert not wrong, f"{kernel} {parallel}: {wrong}"
        print(kernel, parallel, f"worst {max(errors.values()):.2e} (one GPU {worst:.2e}), loss {errors['loss']:.2e}")
