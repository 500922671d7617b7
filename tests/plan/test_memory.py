"""The estimate of a rank's memory, and what validation says when the device or the host has less."""

import dataclasses

import pytest

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.errors import ConfigError
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.hardware import UNNAMED
from megatron_vila.plan.memory import (
    estimate_memory,
    memory_cure,
    state_on_host,
)
from megatron_vila.start_checks import check_start


def test_memory_that_cannot_fit_is_a_warning_with_a_cure(data_folder):
    overrides = [*data_folder, "train.seq_length=200000000", "model.llm.max_positions=200000000"]
    warnings = check_start(load_config("tiny", overrides), 1, accelerator.machine())
    (warning,) = [w for w in warnings if "GiB" in w]
    assert warning.startswith("a rank needs about ")
    assert "set memory.recompute=attention_output" in warning


def test_chunks_of_the_exchange_take_less_memory_in_the_backward_pass():
    def workspace(chunks):
        settings = ["parallel.ulysses=2", f"parallel.ulysses_chunks={chunks}", "train.seq_length=524288"]
        settings += ["memory.recompute=attention_output", "memory.mlp_tile=8192"]
        return estimate_memory(load_config("models/llama3-8b", settings), 2, UNNAMED.gpu_bytes).workspace

    assert workspace(4) < workspace(2) < workspace(1)


def test_gpus_that_write_heads_to_each_other_need_a_buffer_of_at_most_a_gib():
    def slack(*overrides):
        settings = ["train.seq_length=65536", *overrides]
        return estimate_memory(load_config("models/llama3-8b", settings), 2, UNNAMED.gpu_bytes).slack / GIB

    alone = slack("parallel.ring=2")
    # 32K tokens of a GPU, q, k and v 6,144 wide in 16 bits: 384 MiB; the output with its gradient is 512 MiB.
    assert slack("parallel.ulysses=2") == alone + 0.5
    assert slack("parallel.ulysses=2", "train.seq_length=131072", "memory.recompute=attention_output") == alone + 1
    assert slack("parallel.ulysses=2", "train.seq_length=1048576") == alone + 1
    assert slack("parallel.ulysses=2", "parallel.ulysses_chunks=2") == alone


def test_a_small_model_fits(data_folder):
    assert check_start(load_config("tiny", data_folder), 1, accelerator.machine()) == []


def test_weights_and_gradients_of_a_7b_model_are_what_is_known():
    """7.6 G parameters: bf16 weights, float32 gradients, 12 bytes of optimizer state shared by the whole world."""
    config = load_config("models/qwen2-7b", ["optim.vision.trainable=false", "optim.projector.trainable=false"])
    estimate = estimate_memory(config, 8, UNNAMED.gpu_bytes)
    llm, frozen = 7_612_634_624, 428_225_600 + 29_376_512
    assert estimate.weights == pytest.approx(2 * (llm + frozen), rel=1e-3)
    assert estimate.gradients == pytest.approx(4 * llm, rel=1e-3)
    assert estimate.optimizer == pytest.approx(12 * llm / 8, rel=1e-3)


