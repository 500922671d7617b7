"""The machine that is planned for: presets, what ``--gpu`` may say, and that it is judged in place of the one at hand."""

import pytest

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.errors import ConfigError
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.hardware import PRESETS, UNNAMED, Machine, machine_of, peak_flops
from megatron_vila.plan.memory import describe_memory, estimate_memory
from megatron_vila.plan.validate import validate
from megatron_vila.start_checks import check_start, planned_machine


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA GeForce RTX 2080") is None


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        # GiB, TFLOP/s, GB of the host, GPUs of a node and of an NVLink domain, GB/s of NVLink and of the network
        ("a100", (79.1, 312, 2000, 8, 8, 300, 25)),
        ("h100", (79.1, 989.4, 2000, 8, 8, 450, 50)),
        ("h200", (139.8, 989.4, 2000, 8, 8, 450, 50)),
        ("b200", (178.3, 2250, 2000, 8, 8, 900, 50)),
        ("gb200", (184.3, 2500, 960, 4, 72, 900, 50)),
    ],
)
def test_a_preset_has_the_published_figures(name, figures):
    m = PRESETS[name]
    units = (m.gpu_bytes / GIB, m.peak_flops / 1e12, m.host_bytes / 1e9, m.gpus_per_node, m.nvlink_gpus, m.nvlink / 1e9)
    assert (*units, m.network / 1e9) == pytest.approx(figures)
    assert m.of_a_rank(8) == f"a{'n' if name[0] in 'ah' else ''} {name.upper()}" and not m.is_here


def test_the_machine_at_hand_shares_its_memory_among_the_processes_of_a_cpu():
    here = accelerator.machine()
    assert here.is_here and here.gpu_bytes == 0 and here.peak_flops is None and here.host_bytes > GIB
    assert here.rank_bytes(4) == here.host_bytes // 4
    assert here.of_a_rank(4) == "each of 4 processes on this machine"


@pytest.mark.parametrize(
    ("gpu", "gib"), [("h200", 139.8), ("H100", 79.1), ("80GB", 80e9 / GIB), ("79.2GiB", 79.2), ("24 gb", 24e9 / GIB)]
)
def test_the_planned_gpu_is_a_known_name_or_an_amount_of_memory(gpu, gib):
    machine = planned_machine(gpu)
    assert machine.gpu_bytes / GIB == pytest.approx(gib, abs=0.01) and machine.rank_bytes(8) == machine.gpu_bytes
    assert not machine.is_here


def test_without_a_gpu_here_one_of_80_gb_is_planned_for():
    assert planned_machine(None) == UNNAMED
    assert "on a GPU of 80 GB with 74.5 GiB (planned for; --gpu names another)" in describe_memory(
        load_config("tiny"), 1, UNNAMED
    )


@pytest.mark.parametrize("gpu", ["h900", "", "80", "-1GB", "0GB", "nanGiB", "1e3GB", "9999999GB"])
def test_a_gpu_that_is_not_known_is_refused_with_those_that_are(gpu):
    with pytest.raises(ConfigError, match=r"--gpu .* use a100, b200, gb200, h100, h200, or the memory of one, e.g. 80GB"):
        machine_of(gpu)


def test_the_planned_gpu_is_judged_and_not_this_machine():
    """128 GB are asked for: too much for an H100, not for a B200, whatever this machine has."""
    config = load_config("models/qwen2-7b", ["parallel.tp=2", "train.seq_length=8192", "train.global_batch_size=1"])

    def warned(gpu):
        return [w for w in validate(config, 2, machine_of(gpu)) if "GiB" in w]

    (warning,) = warned("h100")
    needed = estimate_memory(config, 2, PRESETS["h100"].gpu_bytes)
    assert f"a rank needs about {needed}, but an H100 has 79.1 GiB" in warning
    assert warned("b200") == []


def test_memory_of_a_rank_on_a_cpu_is_judged_by_its_share_of_the_host():
    config = load_config("tiny")
    needed = estimate_memory(config, 2, 0).total
    enough, short = (Machine("a small machine", 0, host_bytes=2 * needed - less) for less in (0, 2))
    assert validate(config, 2, enough) == []
    (warning,) = validate(config, 2, short)
    assert "but each of 2 processes on a small machine has " in warning


def test_host_memory_of_another_machine_is_told_and_not_judged(data_folder):
    settings = [*data_folder, "memory.recompute=attention_output", "memory.offload_gib=50000"]
    config = load_config("tiny", settings)
    assert check_start(config, 1, PRESETS["h100"]) == []
    assert "Offloading takes 50000.0 GiB of the host memory of a node." in describe_memory(config, 1, PRESETS["h100"])
