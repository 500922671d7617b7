"""Host memory and cores."""

import os

import pytest
import torch

from megatron_vila.host_memory import all_threads, page_locked


@pytest.mark.parametrize("ranks,started_with,threads", [(1, 1, 12), (4, 1, 3), (8, 2, 2), (16, 1, 1)])
def test_the_step_uses_the_cores_that_this_rank_can_have(monkeypatch, ranks, started_with, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(started_with)
        with all_threads():
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == started_with
    finally:
        torch.set_num_threads(before)


def test_host_memory_is_exactly_as_large_as_asked_for_and_zero():
    assert page_locked(0, "memory.offload_gib=1").numel() == 0
    buffer = page_locked(3001, "memory.offload_gib=1")
    assert buffer.dtype == torch.uint8 and buffer.nbytes == 3001 and not buffer.any()
