"""Shared fixtures."""

import os

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# The suite is a CPU suite everywhere; the GPU tests are a run of their own.
if os.environ.get("MEGATRON_VILA_TEST_GPU") != "1":
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
