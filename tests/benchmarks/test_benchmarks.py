"""Benchmarks measure the real thing: each kind runs on CPU ranks, comparisons compute what ours computes, tables are whole."""

import csv
import gc
import importlib
import math
import os
import re
import shlex
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from benchmarks import attention, head, layer, reshard, vision
from benchmarks.max_length import longest
from benchmarks.plain_ring import plain_ring_attention
from benchmarks.predicted import decoder_alone, head_alone, tower_alone
from benchmarks.table import ALWAYS, RATES
from benchmarks.worker import launch, measured_rows, one_by_one, parse_variant
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.models.language import transformer_config
from megatron_vila.models.vision import tower as encoder
from megatron_vila.parallel.kernels import Segments, select_kernel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.memory import estimate_memory
from tests.ranks import pool

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = {"warmup": 1, "timed": 2, "command": "the command"}
TINY = {"config": "tiny", "overrides": ["model.llm.num_layers=2"]}
KINDS = {
    "attention": {
        "documents": [24, 8], "heads": 4, "kv_heads": 2, "head_dim": 8,
        "variants": ["ulysses=2", "ulysses=2,exchange=collective", "ring=2,kernel=cpu"],
    },
    "layer": TINY | {"layers": 2, "lengths": [32, 64], "variants": ["tp=2", "ring=2,recompute=attention_output,mlp_tile=8"]},
    "head": {"tokens": 32, "hidden": 16, "vocab": 64, "variants": ["", "main_grad=0", "method=eager", "tp=2"]},
    "reshard": {
        "frames": 5, "tokens_per_frame": 3, "hidden": 8, "variants": ["ring=2", "tp=2", "tp=2,method=full_gather"]
    },
    "vision": TINY | {"frames": 3, "variants": ["frame_micro_batch=2", "trainable=0", "recompute=1"]},
    "trial": TINY | {
        "overrides": ["parallel.ulysses=2"], "lengths": [96], "video": True, "supervised": 8, "short_warmup": False,
        "partial": 0, "without_attention": False,
        "variants": ["memory.recompute=attention_output", "optim.grad_reduce_fp32=false,parallel.ulysses=1"],
    },
}  # fmt: skip
PREDICTED = ("attention", "layer", "step", "max_length", "vision", "head", "reshard")
GPU_GIB = {"H100": 79, "H200": 139}
NEEDED = {"model", "gpus", "tp", "ulysses", "ring", "time_s", "peak_gib", "hardware", "versions", "command"}


def rows_of(rank, kind, settings):
    return list(measured_rows(kind, settings))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_a_row_for_each_variant(kind):
    asked = KINDS[kind]
    rows, _ = pool.run(2, rows_of, kind, asked | QUICK)
    variants = asked.get("variants", [None])
    wanted = {"attention": [v for v in variants for _ in range(3)], "layer": variants * 2}.get(kind, variants)
    assert [row.get("variant") for row in rows] == wanted
    for row in rows:
        assert set(row) >= NEEDED
        assert row["time_s"] > 0 and row["peak_gib"] > 0 and row["gpus"] == 2
        assert row.get("attention") != "auto"
        assert any(row.get(rate) for rate in RATES), "the plot would show lengths"


class Slowly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.3)
        return grad


def slow_frames(rank, overrides):
    usual = encoder.encode_frames
    encoder.encode_frames = lambda *args: Slowly.apply(usual(*args))
    try:
        return [row["vision_s"] for row in rows_of(rank, "trial", KINDS["trial"] | QUICK | overrides)]
    finally:
        encoder.encode_frames = usual


def test_a_step_tells_what_frames_cost_forward_and_backward():
    overrides = {"overrides": [], "variants": ["", "optim.vision.trainable=false,optim.projector.trainable=false"]}
    ((trained, frozen),) = pool.run(1, slow_frames, overrides)
    assert trained >= 0.6 and frozen >= 0.3
    (text,) = pool.run(1, slow_frames, overrides | {"video": False, "variants": [""]})
    assert text == [""]


