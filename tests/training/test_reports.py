"""What only reports on a run never ends it: full disks, removed folders, rubbish in its files, a screen that is gone."""

import io
import json
import os
import resource
import shutil
import sys
from contextlib import closing, contextmanager, suppress

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vila.busy import busy
from megatron_vila.config.load import load_config
from megatron_vila.errors import UserError
from megatron_vila.training.evaluate import EVALUATION
from megatron_vila.training.report_files import AppendFile, Reporting
from megatron_vila.training.run_data import tell_bad_records
from megatron_vila.training.summary import combine, read_metrics, summarize
from tests.training.test_metrics import logger, metrics, write_run


@contextmanager
def full_disk(bytes_left: int = 0):
    """No file of this process grows beyond ``bytes_left``: writing fails as on a full disk, in the middle of a record too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_line_and_no_record_once_there_is_room_again(tmp_path, caplog):
    log, _ = logger(tmp_path)
    log.step(metrics(1))
    with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 10):
        log.step(metrics(2))
        log.step(metrics(3))
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1]
    log.step(metrics(4))
    log.finish({})
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2, 3, 4]
    told = [r.getMessage() for r in caplog.records if "metrics.jsonl" in r.getMessage()]
    assert len(told) == 2 and "cannot be written (File too large)" in told[0] and "written again" in told[1]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_disk_that_stays_full_hides_no_error_and_keeps_the_old_plot(tmp_path, caplog):
    write_run(tmp_path, 1, 2)
    plot = (tmp_path / "loss.png").read_bytes()
    own = pytest.raises(RuntimeError, match="the checkpoint's own message")
    with full_disk(), own, closing(logger(tmp_path, start=2)[0]) as log:
        log.step(metrics(3))
        raise RuntimeError("the checkpoint's own message")
    assert (tmp_path / "loss.png").read_bytes() == plot
    assert not list(tmp_path.glob("*.tmp"))
    assert all(r.exc_info is None for r in caplog.records)


def test_a_folder_removed_in_flight_is_made_anew(tmp_path):
    run = tmp_path / "run"
    log, _ = logger(run)
    log.step(metrics(1))
    shutil.rmtree(run)
    log.step(metrics(2))
    assert log.finish({})["steps"] == 2
    assert [r["step"] for r in read_metrics(run)[0]] == [2]
    assert (run / "summary.json").is_file() and (run / "loss.png").is_file()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "loss.png", "summary.json"])
def test_something_else_in_the_place_of_a_report_does_not_end_the_run(tmp_path, caplog, name):
    if name == "tensorboard":
        (tmp_path / name).write_text("a file")
    else:
        (tmp_path / name / "inside").mkdir(parents=True)
    log, text = logger(tmp_path)
    log.step(metrics(1))
    log.finish({})
    assert "step  1/10" in text.getvalue()
    assert sum(r.getMessage().startswith(str(tmp_path / name)) for r in caplog.records) == 1


def test_a_folder_in_the_place_of_the_list_of_bad_records_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "bad_records.txt" / "inside").mkdir(parents=True)
    tell_bad_records(load_config("tiny", [f"train.output={tmp_path}"]), [], [])
    assert "bad_records.txt cannot be written (Is a directory" in caplog.text


def test_a_pipe_in_the_place_of_a_temporary_file_is_told_and_not_waited_for(tmp_path, caplog):
    names = ["summary.json", "loss.png"]
    for name in names:
        os.mkfifo(tmp_path / f"{name}.tmp")
    write_run(tmp_path, 1, 1)
    for name in names:
        (told,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith(str(tmp_path / name))]
        assert f"no plain file stands there; remove it: {tmp_path / name}.tmp" in told
    os.mkfifo(tmp_path / "summary.json")
    with pytest.raises(UserError, match="it is not a plain file"):
        combine([tmp_path], 1.0)


def test_a_screen_that_takes_no_more_does_not_end_the_run(tmp_path):
    screen = open("/dev/full", "w")  # noqa: SIM115
    log, _ = logger(tmp_path, console=Console(file=screen))
    log.step(metrics(1))
    log.close()
    with pytest.raises(OSError):
        screen.close()
    assert len(read_metrics(tmp_path)[0]) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pipe_whose_reader_has_ended_does_not_end_the_run(tmp_path, monkeypatch, terminal):
    """As ``| head`` leaves it, and Ctrl-C, which ends ``| tee`` before the run."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with suppress(BrokenPipeError), open(writer, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        with busy("starting"):
            log, _ = logger(tmp_path, console=None)
        log.step(metrics(1))
        log.step(metrics(2))
        log.close()
    assert len(read_metrics(tmp_path)[0]) == 2


