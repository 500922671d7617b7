"""A run that was stopped, killed or moved to another layout goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import time

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.training.summary import read_metrics
from tests import exit_threads
from tests.ranks import pool
from tests.training.real_run import Layout, children, numbers, overrides, started, train, weights

STEPS, STOP = 4, 2
FLOAT32 = ("train.precision=fp32", "data.packing=true", f"train.steps={STEPS}", f"checkpoint.save_every={STOP}")


def _crashed_copy(run, to):
    """The folder of a run that crashed after its last step, before it could save again."""
    shutil.copytree(run, to)
    (last,) = (to / "checkpoints").glob(f"step-{STEPS:08d}")
    shutil.rmtree(last)
    (to / "checkpoints/latest").write_text(f"step-{STOP:08d}\n")
    return to


def _same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []


@pytest.fixture(scope="module")
def unbroken(videos, tmp_path_factory):
    """A float32 run with packed rows in one process that was never stopped: its folder and its final weights."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    settings = overrides(videos, output, *FLOAT32)
    pool.run(1, train, settings)
    return output, pool.run(1, weights, settings, output)[0]


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(videos, tmp_path, unbroken):
    output = _crashed_copy(unbroken[0], tmp_path / "run")
    settings = overrides(videos, output, *FLOAT32)
    pool.run(1, train, settings)
    assert numbers(output) == numbers(unbroken[0])
    _same(pool.run(1, weights, settings, output)[0], unbroken[1])


LAYOUTS = [
    Layout(2),
    Layout(2, tp=2),
    Layout(2, pp=2),
    Layout(2, ulysses=2),
    Layout(2, ring=2),
    Layout(4, tp=2, ring=2),
    Layout(4, pp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_resumed_in_another_layout_differs_by_float32_rounding(videos, tmp_path, unbroken, layout):
    """At most 2e-5 of the loss and of each weight tensor's largest entry after two more steps."""
    output = _crashed_copy(unbroken[0], tmp_path / "run")
    settings = overrides(videos, output, *FLOAT32, *layout.overrides())
    pool.run(layout.world, train, settings)
    before, after = numbers(output)[:STOP], numbers(output)[STOP:]
    assert before == numbers(unbroken[0])[:STOP]
    for step, wanted in zip(after, numbers(unbroken[0])[STOP:], strict=True):
        assert step == pytest.approx(wanted, rel=2e-5)
    found = pool.run(1, weights, settings, output)[0]
    for name, wanted in unbroken[1].items():
        assert (found[name] - wanted).abs().max() <= 2e-5 * wanted.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize("layout", [Layout(2, ulysses=2), Layout(4, tp=2, pp=2)], ids=str)
def test_a_sigterm_to_one_rank_stops_all_after_the_same_step_and_the_resumed_run_is_bitwise_the_same(
    videos, tmp_path, layout
):
    more = ("train.precision=fp32", "data.packing=true", "train.steps=12", *layout.overrides())
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    summaries = pool.run(layout.world, train, overrides(videos, stopped, *more), 2)
    assert summaries[0]["stopped"] is True
    steps = len(read_metrics(stopped)[0])
    assert 2 <= steps < 12
    assert latest_checkpoint(stopped).name == f"step-{steps:08d}"
    pool.run(layout.world, train, overrides(videos, stopped, *more))
    pool.run(layout.world, train, overrides(videos, unbroken, *more))
    assert numbers(stopped) == numbers(unbroken)
    settings = overrides(videos, stopped, *more)
    _same(pool.run(1, weights, settings, stopped)[0], pool.run(1, weights, settings, unbroken)[0])


def _wait_for_steps(process, output, steps):
    deadline = time.monotonic() + 150
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.02)


def test_every_rank_ends_with_75_after_a_sigterm_to_one_process_and_a_killed_run_resumes(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("THREADS_AT_EXIT", str(tmp_path))
    output = tmp_path / "run"
    settings = ["tiny", *overrides(videos, output, "train.steps=100000", "checkpoint.save_every=1")]
    with started(*settings, "parallel.pp=2", processes=2) as run:
        _wait_for_steps(run, output, 2)
        os.kill(children(run.pid)[-1], signal.SIGTERM)
        said, _ = run.communicate(timeout=90)
    assert re.findall(r"exitcode +: (-?\d+)", said) == ["75", "75"] and "megatron_vila/" not in said, said
    assert not exit_threads.left_of_groups(tmp_path, processes=2)
    stopped_at = len(read_metrics(output)[0])
    assert f"stopped by SIGTERM after step {stopped_at}" in said
    assert latest_checkpoint(output).name == f"step-{stopped_at:08d}"

    with started(*settings) as killed:
        _wait_for_steps(killed, output, stopped_at + 3)
    reached = int(latest_checkpoint(output).name.split("-")[1])
    assert reached > stopped_at
    last = reached + 1
    pool.run(1, train, overrides(videos, output, f"train.steps={last}"))
    assert [record["step"] for record in read_metrics(output)[0]] == list(range(1, last + 1))
    assert latest_checkpoint(output).name == f"step-{last:08d}"