def both_ways(rank):
    """Values and gradients of the plain ring on this rank's piece of the sequence, and of one kernel over the whole."""
    topology = ParallelTopology.create(ParallelConfig(ring=4))
    torch.manual_seed(5)
    q, k, v, dout = (torch.randn(32, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    mine = slice(8 * rank, 8 * rank + 8)
    kernel = select_kernel("reference", 8, torch.float64, CPU)
    parts = [x[mine].clone().requires_grad_() for x in (q, k, v)]
    out = plain_ring_attention(*parts, kernel, 0.3, topology.ring)
    found = [out, *torch.autograd.grad(out, parts, dout[mine])]
    whole = Segments((32,), (32,))
    full, lse = kernel.forward(q, k, v, whole, True, 0.3)
    wanted = [full, *kernel.backward(dout, q, k, v, full, lse, whole, True, 0.3)]
    topology.destroy()
    return max(float((x - y[mine]).abs().max()) for x, y in zip(found, wanted, strict=True))


def test_the_plain_ring_that_we_compare_with_computes_causal_attention():
    assert max(pool.run(4, both_ways)) < 1e-12


def difference_of_layers(rank, ulysses, ring):
    """Megatron-Core's own layers with our attention inside against ours, with the same weights: output and gradients."""
    settings = {"config": "tiny", "overrides": [], "layers": 2}
    variant = parse_variant(f"ulysses={ulysses},ring={ring}", layer.VARIANT)
    config = layer.config_of(settings, variant, 64)
    topology = ParallelTopology.create(config.parallel)
    model_parallel_cuda_manual_seed(1)
    _, ours, run_ours = layer.our_layers(config, variant, topology)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.put_attention_inside(spec, config, topology)
    stock = transformer_config(config.model, topology, torch.float32)
    theirs, run_theirs = layer.megatron_layers(spec, stock, config, topology)
    # The last norm is not the decoder layers'.
    theirs.load_state_dict({name: x for name, x in ours.state_dict().items() if "final" not in name})
    ours.final_layernorm = None
    torch.manual_seed(3)
    hidden = torch.randn(64 // (ulysses * ring), 1, config.model.llm.hidden_size)
    found = []
    for layers, run in ((ours, run_ours), (theirs, run_theirs)):
        x = hidden.clone().requires_grad_()
        out = run(x)
        out.backward(hidden)
        found.append({"out": out.detach(), "x": x.grad} | {name: weight.grad for name, weight in layers.named_parameters()})
    topology.destroy()
    assert found[0].keys() == found[1].keys()
    return max(float((found[0][name] - x).norm() / x.norm()) for name, x in found[1].items())


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
def test_megatron_layers_that_we_compare_with_compute_the_same_with_our_attention_inside(ulysses, ring):
    assert max(pool.run(ulysses * ring, difference_of_layers, ulysses, ring)) < 1e-5


def same_tokens(rank, tp, ring):
    """The gather of all tokens gives each rank what the all-to-all gives it, and the same gradients."""
    topology = ParallelTopology.create(ParallelConfig(tp=tp, ring=ring))
    _, moves, made, gradient = reshard.prepare(topology, frames=7, each=4, hidden=3)
    moved = {method: move(made) for method, move in moves.items()}
    found = [(x, *torch.autograd.grad(x, made, gradient)) for x in moved.values()]
    topology.destroy()
    return max(float((x - y).abs().max()) if x.numel() else 0.0 for x, y in zip(*found, strict=True))


@pytest.mark.parametrize(("tp", "ring"), [(2, 1), (1, 4), (2, 2)])
def test_the_full_gather_that_we_compare_with_moves_the_same_tokens(tp, ring):
    assert pool.run(tp * ring, same_tokens, tp, ring) == [0.0] * (tp * ring)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 400), st.integers(1, 9), st.integers(9, 300))
def test_the_search_finds_the_longest_length_that_fits(limit, start, unit, most):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= limit

    assert longest(fits, start, unit, most) == min(limit, most) // unit * unit
    assert len(set(tried)) == len(tried)
    assert all(length % unit == 0 and length <= most for length in tried)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(-300, 300))
