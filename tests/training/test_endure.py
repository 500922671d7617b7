"""Real processes that are killed, stopped and left by their launcher; and a few attacks of ``tools/endure.py``."""

import json
import os
import re
import signal
import time

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.training.summary import read_metrics
from tests.endure.attack import HANG_S, KINDS, SETTINGS, TIMEOUT_MINUTES, Attack, Calm, small_disk
from tests.endure.elastic import Elastic, Samples
from tests.endure.forks import Zygote
from tests.training.real_run import Layout, overrides

SHORT = f"train.timeout_minutes={TIMEOUT_MINUTES}"
PATIENT = "train.timeout_minutes=30"
PLACES = {
    "joining": "distributed_c10d.py:init_process_group",
    "making the groups": "topology.py:create",
    "agreeing on the lock": "agreement.py:on_rank_zero",
    "leaving the groups": "processes.py:end_distributed",
}
"""from the ranks' meeting to their end"""


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as started:
        yield started


@pytest.fixture
def run(zygote, videos, tmp_path):
    """A run of two ranks without end, at its fourth step."""
    output = tmp_path / "run"
    arguments = ["tiny", *overrides(videos, output, *SETTINGS, PATIENT, "train.steps=100000")]
    started = zygote.start(arguments, 2, tmp_path / "log")
    try:
        _wait_for_steps(started, output)
        yield started, output, arguments
    finally:
        started.kill()


def _wait_for_steps(started, output, steps=4):
    while len(read_metrics(output)[0]) < steps:
        assert started.alive(), started.log.read_text()
        time.sleep(0.02)


def test_a_rank_that_stands_still_ends_the_run_and_is_named_wherever_it_is(zygote, videos, tmp_path):
    runs = []
    try:
        # All at once, since each takes the timeout.
        for rank, (place, function) in zip([0, 1, 0, 1], PLACES.items(), strict=True):
            settings = overrides(videos, tmp_path / place, *SETTINGS, SHORT, "train.steps=2")
            started = zygote.start(["tiny", *settings], 2, tmp_path / f"{place}.log", stops=(rank, function))
            runs.append((rank, "step [0-2]", started))
        for rank in range(2):
            output = tmp_path / f"training {rank}"
            settings = overrides(videos, output, *SETTINGS, SHORT, "train.steps=100000")
            started = zygote.start(["tiny", *settings], 2, tmp_path / f"training {rank}.log")
            runs.append((rank, r"step \d+", started))
            _wait_for_steps(started, output)
            os.kill(started.ranks[rank], signal.SIGSTOP)
        for rank, step, started in runs:
            assert started.ends_within(HANG_S), started.log.read_text()
            said = started.log.read_text()
            assert zygote.status(started) == 1, said
            named = rf"megatron_vila: rank {rank} \(process {started.ranks[rank]} on .*\) does not respond: it was at {step}, "
            assert len(re.findall(named, said)) == 1 and said.count("megatron_vila: ") == 1, said
            assert SHORT in said and "Traceback" not in said
        assert latest_checkpoint(output) is not None
    finally:
        for _, _, started in runs:
            started.kill()


def test_ranks_whose_launcher_is_killed_save_and_end(run):
    started, output, _ = run
    os.kill(started.launcher, signal.SIGKILL)
    assert started.ends_within(HANG_S), started.log.read_text()
    last = len(read_metrics(output)[0])
    assert f"stopped by SIGTERM after step {last}" in started.log.read_text()
    assert latest_checkpoint(output).name == f"step-{last:08d}"


def test_a_second_start_is_refused_while_the_first_lives_and_goes_on_after_it_was_killed(zygote, run, tmp_path):
    started, output, arguments = run
    second = zygote.start(arguments, 2, tmp_path / "second")
    assert second.ends_within(HANG_S) and zygote.status(second) == 2
    said = second.log.read_text()
    assert said.count("megatron_vila: ") == 1 and f"in use by process {started.ranks[0]} of " in said
    started.kill()
    assert started.ends_within(HANG_S)
    saved = latest_checkpoint(output)
    third = zygote.start([*arguments, f"train.steps={int(saved.name[5:]) + 1}"], 2, tmp_path / "third")
    assert third.ends_within(HANG_S) and zygote.status(third) == 0
    said = third.log.read_text()
    assert "was held by a run that is dead and is taken over" in said and f"continuing from {saved}" in said


def test_a_run_started_by_hand_outlives_its_shell(zygote, videos, tmp_path):
    output = tmp_path / "run"
    arguments = ["tiny", *overrides(videos, output, *SETTINGS, "parallel.ulysses=1", "train.steps=100000")]
    started = zygote.start(arguments, 1, tmp_path / "log", by_hand=True)
    try:
        _wait_for_steps(started, output)
        os.kill(started.launcher, signal.SIGKILL)
        _wait_for_steps(started, output, len(read_metrics(output)[0]) + 20)
        os.kill(started.ranks[0], signal.SIGUSR1)
        assert started.ends_within(HANG_S)
    finally:
        started.kill()
    assert json.loads((output / "summary.json").read_text())["stopped"] is True


def test_after_attacks_of_every_kind_nothing_hangs_no_saved_step_is_lost_and_all_losses_are_those_of_a_calm_run(
    zygote, videos, tmp_path
):
    settings = overrides(videos, tmp_path, *SETTINGS, "train.steps=12")
    calm = Calm.run(zygote, settings, 2, tmp_path / "calm")
    with small_disk(tmp_path / "runs", 16) as has_disk:
        attack = Attack(zygote, settings, 2, tmp_path, 1, calm)
        for kind in KINDS if has_disk else KINDS[:-1]:
            attack.life(kind)
        attack.finish()
    assert not attack.score.faults(), attack.score.table()
    assert attack.score.runs_finished and attack.score.steps


def test_a_run_that_is_killed_and_goes_on_under_another_layout_takes_each_sample_once_and_in_the_same_order(zygote, tmp_path):
    """A few kills of ``tools/elastic_resume.py``."""
    run = Elastic(zygote, Samples.write(tmp_path / "data"), tmp_path, 7, packing=True, weights=(0.3, 0.7))
    run.check(run.calm(), run.attacked(2, 3, (Layout(), Layout(2), Layout(2, tp=2))))
