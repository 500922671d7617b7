"""The programs of examples/ that use an exported model: they answer, and the quickstart's notes its answers."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.data.material import conversation, write_video
from tests.hf.megatron_side import config, export
from tests.ranks import pool

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pool.run(1, export, config(folder), folder, ("vila",))
    write_video(folder / "clip.mp4", 9)
    record = {"video": "clip.mp4", "conversations": conversation("<image>\nWhat is shown?", "A cat.")}
    (folder / "eval.json").write_text(json.dumps([record] * 3))
    return folder


def run(script, monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / script)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    program.main()


def test_generate_names_files_that_are_not_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("generate.py", monkeypatch, tmp_path, "What is shown?", "--video", "/nowhere.mp4")
    assert "/nowhere.mp4: no such file" in capsys.readouterr().err


def test_generate_answers_a_question_about_videos_and_pictures(folder, monkeypatch, capsys):
    options = ("--video", folder / "clip.mp4", "--frames", "2", "--max-new-tokens", "4")
    run("generate.py", monkeypatch, folder / "vila", "What is shown?", *options)
    assert capsys.readouterr().out.strip()


def test_answers_are_shown_beside_the_truth_and_long_ones_cut():
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "quickstart/answer_held_out.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    shown = io.StringIO()
    answers = ["red", "a [bold] word", "long " * 40]
    program.print_answers(["Which?"] * 3, ["red", "blue", "long"], answers, Console(file=shown, width=120))
    rows = [line.split() for line in shown.getvalue().splitlines()]
    assert rows[0] == ["question", "truth", "answer"]
    assert rows[1] == ["Which?", "red", "red", "right"]
    assert rows[2] == ["Which?", "blue", "a", "[bold]", "word", "wrong"]
    assert len(rows) == 4 and rows[3][:3] == ["Which?", "long", "long"] and rows[3][-1] == "wrong"


def test_the_quickstart_notes_its_answers_beside_the_other_results(folder, monkeypatch, capsys):
    summary = folder / "summary.json"
    summary.write_text(json.dumps({"held_out_accuracy": 0.5}))
    options = ("--summary", summary, "--questions", "2")
    run("quickstart/answer_held_out.py", monkeypatch, folder / "vila", folder / "eval.json", *options)
    noted = json.loads(summary.read_text())
    assert noted["held_out_accuracy"] == 0.5
    result = noted["transformers"]
    assert (result["question"], result["expected"]) == ("What is shown?", "A cat.")
    assert (result["asked"], result["right"]) == (2, 0)
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("What is shown?")]
    assert len(rows) == 2 and all("A cat." in row and row.rstrip().endswith("wrong") for row in rows)
    assert "0 of 2 held-out questions" in shown