def test_a_search_that_starts_near_the_result_takes_few_trials(start, away):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= start + away

    assert longest(fits, start, 1, 10**6) == max(start + away, 0)
    assert len(tried) <= 2 * math.log2(abs(away) + 1) + 3


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 64), st.sampled_from([1 / 8, 1 / 3]))
def test_the_search_may_end_once_what_is_open_is_a_share_of_the_result(limit, start, share):
    tried = []

    def fits(length):
        tried.append(length)
        return length <= limit

    found = longest(fits, start, 1, 2000, share)
    assert found <= min(limit, 2000) <= found * (1 + share) + 1
    assert len(set(tried)) == len(tried)


def test_a_job_that_fails_in_its_second_variant_keeps_the_first_row_and_says_why(capfd):
    seen = []
    asked = KINDS["reshard"] | QUICK | {"variants": ["ring=2", "tp=2,method=none"]}
    rows = launch("reshard", 2, asked, on_row=seen.append)
    assert [row["variant"] for row in rows] == ["ring=2"] and seen == rows
    said = capfd.readouterr().out
    assert "finished rows are kept (1): " in said and "method=none is unknown" in said


@pytest.mark.parametrize(("kind", "setting"), [("attention", "method"), ("attention", "exchange"), ("layer", "swiglu")])
def test_unknown_values_of_a_variant_are_refused(kind, setting):
    rows = importlib.import_module(f"benchmarks.{kind}").rows
    with pytest.raises(ValueError, match=f"variant {setting}=x: {setting}=x is unknown; use "):
        list(rows(KINDS[kind] | QUICK | {"length": 32}, f"{setting}=x"))


def test_no_variant_is_measured_beside_what_the_one_before_left_behind():
    class Model: ...

    left: list[weakref.ref] = []

    def rows():
        for _ in range(3):
            assert [model() for model in left] == [None] * len(left)
            model = Model()
            model.itself = model
            left.append(weakref.ref(model))
            del model
            yield {}

    gc.disable()
    try:
        assert len(list(one_by_one(rows()))) == 3
    finally:
        gc.enable()


def test_a_job_that_takes_too_long_is_ended():
    with pytest.raises(RuntimeError, match="stopped after 2 s"):
        launch("trial", 1, KINDS["trial"] | QUICK | {"lengths": [10**6]}, timeout_s=2)


def published(name):
    return list(csv.DictReader((ROOT / "docs/benchmarks" / f"{name}.csv").open()))


@pytest.mark.parametrize("name", ["attention", "head", "layer", "max_length", "reshard", "step", "vision"])
def test_published_tables_have_every_column_and_name_hardware_versions_and_command(name):
    for row in published(name):
        assert set(row) >= set(ALWAYS)
        assert "NVIDIA" in row["hardware"] and "torch 2" in row["versions"]
        assert re.match(r"((CUDA|PYTORCH)_\w+=\S+ )*(python tools/benchmark.py|torchrun) ", row["command"])


