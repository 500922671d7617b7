"""A save that fails, on any rank and at any file operation, ends on all ranks at once with one message and harms nothing."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vila.checkpoint.save_load import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_vila.errors import CheckpointError
from tests.ranks import pool
from tests.training.small_run import build

DP2, TP2 = (1, 1, 1, 1), (2, 1, 1, 1)


def attempt(run, folder, step, **more) -> str:
    """The message of a save, empty if it succeeds."""
    try:
        save_checkpoint(folder, step, [run.ddp], run.optimizer, run.scheduler, {"step": step, **more}, keep=1)
    except CheckpointError as error:
        return str(error)
    return ""


def loaded_step(run, folder) -> int:
    return load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)["step"]


def files_of(folder) -> set[str]:
    return {path.name for path in (Path(folder) / "checkpoints").iterdir()}


class Refusals:
    """An audit hook that, once armed, lets so many changes of a folder's files pass and refuses one, as a full disk does."""

    def __init__(self) -> None:
        self.left, self.folder = -1, ""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.left < 0 or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        changes = event in ("os.rename", "shutil.rmtree", "os.rmdir", "os.remove", "os.mkdir")
        if changes or (event == "open" and set(str(arguments[1])) & set("wxa+")):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def every_operation_refused(rank, layout, folder, bad_rank):
    """For each change of a file that a save makes on ``bad_rank``: (message, step that loads after it)."""
    run, refusals, outcomes = build(layout), Refusals(), []
    while True:
        place = f"{folder}/{len(outcomes)}"
        assert attempt(run, place, 1) == ""
        if rank == bad_rank:
            refusals.folder, refusals.left = place, len(outcomes)
        text = attempt(run, place, 2)
        reached = torch.tensor(refusals.left < 0 if rank == bad_rank else True)
        torch.distributed.all_reduce(reached, op=torch.distributed.ReduceOp.MIN)
        refusals.left = -1
        outcomes.append((text, loaded_step(run, place)))
        assert attempt(run, place, 3) == "" and files_of(place) == {"latest", "step-00000003"}
        if not reached:
            return outcomes


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_whatever_file_operation_fails_on_whichever_rank_all_ranks_end_with_the_same_message(tmp_path, bad_rank):
    results = pool.run(2, every_operation_refused, TP2, str(tmp_path), bad_rank)
    assert results[0] == results[1]
    *refused, last = results[0]
    assert last == ("", 2)
    # Rank 1 writes its tensors; rank 0 makes the folder, writes its tensors and the rest, renames, deletes.
    assert len(refused) >= (1 if bad_rank else 9)
    told = [(text, step) for text, step in refused if text]
    assert len(told) >= (1 if bad_rank else 9)
    for text, step in told:
        assert text.startswith("checkpoint of step 2 not saved in ") and "No space left on device" in text
        assert "earlier checkpoints are intact" in text and "continues from step-00000001" in text and step == 1
    # What cannot be deleted is told; the new checkpoint is in place.
    assert all(step == 2 for text, step in refused if not text)


