"""A step that is recorded once and replayed gives what calling it gives."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_vila.generate.graph import GraphedStep
from tests.gpu import needs_a_gpu

CPU = torch.device("cpu")


def counting(device: torch.device, with_host: bool = False):
    """A step that advances ``position`` and returns a number of it; and how often its Python ran."""
    position, calls = torch.zeros(1, device=device), []

    def step() -> torch.Tensor:
        calls.append(1)
        position.add_(float(position.item() * 0 + 1) if with_host else 1.0)
        return position * position

    return step, position, calls


def test_on_a_cpu_every_call_runs_the_step_once():
    step, position, calls = counting(CPU)
    graphed = GraphedStep(step, CPU)
    assert [graphed().item() for _ in range(4)] == [1, 4, 9, 16]
    assert (len(calls), position.item()) == (4, 4)


@needs_a_gpu
def test_on_a_gpu_calls_after_the_second_replay_what_it_recorded_in_every_answer(caplog):
    device = torch.device("cuda")
    for _ in range(3):  # a graph of an answer is gone when the next one is recorded
        step, position, calls = counting(device)
        graphed = GraphedStep(step, device)
        assert [graphed().item() for _ in range(5)] == [1, 4, 9, 16, 25]
        assert (len(calls), position.item()) == (2, 5)
        position.fill_(9)
        assert graphed().item() == 100
        del graphed
    assert not caplog.records


@needs_a_gpu
@pytest.mark.filterwarnings("ignore")
def test_a_step_that_waits_for_the_device_runs_as_it_is_and_one_line_says_why(caplog):
    device = torch.device("cuda")
    step, _, calls = counting(device, with_host=True)
    graphed = GraphedStep(step, device)
    before = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING):
        assert [graphed().item() for _ in range(4)] == [1, 4, 9, 16]
    assert len(calls) == 5 and torch.cuda.current_stream() == before
    assert torch.rand(1, device=device) < 1, "random numbers are drawn as before"
    assert len(caplog.records) == 1 and "no CUDA graph" in caplog.text
