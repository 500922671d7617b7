"""The example of MM-SP under Transformers: it trains on two processes, and its benchmark measures what it says."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests import exit_threads

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/hf_mm_sp"
SEARCH = {"variants": None, "share": 1 / 8}


def sweep_module():
    spec = importlib.util.spec_from_file_location("hf_mm_sp_sweep", EXAMPLE / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_training(arguments: list[str], out: Path) -> list[dict]:
    """The first rank's metrics."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": f"{exit_threads.HOOK}:{ROOT}", "THREADS_AT_EXIT": str(out), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    done = subprocess.run(
        [*launch, str(EXAMPLE / "train.py"), *arguments, "--out", str(out)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens/s" in done.stdout
    assert not exit_threads.left_of_groups(out, processes=2)
    return [json.loads(line) for line in (out / "metrics-0.jsonl").read_text().splitlines()]


def test_the_script_trains_a_text_model_and_learns(tmp_path):
    config = str(EXAMPLE / "configs/tiny-qwen3.json")
    metrics = run_training(["--config", config, "--ulysses", "2", "--length", "64", "--steps", "20"], tmp_path)
    assert [record["tokens"] for record in metrics] == [128] * 20
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2  # of other windows: less says nothing


def test_the_script_trains_a_video_model_on_real_videos(tmp_path):
    config = str(EXAMPLE / "configs/tiny-llava-onevision.json")
    arguments = ["--config", config, "--ring", "2", "--frames", "3", "--accumulate", "2", "--steps", "2", "--recompute"]
    metrics = run_training(arguments, tmp_path)
    assert len(metrics) == 2
    # Two micro-batches of two videos of 3 frames with 4 tokens each and a newline, and their questions.
    assert all(record["tokens"] > 2 * 2 * 13 for record in metrics)


def test_the_benchmark_writes_a_row_for_a_run_and_for_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sweep = sweep_module()
    config = EXAMPLE / "configs/tiny-llama.json"
    options = Namespace(model=None, config=config, data=[ROOT / "README.md"], kernel="auto", processes=2)
    rows = [
        sweep.measure(options, "ulysses=2", sweep.variants(2)["ulysses=2"], 32, sweep.SPEED),
        sweep.measure(options, "ulysses=3", ["--ulysses", "3"], 32, sweep.FIT),
    ]
    sweep.write_table(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        good, bad = csv.DictReader(file)
    assert good["note"] == ""
    assert float(good["tokens_per_s_per_gpu"]) == pytest.approx(32 / float(good["time_s"]), rel=0.05)
    assert "ulysses=3 does not divide" in bad["note"]
    # Where two processes share a sequence they take two of them, except in the search.
    assert "--accumulate 2" in good["command"] and "--accumulate 1" in bad["command"]
    assert bad["tokens_per_s_per_gpu"] == ""


def launched(tmp_path: Path, *arguments: str) -> list[list[str]]:
    """What the shell script starts, each a list of torchrun's arguments; torchrun is a program that writes them down."""
    stand_ins = {
        "torchrun": f'{{ printf "%s\\n" "$@"; echo; }} >> {tmp_path}/calls',
        "python3": f'exec {sys.executable} "$@"',
        "nvidia-smi": "exit 9",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", str(EXAMPLE / "run.sh"), *arguments], check=True, env=environment, timeout=120)
    return [call.split("\n") for call in (tmp_path / "calls").read_text().strip().split("\n\n")]


def test_the_shell_script_starts_both_examples_with_files_that_exist(tmp_path):
    calls = launched(tmp_path)
    assert [call[call.index("--config") + 1].rsplit("/", 1)[1] for call in calls] == [
        "tiny-qwen2.json",
        "tiny-llava-onevision.json",
    ]
    for call in calls:
        assert call[:3] == ["--standalone", "--nproc-per-node", "2"]
        assert (ROOT / call[3]).is_file() and (ROOT / call[call.index("--config") + 1]).is_file()


def test_the_shell_script_hands_arguments_on(tmp_path):
    assert launched(tmp_path, "--model", "FOLDER", "--ring", "2")[0][3:] == [
        "examples/hf_mm_sp/train.py", "--model", "FOLDER", "--ring", "2",
    ]  # fmt: skip


def test_every_length_is_measured_once_and_the_longest_is_found_to_an_eighth(tmp_path, monkeypatch):
    sweep, tried = sweep_module(), []

    def measure(options, variant, settings, length, steps):
        tried.append((variant, length))
        reached = {"stock": 0, "data parallel": 900}.get(variant, 70000)
        return {
            "model": "m",
            "note": "" if length <= reached else "out of memory",
            "tokens_per_s_per_gpu": 1,
            "peak_gib": 1,
        }

    monkeypatch.setattr(sweep, "measure", measure)
    sweep.sweep(Namespace(processes=2, benchmark=tmp_path / "table.csv", lengths=[512, 1024], longest=2**20, **SEARCH))
    assert len(tried) == len(set(tried)) == len((tmp_path / "table.csv").read_text().splitlines()) - 1
    by_variant = {name: [length for variant, length in tried if variant == name] for name, _ in tried}
    assert by_variant["stock"] == [512]
    for name, reached in (("data parallel", 900), ("ulysses=2", 70000), ("ring=2", 70000)):
        found = max(length for length in by_variant[name] if length <= reached)
        assert found <= reached <= found * 9 / 8 + 1


@pytest.mark.parametrize(
    "output, found",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of memory"),
        ("Traceback\nValueError: ulysses=3 ...\nbye", "failed: ValueError: ulysses=3 ..."),
        ("", "failed: no output"),
    ],
)
def test_a_failed_run_is_named(output, found):
    assert sweep_module().reason(output) == found


def test_the_benchmark_measures_the_variants_that_are_named(tmp_path, monkeypatch):
    sweep, tried = sweep_module(), []

    def measure(options, variant, settings, length, steps):
        tried.append((variant, length, steps))
        return {
            "model": "m",
            "note": "" if length <= 3000 else "out of memory",
            "tokens_per_s_per_gpu": 1,
            "peak_gib": 1,
        }

    monkeypatch.setattr(sweep, "measure", measure)
    options = SEARCH | {"variants": ["ulysses=2"], "share": 1 / 2}
    sweep.sweep(Namespace(processes=2, benchmark=tmp_path / "table.csv", lengths=[1024], longest=2**20, **options))
    assert tried == [("ulysses=2", 1024, sweep.SPEED), *(("ulysses=2", n, sweep.FIT) for n in (1536, 3584, 2560))]