def with_a_full_disk(rank, layout, folder, bad_rank, limit_bytes, extra_numbers):
    """A file size limit on one rank makes the operating system refuse its writes."""
    run = build(layout)
    assert attempt(run, folder, 1) == ""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == bad_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, unlimited[1]))
    try:
        text = attempt(run, folder, 2, more=torch.zeros(extra_numbers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    left, step = files_of(folder), loaded_step(run, folder)
    assert attempt(run, folder, 3) == ""
    return text, left, step, loaded_step(run, folder)


@pytest.mark.parametrize(
    "bad_rank, limit_bytes, extra_numbers",
    [(0, 2000, 0), (1, 2000, 0), (0, 1 << 22, 1 << 21)],
    ids=["tensors of rank 0", "tensors of rank 1", "state.pt"],
)
def test_a_write_that_is_refused_ends_the_save_everywhere_and_leaves_no_half_written_files(
    tmp_path, bad_rank, limit_bytes, extra_numbers
):
    for text, left, *steps in pool.run(2, with_a_full_disk, TP2, str(tmp_path), bad_rank, limit_bytes, extra_numbers):
        assert "File too large" in text and "earlier checkpoints are intact" in text and "GiB are free there" in text
        assert left == {"latest", "step-00000001"} and steps == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def on_a_small_disk(rank, folder):
    """Messages of saves with nothing free, and with room for half a checkpoint; then with room again."""
    run, outcomes = build(DP2), []
    assert attempt(run, folder, 1) == ""
    filler = Path(folder) / "filler"
    for free in (0, 100_000):
        if rank == 0:
            with open(filler, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(file.tell() - free)
        torch.distributed.barrier()
        outcomes.append((attempt(run, folder, 2), files_of(folder), loaded_step(run, folder)))
    torch.distributed.barrier()
    if rank == 0:
        filler.unlink()
    torch.distributed.barrier()
    assert attempt(run, folder, 2) == ""
    return outcomes, loaded_step(run, folder)


def test_a_disk_with_nothing_or_too_little_free_ends_the_save_on_all_ranks_and_a_freed_one_goes_on(small_disk):
    results = pool.run(2, on_a_small_disk, str(small_disk))
    assert results[0] == results[1]
    outcomes, step = results[0]
    assert step == 2
    for text, left, before in outcomes:
        assert "No space left on device" in text and "earlier checkpoints are intact; free space (0." in text
        assert left == {"latest", "step-00000001"} and before == 1


def refused_without_an_earlier_one(rank, folder):
    run = build(DP2)
    return attempt(run, folder, 1)


def test_a_folder_that_cannot_be_made_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "blocked").write_text("a file")
    for text in pool.run(2, refused_without_an_earlier_one, str(tmp_path / "blocked")):
        assert "not saved in " in text and "blocked" in text
        assert "there is no earlier checkpoint; free space or set train.output to a folder that can be written" in text


def refused_by_what_stands_there(rank, folder):
    run, outcomes = build(DP2), []
    root = Path(folder) / "checkpoints"
    for name, make in (("latest", os.mkdir), (".latest", os.mkfifo), (".latest", os.mkdir)):
        if rank == 0:
            root.mkdir(parents=True)
            make(root / name)
        torch.distributed.barrier()
        outcomes.append((attempt(run, folder, 1), files_of(folder) == {name}))
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(root)
        torch.distributed.barrier()
    return outcomes


def test_a_folder_or_a_pipe_in_the_place_of_latest_ends_the_save_before_anything_is_written(tmp_path):
    for outcomes in pool.run(2, refused_by_what_stands_there, str(tmp_path)):
        for text, nothing_else in outcomes:
            assert "no plain file stands there; remove it" in text and "latest" in text and nothing_else


def with_an_old_checkpoint_that_stays(rank, folder):
    """A file system that keeps a folder in use (as NFS does with open files): its old checkpoint cannot be deleted."""
    run = build(DP2)
    assert attempt(run, folder, 1) == ""
    if rank == 0:
        held = Path(folder) / "checkpoints" / "step-00000001" / "held"
        held.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(held)], check=True)
    torch.distributed.barrier()
    outcome = attempt(run, folder, 2), attempt(run, folder, 3), loaded_step(run, folder)
    torch.distributed.barrier()
    if rank == 0:
        (place,) = (Path(folder) / "checkpoints").glob(".step-*/held")
        subprocess.run(["umount", str(place)], check=True)
    torch.distributed.barrier()
    return *outcome, attempt(run, folder, 4)


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run_and_goes_later(small_disk):
    results = pool.run(2, with_an_old_checkpoint_that_stays, str(small_disk))
    assert results == [("", "", 3, "")] * 2
    assert files_of(small_disk) == {"latest", "step-00000004"}
    assert latest_checkpoint(small_disk).name == "step-00000004"
    shutil.rmtree(small_disk / "checkpoints")