def test_a_fault_of_the_program_in_a_report_is_told_with_its_place(caplog):
    assert Reporting().attempt("loss.png", lambda: {}["missing"]) is None
    assert "KeyError: 'missing', test_reports.py line" in caplog.text


def test_what_waits_for_a_full_disk_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vila.training.report_files.WAITING_BYTES", 25)
    file = AppendFile(tmp_path / "records")
    with full_disk():
        for number in range(5):
            with pytest.raises(OSError):
                file.write(b"record %d\n" % number)
    file.close()
    assert (tmp_path / "records").read_bytes() == b"record 3\nrecord 4\n"


GOOD = {"loss": 1.0, "lr_llm": 0.1, "tokens": 1, "frames": 1, "step_s": 0.5, "peak_memory_gib": 1.0, "skipped": 0, "mfu": None}
RUBBISH = [
    b"not json\n", b"[1, 2]\n", b"3\n", b"null\n", b'"text"\n', b'{"loss": 1.0}\n', b'{"step": "1", "loss": 1.0}\n',
    b'{"step": true, "eval_loss": 1}\n', b'{"step": -1, "eval_loss": 1}\n', b'{"step": 1e400}\n', b'{"step": 1, "loss": 1.0}\n',
    b'{"step": 1, "eval_accuracy": "high"}\n', b'{"step": 1, "eval_loss": NaN}\n', b"\xff\xfe\x00\x00\n", b"\x00" * 5000 + b"\n",
    b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n", b"x" * (2**21 + 5) + b"\n",
    json.dumps(GOOD | {"step": 1, "tokens": None}).encode() + b"\n",
    json.dumps(GOOD | {"step": 1, "lr_llm": None}).encode() + b"\n",
    json.dumps(GOOD | {"step": 1, "frames": 10**400}).encode() + b"\n",
]  # fmt: skip
CUT_OFF = b'{"step": 2, "eval_lo'


def test_rubbish_in_metrics_jsonl_is_left_out_with_one_line_and_dropped_at_a_resume(tmp_path, caplog):
    write_run(tmp_path, 1, 3, accuracy=0.5)
    wanted = read_metrics(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*RUBBISH, *lines, CUT_OFF]))
    assert read_metrics(tmp_path) == wanted and summarize(tmp_path)["steps"] == 3
    caplog.clear()
    assert read_metrics(tmp_path) == wanted
    (told,) = [r.getMessage() for r in caplog.records]
    assert f"{len(RUBBISH) + 1} lines are no records and are left out (the first one is line 1)" in told
    write_run(tmp_path, 3, 4, start=2)
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(lines[0] + lines[1])


def test_steps_of_a_run_that_was_set_back_are_not_counted_twice(tmp_path):
    write_run(tmp_path, 1, 3, accuracy=0.5)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines, lines[1]]))
    steps, evaluations = read_metrics(tmp_path)
    assert [r["step"] for r in steps] == [1, 2] and not evaluations


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff", b'{"steps": 1}', b'{"steps": "1"}'])
def test_a_recipe_with_a_summary_that_cannot_be_read_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json"):
        combine([tmp_path], 1.0)


def test_plots_pass_over_an_evaluation_without_an_accuracy(tmp_path):
    log, _ = logger(tmp_path, console=Console(file=io.StringIO()))
    log.step(metrics(1))
    log.result(1, EVALUATION, {"accuracy": float("nan"), "chance": 0.125})
    log.close()
    assert (tmp_path / "loss.png").is_file()
