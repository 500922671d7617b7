"""What a run writes about itself, and that a resume leaves one clean record."""

import io
import json
import math
import re
import time
from contextlib import closing

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vila.training.evaluate import EVALUATION
from megatron_vila.training.metrics import MetricsLogger, truncate_after
from megatron_vila.training.plots import plot_runs, running_mean
from megatron_vila.training.roles import RunFacts, StepMetrics
from megatron_vila.training.summary import combine, print_summary, read_metrics, summarize, write_json


def metrics(step: int, **changes) -> StepMetrics:
    values = {"loss": 2.0 / step, "lr": {"llm": 1e-3, "projector": 1e-3}, "grad_norm": 0.5, "skipped": 0}
    values |= {"tokens": 1000, "supervised_tokens": 10, "frames": 4, "model_flops": 1e12}
    values |= {"step_s": 0.5, "data_wait_s": 0.1, "peak_memory_gib": 1.5}
    return StepMetrics(step=step, **(values | changes))


def logger(folder, total=10, start=0, terminal=False, **options) -> tuple[MetricsLogger, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    log = MetricsLogger(folder, options.pop("log_every", 1), options.pop("console", console))
    log.start(RunFacts(**{"is_writer": True, "total_steps": total, "start_step": start, "ranks": 2, "peak": None} | options))
    return log, text


def write_run(folder, first: int, last: int, start: int = 0, accuracy: float | None = None) -> dict:
    log, _ = logger(folder, total=last, start=start)
    for step in range(first, last + 1):
        log.step(metrics(step))
    if accuracy is not None:
        log.result(last, EVALUATION, {"accuracy": accuracy, "chance": 0.125})
    return log.finish({"held_out_accuracy": accuracy, "chance": 0.125})


def test_a_line_in_a_pipe_shows_every_number_on_one_line(tmp_path):
    log, text = logger(tmp_path, peak=1e13)
    log.step(metrics(1))
    log.close()
    line = text.getvalue().splitlines()[-1]
    for part in (
        "step  1/10", "loss 2.0000", "lr 1.00e-03", "grad norm 0.500", "tokens/s/GPU 1000", "frames/s 8.0", "MFU 10.0%",
        "data wait 0.100s", "memory 1.5GiB", "skipped 0", "left 0:00:",
    ):  # fmt: skip
        assert part in line


def test_the_log_says_how_mfu_is_counted_and_shows_none_where_the_peak_is_unknown(tmp_path):
    log, text = logger(tmp_path / "gpu", peak=989e12)
    log.close()
    assert "989 TFLOP/s" in text.getvalue() and "recomputation" in text.getvalue()
    log, text = logger(tmp_path / "cpu", peak=None)
    log.step(metrics(1))
    log.close()
    assert "MFU" not in text.getvalue()
    assert read_metrics(tmp_path / "cpu")[0][0]["mfu"] is None


def test_different_learning_rates_are_shown_by_part(tmp_path):
    log, text = logger(tmp_path)
    log.step(metrics(1, lr={"llm": 2e-5, "vision": 1e-6}))
    log.close()
    assert "lr llm=2.00e-05 vision=1.00e-06" in text.getvalue()


def test_lines_come_every_log_every_steps_with_rates_over_the_steps_between(tmp_path):
    log, text = logger(tmp_path, total=5, log_every=2)
    for step, seconds in enumerate([1.0, 3.0, 1.0, 1.0, 2.0], start=1):
        log.step(metrics(step, step_s=seconds))
    log.close()
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "tokens/s/GPU 250 " in lines[0] and "tokens/s/GPU 500 " in lines[1]
    assert len(read_metrics(tmp_path)[0]) == 5


def test_a_terminal_gets_a_bar_and_messages_above_it(tmp_path):
    log, text = logger(tmp_path, terminal=True)
    log.step(metrics(1))
    log.step(metrics(2))
    log.message("video broken.mp4 replaced [by the next one]")
    log.close()
    assert "2/10" in text.getvalue() and "grad norm" in text.getvalue()
    assert "video broken.mp4 replaced [by the next one]" in text.getvalue()


def test_a_narrow_terminal_keeps_each_number_beside_its_name(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=37)
    log, _ = logger(tmp_path, console=console)
    log.step(metrics(1))
    log.close()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()))
    assert any(re.search(r"loss [\d.]+", line) for line in lines)
    assert any(re.search(r"grad norm [\d.]+", line) for line in lines)
    assert any(re.search(r"data wait [\d.]+s", line) for line in lines)
    assert max(map(len, lines)) <= 37


def test_a_loss_reads_back_bit_for_bit_and_nan_is_valid_json(tmp_path):
    log, _ = logger(tmp_path)
    log.step(metrics(1, loss=1.0 / 3.0))
    log.step(metrics(2, loss=math.nan, grad_norm=math.inf, skipped=1))
    log.close()
    steps, _ = read_metrics(tmp_path)
    assert steps[0]["loss"] == 1.0 / 3.0
    assert steps[1]["loss"] is None and steps[1]["grad_norm"] is None and steps[1]["skipped"] == 1


