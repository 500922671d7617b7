"""The launcher under real signals: a stopped run is saved and ends with 75, whoever gets the signal, how often and when.

The agents and ranks are real processes; most ranks stand in for the trainer (``tests/launched.py``), one test has the trainer.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.exit_codes import FAILED, FINISHED, INTERRUPTED, STOPPED, USER_ERROR
from megatron_vila.launch import main
from tests.training.real_run import REPOSITORY, environment, numbers, overrides, write_videos

PATIENCE_S = 120


def wait_for(*paths):
    """Until all files are there."""
    end = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def is_alive(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Launched:
    """A launcher with ``ranks`` stand-ins; its files are in ``folder``."""

    def __init__(self, server, folder, rank, imports_s=0.0, rank_imports_s=0.0, **world):
        self.server, self.folder, self.log = server, folder, folder / f"log-{world.get('node_rank', 0)}"
        job = {"rank": rank, "world": {"ranks_per_node": 2} | world, "log": str(self.log), "imports_s": imports_s}
        self.pid = server(job | {"arguments": [str(folder), str(rank_imports_s)]})
        wait_for(self.log.with_suffix(".held"))

    def all_ranks(self, what, ranks=(0, 1)):
        wait_for(*(self.folder / f"{what}-{rank}" for rank in ranks))

    def saved(self):
        return sorted(path.name for path in self.folder.glob("saved-*"))

    def status(self):
        return self.server({"wait": self.pid})

    def said(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.launched"], cwd=REPOSITORY, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    leaders = []

    def ask(job):
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = int(process.stdout.readline())
        if "wait" not in job:
            leaders.append(answer)
        return answer

    yield ask
    for leader in leaders:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
    process.stdin.close()
    process.wait(PATIENCE_S)
    process.stdout.close()


@pytest.fixture
def launched(server, tmp_path):
    def start(rank="trains", **how):
        return Launched(server, tmp_path, rank, **how)

    return start


def stopped_and_saved(run):
    assert run.status() == STOPPED
    assert run.saved() == ["saved-0", "saved-1"]
    assert run.said() == ""


@pytest.mark.parametrize("asking", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_leader_alone_is_saved_on_by_every_rank(launched, asking):
    run = launched()
    run.all_ranks("up")
    os.kill(run.pid, asking)
    stopped_and_saved(run)


def test_a_signal_to_the_whole_group_is_saved_on_once(launched):
    run = launched()
    run.all_ranks("up")
    os.killpg(run.pid, signal.SIGTERM)
    stopped_and_saved(run)


def test_a_terminal_that_is_closed_does_not_end_a_run_under_nohup(launched):
    run = launched("is_hung_up_on")
    run.all_ranks("up")
    os.killpg(run.pid, signal.SIGHUP)
    time.sleep(1)  # a save takes 0.3 s
    assert run.saved() == []
    os.kill(run.pid, signal.SIGTERM)
    stopped_and_saved(run)


def test_an_output_that_takes_no_more_does_not_change_the_status(launched):
    run = launched("prints_to_a_full_disk")
    assert (run.status(), run.said()) == (FINISHED, "")


def test_ranks_that_have_ended_do_not_outlive_a_launcher_that_is_killed_before_it_hears_of_it(launched):
    run = launched("ends_as_a_trainer")
    run.all_ranks("up")
    os.kill(run.pid, signal.SIGSTOP)
    ranks = [int((run.folder / f"up-{rank}").read_text()) for rank in (0, 1)]
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    run.all_ranks("saved")
    os.kill(run.pid, signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    end = time.monotonic() + PATIENCE_S
    while any(is_alive(rank) for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_to_one_rank_alone_ends_that_rank_alone(launched):
    """In the trainer the ranks agree on it; the launcher waits for them all."""
    run = launched()
    run.all_ranks("up")
    os.kill(int((run.folder / "up-1").read_text()), signal.SIGTERM)
    run.all_ranks("saved", ranks=[1])
    os.kill(int((run.folder / "up-0").read_text()), signal.SIGTERM)
    stopped_and_saved(run)


def test_signals_that_are_repeated_during_the_save_do_not_disturb_it(launched):
    run = launched()
    run.all_ranks("up")
    for _ in range(3):
        os.kill(run.pid, signal.SIGTERM)
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.05)
    stopped_and_saved(run)


def test_a_signal_while_the_ranks_import_waits_until_they_can_act_on_it(launched):
    run = launched(rank_imports_s=1)
    run.all_ranks("importing")
    os.killpg(run.pid, signal.SIGTERM)
    stopped_and_saved(run)


def test_a_signal_before_any_rank_has_started_reaches_all_of_them(launched):
    run = launched(imports_s=1)
    os.kill(run.pid, signal.SIGTERM)
    stopped_and_saved(run)


def test_ctrl_c_before_a_rank_has_begun_ends_the_run_with_one_line(launched):
    run = launched("is_interrupted_before_it_begins")
    assert run.status() == INTERRUPTED
    assert run.said() == "megatron_vila: interrupted; what was saved before is intact\n"


def test_a_run_that_finishes_ends_with_0_and_without_a_word(launched):
    run = launched("finishes")
    assert (run.status(), run.said()) == (FINISHED, "")


def test_bad_input_ends_all_ranks_with_2_and_without_a_report_of_its_own(launched):
    run = launched("refuses")
    assert (run.status(), run.said()) == (USER_ERROR, "")


def test_a_rank_that_is_killed_is_named_in_one_line(launched):
    run = launched("is_killed")
    assert run.status() == FAILED
    (line,) = run.said().splitlines()
    assert line.startswith(f"megatron_vila: rank 1 on {os.uname().nodename} was killed by SIGKILL (often for want of host memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--gpu", "h200"], "--gpu belongs to --dry-run"),
        (["tiny", "--world-size", "4"], "--world-size belongs to --dry-run"),
        (["tiny", "--steps", "4"], "unrecognized arguments: --steps"),
        (["train.steps=4", "--dryrun"], "unrecognized arguments: --dryrun"),
        ([], "required: config"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told_once_before_any_rank_starts(capsys, arguments, message):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--nproc-per-node", "2", *arguments])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert ended.value.code == USER_ERROR
    assert capsys.readouterr().err.count(message) == 1


def test_several_nodes_end_with_75_each(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"nodes": 2, "address": "127.0.0.1", "port": port, "ranks_per_node": 1}
    nodes = [Launched(server, tmp_path, "trains", node_rank=rank, **world) for rank in (0, 1)]
    nodes[0].all_ranks("up")
    for node in nodes:
        os.kill(node.pid, signal.SIGTERM)
    assert [node.status() for node in nodes] == [STOPPED, STOPPED]
    assert nodes[0].saved() == ["saved-0", "saved-1"]


# ------------------------------------------------------------------------------------------------------------ the real trainer


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def test_a_real_run_of_two_ranks_under_a_shell_is_saved_on_a_signal_and_goes_on(videos, tmp_path):
    """The shell hands its process over to the launcher, as the stage scripts do, so that it leads the task."""
    run = tmp_path / "run"
    settings = ["tiny", *overrides(videos, run, "train.steps=100000", "parallel.ulysses=2")]
    script = 'launch() { exec "$0" -m megatron_vila.launch --nproc-per-node 2 "$@"; }; launch "$@"'
    task = subprocess.Popen(
        ["bash", "-c", script, sys.executable, *settings], env=environment(), text=True, cwd=REPOSITORY,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(run / "metrics.jsonl")
        os.kill(task.pid, signal.SIGTERM)
        said, _ = task.communicate(timeout=PATIENCE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(task.pid, signal.SIGKILL)
    assert task.returncode == STOPPED, said
    assert "Traceback" not in said and "ChildFailedError" not in said and "torch.distributed" not in said
    step = int(latest_checkpoint(run).name.split("-")[1])
    assert [number for number, *_ in numbers(run)] == [*range(1, step + 1)]
