"""One run writes to a folder: a living owner is named, a dead one cannot hold the lock, and one of many starts wins."""

import dataclasses
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron_vila.errors import UserError
from megatron_vila.training import lock as locks
from megatron_vila.training.lock import LockedError, Owner, RunLock
from megatron_vila.training.summary import read_metrics
from tests.ranks import pool
from tests.training.command_run import command_on_rank, refused
from tests.training.real_run import Layout, overrides


def _files(folder):
    return sorted(path.name for path in folder.iterdir())


def _locked_by(folder, number=1, **changes):
    owner = dataclasses.replace(Owner.of_this_process(), **changes)
    path = folder / f".lock-{number}"
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return path


def _until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "DEAD_AFTER_S", 0.5)


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "1000"]) as sleeping:
        yield sleeping
        sleeping.kill()


def test_a_lock_is_given_back_on_every_way_out(tmp_path):
    with RunLock(tmp_path).hold():
        assert _files(tmp_path) == [".lock-1"]
    with pytest.raises(KeyError), RunLock(tmp_path).hold():
        raise KeyError("on the way")
    with RunLock(tmp_path).hold():
        locks.release_all()
    assert _files(tmp_path) == []


def test_the_heart_of_an_owner_beats(tmp_path, fast):
    with RunLock(tmp_path).hold():
        os.utime(tmp_path / ".lock-1", (1, 1))
        _until(lambda: (tmp_path / ".lock-1").stat().st_mtime > 1)


def test_a_living_owner_on_this_machine_is_named_with_the_cure(tmp_path, process):
    held = _locked_by(tmp_path, pid=process.pid, born=locks._born(process.pid), user="mira", command="python train.py a.yaml")
    with pytest.raises(LockedError) as refused, RunLock(tmp_path).hold():
        pass
    owner = json.loads(held.read_text())
    for word in (f"process {process.pid} of mira on {owner['host']}", owner["since"], "python train.py a.yaml", "train.output"):
        assert word in str(refused.value)
    assert _files(tmp_path) == [".lock-1"]


def test_the_lock_of_a_killed_owner_is_taken_over_with_one_line_at_once(tmp_path, process, caplog):
    _locked_by(tmp_path, pid=process.pid, born=locks._born(process.pid))
    process.kill()
    process.wait()
    with RunLock(tmp_path).hold():
        assert _files(tmp_path) == [".lock-2"]
    assert [r.getMessage().count("held by a run that is dead and is taken over") for r in caplog.records] == [1]


def test_a_process_number_that_was_given_again_is_not_the_owner(tmp_path, process):
    _locked_by(tmp_path, pid=process.pid, born=locks._born(process.pid) - 1)
    with RunLock(tmp_path).hold():
        pass


def test_an_owner_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path, fast, caplog):
    path = _locked_by(tmp_path, machine="elsewhere", host="node7")
    done = threading.Event()

    def beat():
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockedError, match="on node7"), RunLock(tmp_path).hold():
        pass
    done.set()
    thread.join()
    os.utime(path)
    caplog.clear()
    with RunLock(tmp_path).hold():
        assert not path.exists()
    assert "waiting to see whether it lives" in caplog.text and "taken over" in caplog.text


def test_a_time_stamp_of_the_future_holds_a_dead_lock_no_longer_than_another(tmp_path, fast, caplog):
    path = _locked_by(tmp_path, machine="elsewhere", host="node7")
    os.utime(path, (4e9, 4e9))
    with RunLock(tmp_path).hold():
        assert not path.exists()
    assert "in use 0 seconds ago by process" in caplog.text


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_in_the_place_of_a_lock_is_named_with_the_cure(tmp_path, make):
    make(tmp_path / ".lock-1")
    with pytest.raises(LockedError, match=r"\.lock-1 is no lock of a run .* remove it"), RunLock(tmp_path).hold():
        pass
    assert _files(tmp_path) == [".lock-1"]


@pytest.mark.parametrize("target", ["/dev/zero", "/nowhere"])
def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path, fast, target):
    (tmp_path / ".lock-1").symlink_to(target)
    with RunLock(tmp_path).hold():
        assert _files(tmp_path) == [".lock-2"]


@pytest.mark.parametrize("changes", [{"pid": "a\0b"}, {"pid": None}, {"machine": ["x"]}, {"born": "1"}])
def test_an_owner_of_other_types_says_nothing(tmp_path, fast, changes):
    path = _locked_by(tmp_path, **changes)
    os.utime(path, (1, 1))
    with RunLock(tmp_path).hold():
        assert _files(tmp_path) == [".lock-2"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": 1}', b"\xff"])
def test_a_damaged_lock_is_dead_once_nobody_renews_it(tmp_path, fast, content):
    (tmp_path / ".lock-3").write_bytes(content)
    os.utime(tmp_path / ".lock-3", (1, 1))
    with RunLock(tmp_path).hold():
        assert _files(tmp_path) == [".lock-4"]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_starts_at_the_same_moment_exactly_one_wins(tmp_path, stale):
    for round_ in range(10):
        folder = tmp_path / str(round_)
        folder.mkdir()
        if stale:
            _locked_by(folder, number=5, born=1)
        gate, won, refused = threading.Barrier(6), [], []

        def start(folder=folder, gate=gate, won=won, refused=refused):
            lock = RunLock(folder)
            gate.wait()
            try:
                lock._acquire()
                won.append(lock)
            except LockedError:
                refused.append(lock)

        threads = [threading.Thread(target=start) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 5)
        assert len(_files(folder)) == 1


def test_an_owner_notices_that_its_lock_was_taken_and_not_that_its_folder_was_removed(tmp_path, fast):
    folder = tmp_path / "run"
    lock = RunLock(folder)
    with lock.hold():
        shutil.rmtree(folder)
        (tmp_path / "takes the number of the folder").mkdir()
        _until((folder / ".lock-1").exists)
        assert not lock.lost
        _locked_by(folder, number=2, host="node9")
        (folder / ".lock-1").unlink()
        _until(lambda: lock.lost)
        assert "on node9" in lock.lost
    assert _files(folder) == [".lock-2"]


def test_a_folder_that_takes_no_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="takes no file"), RunLock(tmp_path / "file" / "run").hold():
        pass


def test_a_second_run_is_refused_on_all_ranks_and_leaves_the_first_alone(videos, tmp_path):
    with RunLock(tmp_path).hold():
        refused(Layout(2), overrides(videos, tmp_path), f"process {os.getpid()} of ", "is in use by")
        assert _files(tmp_path) == [".lock-1"]


def _taken_over(rank, world, arguments, folder):
    """The command, whose lock another run takes after the second step."""

    def take():
        while len(read_metrics(folder)[0]) < 2:
            time.sleep(0.005)
        _locked_by(folder, number=2, host="node9")
        (folder / ".lock-1").unlink()

    if rank == 0:
        threading.Thread(target=take, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "BEAT_S", 0.05)
        return command_on_rank(rank, world, arguments)


def test_a_run_whose_lock_was_taken_over_ends_without_saving(videos, tmp_path):
    arguments = ["tiny", *overrides(videos, tmp_path, "train.steps=100000")]
    ranks = pool.run(2, _taken_over, 2, arguments, tmp_path)
    assert [status for status, _, _ in ranks] == [2, 2]
    said = "".join(err for _, _, err in ranks)
    assert said.count("was taken over by") == 1 and "on node9" in said
    assert not list((tmp_path / "checkpoints").glob("step-*"))