def test_with_lora_only_what_learns_has_gradients_and_optimizer_state():
    """Rank 8 on q, k, v and o of Qwen2-7B: 28 layers of 8 * (3584 + 4608 + 3584 + 3584) parameters, 2 bytes a weight."""
    frozen = ["optim.vision.trainable=false", "optim.projector.trainable=false"]
    whole = estimate_memory(load_config("models/qwen2-7b", frozen), 8, UNNAMED.gpu_bytes)

    def estimate(*overrides):
        return estimate_memory(
            load_config("models/qwen2-7b", [*frozen, "model.lora.rank=8", *overrides]), 8, UNNAMED.gpu_bytes
        )

    updates = 28 * 8 * (3584 + 4608 + 3584 + 3584)
    assert estimate().gradients == 4 * updates
    assert estimate().optimizer == 12 * updates // 8
    assert estimate().weights == whole.weights + 2 * updates
    # Of qkv A is whole, of proj B: half of the parameters but for the wider qkv.
    assert estimate("parallel.tp=4").gradients == 4 * 28 * 8 * (3584 + 4608 // 4 + 3584 // 4 + 3584)
    beside = estimate("model.lora.also_train=[embeddings,norms]")
    assert beside.gradients == 4 * (updates + 151_648 * 3584 + (2 * 28 + 1) * 3584)
    assert estimate().llm_activations < whole.llm_activations


def test_optimizer_state_is_shared_by_data_and_context_parallel_ranks():
    def optimizer(*overrides):
        return estimate_memory(load_config("models/qwen2-7b", list(overrides)), 8, UNNAMED.gpu_bytes).optimizer

    assert optimizer("parallel.ring=2", "parallel.ulysses=4") == optimizer()


def test_offloaded_optimizer_state_leaves_the_device_for_the_host():
    def both(fraction):
        config = load_config("models/qwen2-7b", [f"optim.offload_fraction={fraction}"])
        return estimate_memory(config, 8, UNNAMED.gpu_bytes).optimizer, state_on_host(config, 8, on_gpu=True)

    (whole, nothing), (half, half_on_host), (none, on_host) = both(0), both(0.5), both(1)
    assert nothing == none == 0
    assert half == pytest.approx(whole / 2) and half_on_host == pytest.approx(on_host / 2)
    assert on_host == pytest.approx(whole)


def test_activations_shrink_with_tp_and_cp_and_with_recompute():
    def activations(*overrides):
        settings = ["train.seq_length=1048576", *overrides]
        return estimate_memory(load_config("models/qwen2-7b", settings), 16, UNNAMED.gpu_bytes).llm_activations

    whole = activations()
    for split in ("parallel.tp=4", "parallel.ring=4"):
        assert activations(split) == pytest.approx(whole / 4, rel=0.05)
    # The exchange makes a copy of attention's output: 2 bytes of 28 x 3584 values for each token of a rank.
    assert activations("parallel.ulysses=4") == whole / 4 + 2 * 28 * 3584 * 1048576 // 4
    assert activations("memory.recompute=full") < whole / 5
    kept = activations("memory.recompute=attention_output")
    assert activations("memory.recompute=full") < kept < whole / 4
    assert activations("memory.recompute=attention_output", "memory.block_layers=4") < kept
    # Tensors go there whole; the largest here is a layer's input or attention's output.
    rest, largest = activations("memory.recompute=attention_output", "memory.offload_gib=20"), 1048576 * 3584 * 2
    assert kept - 20 * GIB <= rest < kept - 20 * GIB + largest


def test_tower_activations_shrink_with_its_recompute_and_vanish_when_frozen():
    def activations(*overrides):
        settings = ["train.seq_length=262144", "data.num_frames=512", *overrides]
        return estimate_memory(load_config("models/qwen2-7b", settings), 1, UNNAMED.gpu_bytes).vision_activations

    pixels = 512 * 3 * 384**2 * 4
    assert activations("model.vision.recompute=true") == activations("optim.vision.trainable=false") == 0
    assert activations() > 100 * pixels


def test_frames_of_the_next_micro_batch_take_memory_where_they_are_encoded_ahead():
    def workspace(rows, *overrides):
        settings = ["train.seq_length=32768", "data.num_frames=128", f"train.global_batch_size={rows}", *overrides]
        return estimate_memory(load_config("models/longvila-7b", settings), 1, UNNAMED.gpu_bytes).workspace

    tokens, in_work = 128 * 196 * 3584 * 2, 729 * 7 * 1152 * 2
    for tower, at_once in ("optim.vision.trainable=false", 64), ("model.vision.recompute=true", 8):
        chosen = (tower, f"model.vision.frame_micro_batch={at_once}")
        assert workspace(2, *chosen) - workspace(1, *chosen) == tokens + at_once * in_work
        assert workspace(3, *chosen) == workspace(2, *chosen)
    # The backward pass of the tower, at the peak here, has the next tokens beside it.
    chosen = "model.vision.recompute=true", "model.vision.frame_micro_batch=128", "memory.recompute=attention_output"
    assert workspace(2, *chosen) - workspace(1, *chosen) == tokens
    assert workspace(2) == workspace(1)


def test_the_estimate_reads_as_a_sum():
    estimate = estimate_memory(load_config("models/qwen2-7b", []), 8, UNNAMED.gpu_bytes)
    assert str(estimate).startswith(f"{estimate.total / GIB:.1f} GiB (weights ")


def test_published_long_runs_fit_80_gib():
    for name, world in (("longvila-7b-stage5", 256), ("longvila-7b-stage4", 64), ("llama3-longvila-8b-stage5", 64)):
        assert estimate_memory(load_config(name, []), world, UNNAMED.gpu_bytes).total < 80 * GIB


def test_more_host_memory_than_there_is_is_refused_with_the_largest_value(data_folder):
    settings = [*data_folder, "memory.recompute=attention_output", "memory.offload_gib=50000"]
    with pytest.raises(
        ConfigError, match=r"50000 on 1 ranks of a node asks for 50000.0 GiB of host memory, and .* lower it to"
    ):
        check_start(load_config("tiny", settings), 1, accelerator.machine())


def test_optimizer_state_counts_towards_host_memory(data_folder, monkeypatch):
    monkeypatch.setattr("megatron_vila.host_memory.free_bytes", lambda: 100 * GIB)
    settings = [*data_folder, "train.global_batch_size=4", "memory.recompute=attention_output", "memory.offload_gib=20"]
    warnings = check_start(load_config("models/qwen2-7b", settings), 4, accelerator.machine())
    assert not [warning for warning in warnings if "host" in warning]
    settings.append("optim.offload_fraction=0.5")
    with pytest.raises(
        ConfigError,
        match=r"memory.offload_gib=20 and optim.offload_fraction=0.5 \(7.5 GiB a rank\) on 4 ranks of a node asks for 110.1 "
        r"GiB of host memory, and 100.0 GiB are there; lower both to 25.0 GiB a rank or less",
    ):
        check_start(load_config("models/qwen2-7b", settings), 4, accelerator.machine())


@pytest.mark.parametrize(
    ("part", "overrides", "cure"),
    [
        ("weights", [], "raise parallel.tp or parallel.pp"),
        ("optimizer", [], "raise optim.offload_fraction"),
        ("llm_activations", [], "set memory.recompute=attention_output"),
        ("llm_activations", ["memory.recompute=attention_output"], "raise memory.offload_gib or memory.block_layers"),
        ("vision_activations", ["model.vision.recompute=false"], "set model.vision.recompute=true"),
        ("workspace", [], "set memory.mlp_tile=8192, or encode fewer frames at once (model.vision.frame_micro_batch)"),
        ("workspace", ["memory.mlp_tile=8192"], "lower memory.mlp_tile, or shorten train.seq_length, or encode fewer frames"),
        ("workspace", ["optim.vision.trainable=false"], "set memory.mlp_tile=8192"),
    ],
)
def test_the_largest_part_names_the_setting_that_shrinks_it(part, overrides, cure):
    config = load_config("models/longvila-7b", overrides)
    estimate = estimate_memory(config, 8, UNNAMED.gpu_bytes)
    said = memory_cure(config, dataclasses.replace(estimate, **{part: 1000 * GIB}))
    assert said.startswith(cure)
    assert ("frame_micro_batch" in said) == (part == "workspace" and config.optim.vision.trainable)
