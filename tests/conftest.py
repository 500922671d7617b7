"""Shared fixtures."""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# The suite is a CPU suite everywhere; the GPU tests are a run of their own.
ON_GPUS = os.environ.get("MEGATRON_VILA_TEST_GPU") == "1"
if ON_GPUS:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # some repeat bit by bit
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from megatron_vila import platform
from tests.ranks import pool

torch.set_num_threads(1)
platform.prepare()


@pytest.fixture(scope="session", autouse=True)
def _close_the_rank_pool():
    yield
    pool.close()


def pytest_collection_modifyitems(config, items):
    if ON_GPUS:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
