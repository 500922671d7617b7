"""The machine below Megatron-Core: what changes without CUDA, and that nothing else does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vila import accelerator, processes

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core is redirected only where CUDA is absent")


def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in names} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cpu_only
def test_megatron_core_works_on_cpu_tensors_and_other_code_still_finds_no_cuda():
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    inside = utils.torch
    assert inside.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert inside.empty(2, device=inside.cuda.current_device()).device.type == "cpu"
    assert inside.cuda.is_available() is False
    inside.cuda.current_stream().wait_stream(inside.cuda.Stream())
    inside.cuda.synchronize()
    assert inside.Tensor is torch.Tensor and inside.nn is torch.nn and inside.float32 is torch.float32
    assert inside.nn.functional is torch.nn.functional and clip_grads.torch is inside

    tensor = torch.ones(2, dtype=torch.float64)
    assert tensor.type() == "torch.DoubleTensor" and tensor.float().dtype == torch.float32
    with pytest.raises((AssertionError, RuntimeError)):
        tensor.cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


ALLOCATOR = """
import os
from megatron_vila import accelerator, processes
accelerator.prepare()
import torch
print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
if torch.cuda.is_available():
    torch.ones(1, device="cuda")
    print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


@pytest.mark.gpu
def test_the_allocator_of_gpus_extends_its_segments_unless_the_user_says_otherwise(monkeypatch):
    used = [["True"], ["False"]] if torch.cuda.is_available() else [[], []]
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert run_python(ALLOCATOR).split() == ["expandable_segments:True", *used[0]]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert run_python(ALLOCATOR).split() == ["None", *used[1]]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert run_python(ALLOCATOR).split() == ["max_split_size_mb:512", *used[1]]


@cpu_only
def test_preparing_again_changes_nothing():
    finders, method = list(sys.meta_path), torch.Tensor.type
    accelerator.prepare()
    assert sys.meta_path == finders and torch.Tensor.type is method


CHECK = """
import sys, types, torch, megatron.core
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.tensor_parallel import random
modules = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("megatron.core")]
functions = [value for names in modules for value in names.values() if isinstance(value, types.FunctionType)]
print(
    sum(names.get("torch") is torch for names in modules),
    sum(hasattr(function, "_torchdynamo_orig_callable") for function in functions),
    random._get_cuda_rng_state().dtype,
)
"""


@cpu_only
@pytest.mark.parametrize("prepare_first", [True, False])
def test_modules_imported_before_and_after_are_redirected_and_not_compiled(prepare_first):
    prepare = "from megatron_vila import accelerator; accelerator.prepare()\n"
    early = "import megatron.core.fusions.fused_bias_swiglu\n"
    output = run_python((prepare if prepare_first else early + prepare) + CHECK)
    assert output.strip().splitlines()[-1] == "0 0 torch.uint8"


@cpu_only
def test_megatrons_random_streams_are_reproducible_and_apart_on_a_cpu():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(3)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    drawn = {}
    for name in ("a", "b"):
        with tracker.fork(name):
            drawn[name] = torch.rand(4)
    outside = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(outside, torch.rand(4))
    torch.manual_seed(1)
    assert torch.equal(drawn["a"], torch.rand(4))
    assert not torch.equal(drawn["a"], drawn["b"])


@cpu_only
def test_importing_and_preparing_says_nothing_about_optional_packages_and_brings_no_compiler():
    code = "from megatron_vila import accelerator; accelerator.prepare()"
    code += "; import megatron.core.optimizer, megatron.core.models.gpt"
    code += "; import sys; compiles = 'torch._inductor.compile_fx'; theirs = compiles in sys.modules"
    code += "; import megatron_vila.training.trainer; print(compiles in sys.modules and not theirs)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    assert "Apex" not in done.stderr and "deprecated" not in done.stderr
    # A compiler takes seconds to import: it waits for the first function that is compiled. Megatron-Core 0.19 brings it itself.
    assert done.stdout.strip() == "False"


def test_precision_names_give_dtypes():
    assert accelerator.dtype_of("auto") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert [accelerator.dtype_of(name) for name in ("bf16", "fp32", "fp64")] == [
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]