def test_a_resume_drops_the_steps_after_the_checkpoint_and_a_line_cut_off_by_a_crash(tmp_path):
    write_run(tmp_path, 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    write_run(tmp_path, 4, 6, start=3)
    steps, _ = read_metrics(tmp_path)
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert summarize(tmp_path)["steps"] == 6 and summarize(tmp_path)["tokens"] == 6000


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_run(tmp_path, 1, 5, accuracy=0.5)
    # event files are named, and read, by the second of their creation
    time.sleep(1.1)
    write_run(tmp_path, 4, 6, start=3, accuracy=0.75)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("speed/tokens_per_s_per_gpu")[0].value == 1000
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy")] == [(6, 0.75)]


def test_a_new_run_in_an_old_folder_starts_afresh(tmp_path):
    write_run(tmp_path, 1, 5)
    write_run(tmp_path, 1, 2)
    assert [r["step"] for r in read_metrics(tmp_path)[0]] == [1, 2]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    write_run(tmp_path, 1, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*paths):
        raise OSError("crash before the replacement")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="crash"):
        truncate_after(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_ranks_write_nothing(tmp_path):
    log, text = logger(tmp_path / "run", is_writer=False)
    log.step(metrics(1))
    log.result(1, EVALUATION, {"accuracy": 1.0})
    log.message("hello")
    assert log.finish({}) == {}
    assert not (tmp_path / "run").exists() and text.getvalue() == ""


def test_the_summary_holds_totals_and_the_results_of_the_caller(tmp_path):
    summary = write_run(tmp_path, 1, 4, accuracy=0.9)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"], summary["frames"], summary["train_s"]) == (4, 4000, 16, 2.0)
    assert summary["tokens_per_s"] == 2000 and summary["eval_accuracy"] == 0.9 and summary["held_out_accuracy"] == 0.9
    assert summary["wall_s"] > 0
    assert summarize(tmp_path / "nothing here")["steps"] == 0


def test_a_run_ended_by_an_error_still_leaves_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"), closing(logger(tmp_path)[0]) as log:
        log.step(metrics(1))
        raise RuntimeError("out of luck")
    assert len(read_metrics(tmp_path)[0]) == 1
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_stages_combine_to_one_summary_and_one_picture(tmp_path):
    write_run(tmp_path / "one", 1, 3)
    write_run(tmp_path / "two", 1, 5, accuracy=0.95)
    summary = combine([tmp_path / "one", tmp_path / "two"], wall_s=12.5)
    assert (summary["steps"], summary["tokens"], summary["wall_s"]) == (8, 8000, 12.5)
    assert summary["held_out_accuracy"] == 0.95 and summary["chance"] == 0.125
    assert [s["steps"] for s in summary["stages"]] == [3, 5]
    text = io.StringIO()
    print_summary(summary, ["1 frame", "32 frames"], Console(file=text, width=100))
    assert "95.0 % (chance: 12.5 %)" in text.getvalue() and "32 frames" in text.getvalue()
    plot_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "loss.png", ["1 frame", "32 frames"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    plot_runs([tmp_path], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_the_running_mean_passes_over_a_step_without_a_loss():
    values = np.array([np.nan, 2.0, np.nan, 4.0, 6.0])
    np.testing.assert_allclose(running_mean(values, 3), [np.nan, 2.0, 2.0, 3.0, 5.0])


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


LOADING = {"decoded_frames": 4, "source_frames": 100, "engine_frames": 40, "read_s": 0.1, "decode_s": 2.0, "preprocess_s": 0.2}


def test_records_say_what_loading_took(tmp_path):
    log, text = logger(tmp_path, log_every=2)
    log.step(metrics(1, loading=LOADING | {"copy_s": 0.01}))
    log.step(metrics(2, loading=LOADING | {"copy_s": 0.03}))
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["source_frames_per_s"], first["decoded_frames_per_s"], first["engine_frames_per_s"]) == (200, 8, 80)
    assert (second["read_s"], second["decode_s"], second["copy_s"]) == (0.1, 2.0, 0.03)
    assert "source frames/s 200" in text.getvalue()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "time of the loading threads: reading files 4%, decoding 87%, scaling pictures 9%. Prepare the data"),
        ({"read_s": 9.0}, "Prepared shards are smaller"),
        ({"preprocess_s": 9.0}, "at the size that the model takes"),
    ],
)
def test_what_a_run_waits_for_is_told_once_with_the_setting_that_helps(tmp_path, changes, told):
    log, text = logger(tmp_path, total=14)
    for step in range(1, 15):
        log.step(metrics(step, loading=LOADING | {"copy_s": 0.0} | changes))
    log.close()
    lines = [line for line in text.getvalue().splitlines() if "waiting for data" in line]
    assert len(lines) == 1 and told in lines[0]


def test_copying_to_the_device_is_told_where_nothing_else_holds_a_run_up(tmp_path):
    log, text = logger(tmp_path, total=12)
    for step in range(1, 13):
        log.step(metrics(step, data_wait_s=0.001, loading=LOADING | {"copy_s": 0.05 * (step > 11)}))
    log.close()
    assert text.getvalue().count("copying to the device") == 1 and "waiting" not in text.getvalue()
