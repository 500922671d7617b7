"""How a run ends: its exit code on every rank, the one message, and that nothing is lost by what can fail."""

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.config.schema import Config
from megatron_vila.errors import SettingError
from megatron_vila.training.closing import closing_lines
from megatron_vila.training.stop import StopRequest
from megatron_vila.training.summary import read_metrics
from megatron_vila.training.trainer import Trainer
from tests.data.material import conversation, write_jsonl
from tests.ranks import pool
from tests.training.command_run import command_on_rank, run_command
from tests.training.real_run import Layout, overrides


def _signal_at(output: Path, step: int, number: int) -> None:
    while len(read_metrics(output)[0]) < step:
        time.sleep(0.005)
    os.kill(os.getpid(), number)


def _main_with_signal(rank, world, arguments, output, number):
    """The command, of which the last rank is sent a signal after two steps."""
    if rank == world - 1:
        threading.Thread(target=_signal_at, args=(output, 2, number), daemon=True).start()
    return command_on_rank(rank, world, arguments)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_that_was_saved_ends_every_rank_with_75_and_one_line(videos, tmp_path, number):
    arguments = ["tiny", *overrides(videos, tmp_path, "train.steps=100000")]
    ranks = pool.run(2, _main_with_signal, 2, arguments, tmp_path, number)
    assert [status for status, _, _ in ranks] == [75, 75] and not any(err for _, _, err in ranks)
    saved = int(latest_checkpoint(tmp_path).name.split("-")[1])
    assert saved == len(read_metrics(tmp_path)[0]) >= 2
    assert "".join(out for _, out, _ in ranks).count(f"stopped by {number.name} after step {saved}") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] is True


def test_a_ctrl_c_that_ends_what_stderr_is_piped_into_is_noted_all_the_same():
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    try:
        os.dup2(writer, 2)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)
    assert stop.signal == signal.SIGINT


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("checkpoint.save=false", "nothing is saved, because checkpoint.save=false"),
        ("checkpoint.resume=false", "the same command with checkpoint.resume=true continues from there"),
    ],
)
def test_a_stop_after_which_the_same_command_would_begin_anew_does_not_ask_for_it(videos, tmp_path, setting, words):
    arguments = ["tiny", *overrides(videos, tmp_path, "train.steps=100000", setting)]
    ((status, out, _),) = pool.run(1, _main_with_signal, 1, arguments, tmp_path, signal.SIGTERM)
    assert status == 1 and words in out


def _failing_evaluation(rank, world, arguments):
    def fail(config, forward, held_out):
        raise SettingError("nothing to evaluate")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_vila.training.evaluate.evaluate", fail)
        return command_on_rank(rank, world, arguments)


@pytest.mark.parametrize("steps", [2, 3], ids=["at the end", "in between"])
def test_a_checkpoint_due_at_the_step_of_an_evaluation_that_fails_is_there_and_missing_files_were_told_at_the_start(
    videos, tmp_path, steps
):
    records = [{"id": str(i), "video": f"/nowhere/{i}.mp4", "conversations": conversation()} for i in range(5)]
    path = write_jsonl(tmp_path / "eval.jsonl", records)
    every = ("checkpoint.save_every=2", "train.eval_every=2", f"train.steps={steps}")
    arguments = ["tiny", *overrides(videos, tmp_path / "run", f"data.eval=[{path}]", *every)]
    ranks = pool.run(2, _failing_evaluation, 2, arguments)
    assert [status for status, _, _ in ranks] == [2, 2] and "nothing to evaluate" in "".join(err for _, _, err in ranks)
    assert latest_checkpoint(tmp_path / "run").name == "step-00000002"
    said = ranks[0][1]
    assert said.index("data.eval names 5 media files, of which 5 are missing: /nowhere/0.mp4") < said.index("step 1/")


def _planted(rank, world, arguments, where, kind):
    """The command with a fault of the program that only rank 1 meets, or all do."""

    def fail(self, rows):
        if where == "everywhere" or rank == 1:
            raise kind("a bug")
        return step(self, rows)

    step = Trainer._train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fail)
        return command_on_rank(rank, world, arguments)


@pytest.mark.parametrize("where", ["rank 1", "everywhere"])
@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError])
def test_a_fault_of_the_program_keeps_its_traceback_which_is_shown_once(videos, tmp_path, where, kind):
    arguments = ["tiny", *overrides(videos, tmp_path)]
    ranks = pool.run(2, _planted, 2, arguments, where, kind)
    assert [status for status, _, _ in ranks] == [1, 1]
    said = "".join(err for _, _, err in ranks)  # the raising line and the error
    assert said.count("Traceback") == 1 and said.count("a bug") == 2
    last = said.splitlines()[-1]
    assert last.startswith("megatron_vila: rank ") and f"what each rank was doing: {tmp_path / 'failures'}" in last
    files = {path.name: path.read_text() for path in (tmp_path / "failures").iterdir()}
    assert sorted(files) == ["rank-0.txt", "rank-1.txt"] and all("Traceback" in text for text in files.values())
    if where == "rank 1":
        assert "a bug" in ranks[1][2] and not ranks[0][2] and "megatron_vila: rank 1 " in last
        assert "This is a consequence" in files["rank-0.txt"] and "The failure that counts: rank 1 (" in files["rank-0.txt"]


def test_a_finished_run_says_where_it_is_saved_what_became_of_its_samples_and_what_can_come_next(videos, tmp_path):
    (tmp_path / "data").mkdir()
    records = [{"id": "question", "conversations": conversation()[:1]}]
    records += [{"id": str(i), "conversations": conversation("a", "b")} for i in range(3)]
    path = write_jsonl(tmp_path / "data/samples.jsonl", records)
    arguments = overrides(videos, tmp_path / "my run", f"data.train=[{path}]", "train.steps=2", "data.shuffle=false")
    status, said, err = run_command(Layout(), arguments)
    assert (status, err) == (0, "")
    saved = tmp_path / "my run/checkpoints/step-00000002"
    closing = said[said.index("finished after step 2") :].splitlines()
    assert closing[0] == f"finished after step 2: saved in {saved}"
    assert "2 unsupervised" in closing[1] and closing[1].endswith("no update skipped")
    commands = {line.strip().partition(": ")[0]: shlex.split(line.partition(": ")[2]) for line in closing[2:]}
    assert commands["evaluate it"][:4] == ["python", "-m", "megatron_vila.train", "tiny"]
    assert commands["evaluate it"][-1] == "data.eval=[HELD_OUT.json]"
    assert commands["export it"][-2:] == [str(tmp_path / "my run"), "OUT"]
    further, other = commands["train it further"][4:], commands["start another run from it"][4:]
    assert run_command(Layout(), further)[0] == 0 and len(read_metrics(tmp_path / "my run")[0]) == 4
    assert run_command(Layout(), [*other, f"train.output={tmp_path / 'other'}"])[0] == 0
    # A run that continues from a checkpoint and saves none has none of the step at which it ends.
    _, said, _ = run_command(Layout(), [*further, "train.steps=5", "checkpoint.save=false"])
    assert "finished after step 5: nothing is saved (checkpoint.save=false)" in said


def test_a_run_that_does_not_resume_says_how_its_command_goes_on():
    config = Config()
    config.checkpoint.resume = False
    for stopped in (True, False):
        lines = closing_lines(["tiny", "checkpoint.resume=false"], config, 2, Path("step-00000002"), stopped, 0, {})
        commands = [line for line in lines if "megatron_vila.train" in line]
        assert commands and all(" tiny checkpoint.resume=true" in line for line in commands)