def predicted_bytes(row):
    """Of a row of a table, from its command."""
    words = shlex.split(row["command"])
    (device_bytes,) = (size * GIB for name, size in GPU_GIB.items() if name in row["hardware"])
    if "torchrun" in words:
        named, *overrides = words[words.index("megatron_vila.train") + 1 :]
        return estimate_memory(load_config(str(ROOT / named), overrides), int(row["gpus"]), device_bytes).allocated
    words = words[words.index("python") :]  # after variables of the environment
    kind, named = words[2], words[3]
    overrides = [word for word in words[4:] if "=" in word and "." in word.partition("=")[0]]
    chosen = {"config": named, "overrides": overrides, "layers": 4}
    if kind == "attention":
        documents = [int(tokens) for tokens in words[words.index("--documents") + 1].split(",")]
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), map(int, re.findall(r"\d+", row["model"])), strict=False))
        variant = parse_variant(row["variant"], attention.VARIANT)
        return attention.predicted_bytes(sizes | {"documents": documents}, variant, row["attention"], 2)[row["part"]]
    if kind == "reshard":
        sizes = dict(zip(("frames", "tokens_per_frame", "hidden"), map(int, re.findall(r"\d+", row["model"])), strict=True))
        return reshard.predicted_bytes(sizes, parse_variant(row["variant"], reshard.VARIANT), int(row["seq_len"]), 2)
    if kind == "head":
        variant, sizes = parse_variant(row["variant"], head.VARIANT), map(int, re.findall(r"\d+", row["model"]))
        return head_alone(*sizes, 2, 4 if variant["main_grad"] else 2)
    if kind == "layer":
        return decoder_alone(layer.config_of(chosen, parse_variant(row["variant"], layer.VARIANT), int(row["seq_len"])), 2)
    if kind == "vision":
        variant = parse_variant(row["variant"], vision.VARIANT)
        return tower_alone(vision.config_of(chosen, variant), int(row["frames"]), 2, device_bytes)
    config = load_config(named, [*overrides, f"train.seq_length={row['seq_len']}", "train.global_batch_size=1"])
    return estimate_memory(config, int(row["gpus"]), device_bytes).allocated


def test_the_memory_model_of_today_is_within_5_percent_of_every_published_peak_that_has_a_prediction():
    """The prediction is made anew from the row's command, and is the one that the table shows."""
    compared = 0
    for row in (row for name in PREDICTED for row in published(name)):
        if row["predicted_gib"]:
            predicted = predicted_bytes(row) / GIB
            assert predicted == pytest.approx(float(row["predicted_gib"]), abs=2e-3)
            assert predicted == pytest.approx(float(row["peak_gib"]), rel=0.05)
            compared += 1
    assert compared >= 83


def test_variants_are_parsed_by_the_types_of_the_defaults_and_unknown_names_are_refused():
    known = {"ring": 1, "kernel": "auto"}
    assert parse_variant("ring=4", known) == {"ring": 4, "kernel": "auto"}
    assert parse_variant("", known) == known
    with pytest.raises(ValueError, match="rong is unknown; use ring, kernel"):
        parse_variant("rong=4", known)
    with pytest.raises(ValueError, match="ring=four should be of type int"):
        parse_variant("ring=four", known)


def test_the_command_finds_the_longest_row_and_leaves_a_table_and_a_plot(tmp_path):
    out = tmp_path / "max_length.csv"
    arguments = ["max-length", "tiny", "memory.recompute=attention_output", "--gpus", "1", "--start", "64", "--unit", "64"]
    arguments += ["--most", "64", "--supervised", "8", "--video", "--partial", "1", "--without-attention", "--out", str(out)]
    # Tool and ranks take the package from the checkout, wherever they are started and whatever is installed.
    (tmp_path / "installed/megatron_vila").mkdir(parents=True)
    (tmp_path / "installed/megatron_vila/__init__.py").write_text("raise ImportError('not this checkout')\n")
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/benchmark.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(out.open())
    command = "python tools/benchmark.py max-length tiny memory.recompute=attention_output --gpus 1 "
    assert re.match(r"CUDA_DEVICE_MAX_CONNECTIONS=1 (PYTORCH_\S+ )?" + re.escape(command), row["command"])
    assert row["seq_len"] == "64" and row["frames"] == "15" and float(row["predicted_gib"]) > 0
    assert row["note"].startswith("forward pass, head and backward pass of the last 1 layers; without attention")
    assert not row["tflops_per_gpu"] and not row["mfu"]
    assert (tmp_path / "max_length.png").stat().st_size > 1000
