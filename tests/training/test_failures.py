"""What a run leaves that fails: which rank counts as the first, what the screen says, and a file of each rank."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vila.errors import PeerError, UserError
from megatron_vila.exit_codes import FAILED, USER_ERROR
from megatron_vila.failing import failure_files
from megatron_vila.failing.failure_board import CAUSE, CONSEQUENCE, STALL, Board, Failure
from megatron_vila.failing.failures import Reporter
from megatron_vila.failing.watch import Watch
from megatron_vila.training.trainer import Trainer
from tests import planted
from tests.ranks import pool
from tests.training.command_run import command_on_rank
from tests.training.real_run import REPOSITORY, environment, overrides


def failure(rank, kind=CAUSE, time_s=100.0, text="KeyError: 'a bug'"):
    return Failure(kind, time_s, rank, f"process {rank} on node", FAILED, "step 3, reading samples", text)


# ----------------------------------------------------------------------------------------------------------- which one counts


def _written(rank, failures):
    """What each rank takes for the first when all have written, one after the other in the order of ``failures``."""
    board = Board()
    for of_rank in failures:
        if of_rank.rank == rank:
            board.write(of_rank, of_rank.text)
        dist.barrier()
    board.settle(60.0)
    told = board.untold() if board.first().rank == rank else []
    return board.first(), told


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([failure(0, CONSEQUENCE, 100.0), failure(1, CAUSE, 103.0), failure(2, CONSEQUENCE, 101.0)], 1),
        ([failure(0, CAUSE, 100.2), failure(1, CAUSE, 100.1), failure(2, CAUSE, 100.3)], 1),
        ([failure(0, STALL, 100.0), failure(1, CONSEQUENCE, 99.0), failure(2, CAUSE, 200.0)], 2),
        ([failure(2, STALL, 100.0), failure(1, CONSEQUENCE, 99.0), failure(0, CONSEQUENCE, 98.0)], 2),
        ([failure(2, CAUSE, 100.0), failure(1, CAUSE, 100.0), failure(0, CAUSE, 100.0)], 0),
    ],
    ids=["a consequence written first", "the earlier of causes", "a stall", "no cause", "at once"],
)
def test_causes_count_before_consequences_and_then_the_earlier_whatever_the_order_in_which_they_are_written(failures, first):
    for seen, _ in pool.run(3, _written, failures):
        assert seen == next(f for f in failures if f.rank == first)


def test_each_different_cause_is_told_once_by_the_first_rank():
    failures = [failure(0, text="a"), failure(1, time_s=99.0, text="b"), failure(2, time_s=101.0, text="a")]
    told = [told for _, told in pool.run(3, _written, failures)]
    assert told == [[], ["a", "b"], []]


def _reports(rank, output, errors):
    """What each of two ranks says and leaves that fail one after the other, and their exit codes."""
    reporter = Reporter()
    reporter.keep_in(output)
    os.environ["WORLD_SIZE"] = "2"
    delay_s, error = errors[rank]
    try:
        time.sleep(delay_s)
        try:
            raise error
        except Exception as raised:
            reporter.note()
            reporter.await_cause(raised)
            return reporter.report(raised)
    finally:
        del os.environ["WORLD_SIZE"]


def _reports_said(rank, output, errors):
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("megatron_vila.failing.failures.tell", said.append)
        return _reports(rank, output, errors), said


def test_what_another_rank_found_for_this_one_is_a_consequence_with_the_same_exit_code(tmp_path):
    heard = UserError("no file; name another")
    heard.elsewhere = True
    for other in (heard, PeerError("rank 0 failed in what it does for all ranks")):
        errors = [(0.3, UserError("no file; name another")), (0.0, other)]
        (status, said), (other_status, silence) = pool.run(2, _reports_said, tmp_path, errors)
        assert (status, other_status, silence) == (USER_ERROR, USER_ERROR, [])
        assert said[0].startswith("megatron_vila: no file; name another\n  rank 0 (process ")
        assert said[0].endswith(f"failed first (starting); what each rank was doing: {tmp_path / 'failures'}") and len(said) == 1
        assert "This is a consequence" in (tmp_path / "failures/rank-1.txt").read_text()


# -------------------------------------------------------------------------------------------------------------------- the files


def test_the_file_of_a_rank_holds_when_where_and_the_whole_traceback_with_its_causes(tmp_path):
    try:
        try:
            (tmp_path / "nowhere").read_text()
        except OSError as error:
            raise KeyError("a bug") from error
    except KeyError as error:
        assert failure_files.write(tmp_path / "failures", failure(1), error, failure(0))
    said = (tmp_path / "failures/rank-1.txt").read_text()
    assert said.startswith("rank 1, process 1 on node\nfailed at 1970-01-01 ") and "doing: step 3, reading samples" in said
    assert said.count("Traceback") == 2 and "FileNotFoundError" in said and said.rstrip().endswith("KeyError: 'a bug'")
    assert "The failure that counts: rank 0 (process 0 on node) failed first (step 3, reading samples), at 1970-01-01 " in said


def test_files_of_an_earlier_start_are_renamed_and_none_is_lost(tmp_path):
    for start in ("first", "second"):
        folder = tmp_path / "failures"
        folder.mkdir()
        (folder / "rank-0.txt").write_text(start)
        os.utime(folder, (1e9, 1e9))
        failure_files.set_aside_earlier(tmp_path)
        failure_files.set_aside_earlier(tmp_path)
        assert not folder.exists()
    kept = sorted(tmp_path.glob("failures-*/rank-0.txt"))
    assert [path.read_text() for path in kept] == ["first", "second"] and kept[0].parent.name.startswith("failures-20010909-")


@pytest.mark.parametrize("spoil", [Path.touch, os.mkfifo], ids=["a file", "a pipe"])
def test_where_no_file_can_be_written_the_screen_says_all(tmp_path, capsys, spoil):
    spoil(tmp_path / "failures")
    failure_files.set_aside_earlier(tmp_path)
    reporter = Reporter()
    reporter.keep_in(tmp_path)
    try:
        raise KeyError("a bug")
    except KeyError as error:
        assert reporter.report(error) == FAILED
    said = capsys.readouterr().err
    assert "Traceback" in said and "KeyError: 'a bug'" in said and "failures" not in said.rpartition("a bug")[2]


def hangs_here(done):
    done.wait(60)


def _hangs(rank, output):
    """Rank 1 stands still when rank 0 fails; its file, after its watch has ended it."""
    reporter, done = Reporter(), threading.Event()
    reporter.keep_in(output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_vila.failing.watch._PEER_FAILED_S", 0.1)
        patch.setattr("os._exit", lambda status: done.set())
        with Watch(0.01, reporter) as watch:
            watch.at(7, "in the evaluation")
            if rank == 0:
                board = Board()
                board.write(failure(0), "")
                board.told()
            else:
                hangs_here(done)
    dist.barrier()
    return (output / "failures/rank-1.txt").read_text()


def test_a_rank_that_hangs_when_another_fails_leaves_where_its_main_thread_stands(tmp_path):
    said = pool.run(2, _hangs, tmp_path)[0]
    assert "doing: step 7, in the evaluation\nThis is a consequence" in said and "PeerError" in said
    assert "in hangs_here\n    done.wait(60)" in said.partition("Where its main thread stands")[2]


# ------------------------------------------------------------------------------------------------------------------- whole runs


def _fails_at_once(rank, world, arguments, error):
    def fail(self, rows):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fail)
        return command_on_rank(rank, world, arguments)


def test_a_lone_rank_leaves_its_file_and_another_start_keeps_it(videos, tmp_path):
    arguments = ["tiny", *overrides(videos, tmp_path, "train.steps=1")]
    ((status, _, said),) = pool.run(1, _fails_at_once, 1, arguments, UserError("no; change it"))
    assert (status, said) == (USER_ERROR, "megatron_vila: no; change it\n")
    ((status, _, said),) = pool.run(1, _fails_at_once, 1, arguments, KeyError("a bug"))
    assert status == FAILED
    doing, folder = "step 1, in the forward and backward pass or the update", tmp_path / "failures"
    assert said.endswith(f" failed first ({doing}); what each rank was doing: {folder}\n")
    texts = [path.read_text() for path in sorted(tmp_path.glob("failures*/rank-0.txt"))]
    assert ["no; change it" in text for text in texts] == [False, True] and doing in texts[0]


def test_a_start_that_is_refused_leaves_no_folder(videos, tmp_path):
    arguments = ["tiny", *overrides(videos, tmp_path / "run", "train.steps=0")]
    assert pool.run(1, command_on_rank, 1, arguments)[0][0] == USER_ERROR
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "our own"])
def test_of_a_cause_that_is_counted_after_its_consequence_a_user_reads_the_cause_its_rank_and_the_folder(
    videos, tmp_path, launcher
):
    arguments = ["tiny", *overrides(videos, tmp_path, "train.steps=9", "parallel.ulysses=2")]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.planted", *arguments]
    if launcher == "our own":
        start = ["-m", "tests.planted", "launch", *arguments]
    run = subprocess.run(
        [sys.executable, *start], env=environment(), cwd=REPOSITORY, text=True, capture_output=True, timeout=150
    )
    said = run.stderr
    assert run.returncode == FAILED, said
    folder = tmp_path / "failures"
    assert said.count("Traceback (most recent call last)") == 1 + (launcher == "torchrun"), said  # its own
    cause = said[: said.index("megatron_vila: ")]
    assert cause.count(planted.CAUSE) == 1 and "Trainer" not in cause.rpartition(planted.CAUSE)[2]
    line = said[len(cause) :].splitlines()[0]
    assert line.startswith("megatron_vila: rank 1 (process ") and " failed first (step 2, in the forward" in line
    assert line.endswith(f"; what each rank was doing: {folder}")
    if launcher == "torchrun":
        root = said[said.index("Root Cause") :]
        assert "rank      : 1 " in root and planted.CAUSE in root
    else:
        assert said.endswith("megatron_vila: the run ends, and the same command continues from the last checkpoint\n")
        assert said.count("megatron_vila: ") == 2 and planted.CONSEQUENCE not in said
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(files) == ["rank-0.txt", "rank-1.txt"]
    assert "This is a consequence" in files["rank-0.txt"] and planted.CONSEQUENCE in files["rank-0.txt"]
    assert "The failure that counts: rank 1 (process " in files["rank-0.txt"] and planted.CAUSE in files["rank-0.txt"]
    assert "This is the failure that counts." in files["rank-1.txt"] and "Traceback" in files["rank-1.txt"]