def test_device_and_backend_belong_together():
    assert (accelerator.device().type, processes.backend()) in [("cpu", "gloo"), ("cuda", "nccl")]


JOIN = """
import sys
from megatron_vila import accelerator, processes
import torch.distributed as dist
processes.init_distributed(timeout_minutes=2)
processes.init_distributed()
import torch
t = torch.tensor(float(dist.get_rank() + 1), device=accelerator.device())
dist.all_reduce(t)
# One write, so that lines of two processes do not mix.
sys.stdout.write(f"{dist.get_world_size()} {dist.get_backend()} {t.item()}\\n")
processes.end_distributed()
"""


END = """
import gc
from pathlib import Path
from megatron_vila import accelerator, processes
import torch
import torch.distributed as dist
def threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
processes.init_distributed()
gc.disable()  # no collection but that at the end
class Cycle: pass
cycle = Cycle()
cycle.itself, cycle.group = cycle, dist.new_group(backend="gloo")
dist.all_reduce(torch.ones(4), group=cycle.group)
del cycle
print(threads() > 0)
processes.end_distributed()
print(threads())
"""


def test_the_threads_of_a_group_that_a_cycle_holds_end_with_it():
    assert run_python(END).split() == ["True", "0"]


def test_a_lone_process_needs_no_environment():
    assert run_python(JOIN).split() == ["1", processes.backend(), "1.0"]


@cpu_only
def test_processes_of_torchrun_find_each_other():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", JOIN], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(["2", "gloo", "3.0"] * 2)


def test_an_incomplete_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(
        RuntimeError, match="WORLD_SIZE=4 but RANK, MASTER_ADDR not set; start the processes with torchrun"
    ):
        processes.init_distributed()


MEMORY = """
import torch
from megatron_vila import accelerator, processes
def peak(megabytes):
    accelerator.reset_peak_memory()
    before = accelerator.peak_memory_bytes()
    held = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=accelerator.device())
    del held
    accelerator.synchronize()
    accelerator.collect_garbage()
    return (accelerator.peak_memory_bytes() - before) / 2**20
print(peak(256), peak(64))
"""


def test_peak_memory_is_that_since_the_last_reset():
    large, small = map(float, run_python(MEMORY).split())
    assert large > 240
    assert 48 < small < 128


def test_deterministic_mode_can_be_switched_on_and_off(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)
    accelerator.set_deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        accelerator.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_nothing_is_compiled_in_deterministic_mode(monkeypatch):
    """Code for one length and code for any length round differently."""
    monkeypatch.setattr(accelerator, "_COMPILED_DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: "compiled")
    called = accelerator.compiled_on_cuda(lambda x: "as it stands")
    found = [called(torch.ones(1))]
    accelerator.set_deterministic(True)
    try:
        found.append(called(torch.ones(1)))
    finally:
        accelerator.set_deterministic(False)
    assert found == ["compiled", "as it stands"]


def test_compiled_functions_have_few_versions():
    """One for the first length and one for all others. With more than eight, torch.compile gives up and runs a function as it
    stands, which no result would tell."""
    found = json.loads(run_python("import runpy; runpy.run_module('tests.compiled_versions', run_name='__main__')"))
    known = {"_turn_apart", "_turn_queries_back", "_turn_keys_back", "_add_norm", "_norm", "_scan", "_write_gradient_and_value"}
    assert known <= set(found)
    assert max(found.values()) <= 2, found


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_tower_takes_any_number_of_frames():
    """Its MLP is as wide as makes the compiler pad rows, as that of SigLIP-so400m is."""
    code = """
import torch
import torch._inductor.config as inductor
from megatron_vila.config.load import load_config
from megatron_vila.models.vision.tower import VisionTower
config = load_config("models/tiny", []).model.vision
config.num_layers, config.ffn_hidden_size, config.frame_micro_batch, config.recompute = 2, 1032, 4, True
inductor.disable_padding_cpu = False  # on a CPU the compiler does what it does for CUDA
tower = VisionTower(config, 0.02).bfloat16()
tower._compile_layers()
for frames in (5, 7, 6):
    tower(torch.randn(frames, 3, config.image_size, config.image_size)).float().sum().backward()
"""
    run_python(code)
