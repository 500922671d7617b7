"""What a run says about its memory and where its time goes."""

import gzip
import json
import re

import pytest
import torch

from megatron_vila.config.load import load_config
from megatron_vila.plan.budgets import GIB
from megatron_vila.training import trainer
from megatron_vila.training.memory_report import out_of_memory_message
from tests.ranks import pool
from tests.training.real_run import Layout, overrides, train

KEPT = [
    *("memory.recompute=attention_output", "memory.block_layers=2", "memory.mlp_tile=16", "memory.offload_gib=0.5"),
    "optim.offload_fraction=1",
]


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    """A run of two steps on two ranks that keeps activations and optimizer state on the host and traces step 2 on rank 1."""
    output = tmp_path_factory.mktemp("kept")
    layout = Layout(2, tp=2).overrides()
    settings = overrides(videos, output, *layout, *KEPT, "train.steps=2", "profile.steps=[2]", "profile.ranks=[1]")
    line, _ = pool.run(2, train_with_the_size_of_a_gpu, settings)
    return output, line


def train_with_the_size_of_a_gpu(rank, settings):
    """As ``train``, where the device says that it has 80 GiB; returns what the report says in a line."""
    lines, write = [], trainer.write_memory_report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_vila.accelerator.device_memory_bytes", lambda: 80 * GIB)
        patch.setattr(trainer, "write_memory_report", lambda *given: lines.append(write(*given)))
        train(rank, settings)
    return lines[0]


def test_memory_is_predicted_by_part_and_the_peak_of_every_rank_stands_beside(run):
    output, line = run
    report = json.loads((output / "memory.json").read_text())
    predicted = report["predicted"]
    parts = {"weights", "gradients", "optimizer", "llm_activations", "vision_activations", "workspace", "slack"}
    assert set(predicted) == parts | {"total"}
    assert predicted["slack"] == 2, "of a GPU"
    peak = max(rank["peak"] for rank in report["ranks"])
    said = f"memory of the fullest rank: {predicted['total'] - 2:.2f} GiB predicted, {peak:.2f} GiB measured on rank "
    assert line.startswith(said), "both without what the allocator does not hand out"
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert rank["peak"] > 0 and rank["host"] > 0 and rank["weights"] > 0
        assert predicted["optimizer"] == rank["optimizer"] == 0, "all of it is offloaded"


def test_a_traced_step_is_a_chrome_trace_of_the_rank_that_was_named(run):
    output, _ = run
    (file,) = (output / "traces").iterdir()
    assert file.name == "step-000002-rank-1.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any("_SavedAttention2D" in event.get("name", "") for event in events)


def test_a_gpu_that_is_too_small_is_answered_with_the_largest_part_and_a_setting(monkeypatch):
    """The message alone: a CPU has no such error to raise."""
    monkeypatch.setattr("megatron_vila.accelerator.device_memory_bytes", lambda: 80 * GIB)
    config = load_config("models/qwen2-7b", ["train.seq_length=1048576"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    message = out_of_memory_message(config, 8, 3, error)
    assert message.startswith("rank 3 is out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "the largest part is llm activations: set memory.recompute=attention_output" in message


def test_the_tower_takes_its_share_of_the_gpu_there_is(monkeypatch):
    """2 H200 of 139.8 GiB reached 45.84 GiB in such a run: an eighth of one is 27 frames at once; of 80 GB it would be 14."""

    def predicted(gib):
        monkeypatch.setattr("megatron_vila.accelerator.device_memory_bytes", lambda: int(gib * GIB))
        settings = ["model.llm.num_layers=4", "model.vision.recompute=true", "parallel.ulysses=2", "data.num_frames=160"]
        settings += ["train.seq_length=32768", "train.global_batch_size=1"]
        message = out_of_memory_message(load_config("models/longvila-7b", settings), 2, 0, Exception("-"))
        return re.search(r"fullest rank: ([\d.]+) GiB .* workspace ([\d.]+)", message).groups()

    assert predicted(139.8) == ("47.8", "10.0")
    assert predicted(74.5) == ("39.7", "2.0")
