"""The quickstart: how many processes it starts on which machine, the picture of a sample, and the commands it ends with.

Its programs are replaced by one that records its arguments; everything that is checked of the commands is the real thing.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.synthetic import corpus, write_synthetic_set
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.evaluation.command import parser as evaluation_parser
from megatron_vila.plan.validate import validate
from megatron_vila.start_checks import check_start

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples/quickstart"


def program(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_quickstart(home, gpus, usable, *arguments):
    """A copy of the quickstart on a machine with so many GPUs, of which torch can use some: its output and Python's calls."""
    shutil.copytree(ROOT / "examples", home / "examples")
    (home / "bin").mkdir()
    stand_ins = {
        "nvidia-smi": "for i in $(seq 1 " + str(gpus) + '); do echo "GPU 0: an accelerator"; done',
        # One call a line: of torch, how many GPUs it can use; of everything else, that it was called.
        "python": f'case "$*" in *device_count*) echo {usable} ;; *sys.version_info*) ;; *) echo "$*" >> {home}/calls ;; esac',
    }
    for name, body in stand_ins.items():
        (home / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (home / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "VIRTUAL_ENV": str(home)}
    done = subprocess.run(
        ["bash", str(home / "examples/quickstart.sh"), *arguments], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [call.split() for call in (home / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("gpus", "usable", "processes", "said"),
    [
        (0, 0, 2, "two processes on the CPU"),
        (1, 1, 1, "one process on one GPU"),
        (2, 2, 2, "two processes on two GPUs"),
        (8, 8, 2, "two processes on two GPUs"),
        (8, 1, 1, "one process on one GPU"),
        (1, 0, 2, "this torch cannot use it"),
    ],
)
def test_the_quickstart_uses_the_gpus_that_are_there(tmp_path, gpus, usable, processes, said):
    output, calls = run_quickstart(tmp_path, gpus, usable, "--short", "train.seed=7")
    assert said in output
    runs = [call for call in calls if "megatron_vila.launch" in call]
    assert len(runs) == 4
    for call in runs:
        assert call[:4] == ["-m", "megatron_vila.launch", "--nproc-per-node", str(processes)]
        config = load_config(str(ROOT / call[4]), call[5:])
        assert validate(config, processes) == []
        assert config.parallel.ulysses == processes
        assert (config.train.steps, config.train.seed) == (4, 7)
    assert calls[-1][:2] == ["examples/quickstart/next_steps.py", "runs/quickstart-short"]
    (needle,) = (call[1:] for call in calls if call[0] == "tools/evaluate.py")
    asked = evaluation_parser().parse_args(needle)
    assert asked.model == "runs/quickstart-short/stage_4" and 32 in asked.frames


def test_the_quickstart_says_first_how_long_it_takes(tmp_path):
    output, _ = run_quickstart(tmp_path, 0, 0)
    assert output.splitlines()[0].startswith("This takes about ")


def test_a_contact_sheet_marks_the_needle_frame_and_no_other(tmp_path, monkeypatch, capsys):
    write_synthetic_set(tmp_path, [11], train=1, evaluation=0, seed=3)
    record = json.loads((tmp_path / "train_11.json").read_text())[0]
    tool = program(QUICKSTART / "contact_sheet.py")
    monkeypatch.setattr(sys, "argv", ["contact_sheet.py", str(tmp_path / "train_11.json"), str(tmp_path / "sheet.png")])
    tool.main()
    assert f"the answer stands in frame {record['needle_frame']}" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    mark, marked = ImageColor.getrgb(tool.MARK), []
    for number in range(11):
        x = tool.MARGIN + number % tool.COLUMNS * (tool.CELL + tool.GAP)
        y = tool.MARGIN + number // tool.COLUMNS * (tool.CELL + 20 + tool.GAP)
        found = sheet.getpixel((x - 3, y + tool.CELL // 2))
        if max(abs(a - b) for a, b in zip(found, mark, strict=True)) < 24:
            marked.append(number)
    assert marked == [record["needle_frame"]]


def test_a_contact_sheet_of_no_video_is_refused(tmp_path, monkeypatch, capsys):
    write_synthetic_set(tmp_path, [], train=1, evaluation=0, images=True)
    tool = program(QUICKSTART / "contact_sheet.py")
    for sample, message in ((0, "is not a video"), (1, "holds records 0 to 0")):
        arguments = [str(tmp_path / "train_image.json"), str(tmp_path / "sheet.png"), "--sample", str(sample)]
        monkeypatch.setattr(sys, "argv", ["contact_sheet.py", *arguments])
        with pytest.raises(SystemExit):
            tool.main()
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_the_commands_that_the_quickstart_ends_with_are_accepted(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/quickstart")
    write_synthetic_set(run / "data", [32], train=9, evaluation=1)
    train_tokenizer(corpus(), run / "data/tokenizer", 512)
    (run / "stage_4/checkpoints/step-00000060").mkdir(parents=True)
    (run / "stage_4/checkpoints/step-00000060/info.json").write_text("{}")
    tool = program(QUICKSTART / "next_steps.py")
    monkeypatch.setattr(sys, "argv", ["next_steps.py", str(run), "--processes", str(processes)])
    tool.main()
    shown = capsys.readouterr().out
    ask, train, export = (shlex.split(line) for line in shown.splitlines() if line.startswith("  ") and "python" in line)
    assert f"cd {ROOT}" in shown  # the commands are typed in another folder

    assert ask[1] == "examples/generate.py" and Path(ask[-1]).is_file()
    options = program(ROOT / "examples/generate.py").parser().parse_args(ask[2:])
    assert (options.model, options.video) == ("runs/quickstart/hf", [ask[-1]])

    assert train[:5] == [ask[0], "-m", "megatron_vila.launch", "--nproc-per-node", str(processes)]
    config = load_config(str(ROOT / train[5]), train[6:])
    assert check_start(config, processes, accelerator.machine()) == []
    records = JsonFiles(config.data.train)
    assert len(records) == tool.RECORDS and all(
        Path(medium.path).is_file() for index in range(len(records)) for medium in records.record(index).media
    )

    converter = program(ROOT / "tools/convert_checkpoint.py")
    assert export[1] == "tools/convert_checkpoint.py"
    assert str(converter._parser().parse_args(export[2:]).checkpoint) == config.train.output


def test_own_records_are_not_overwritten(tmp_path, monkeypatch):
    write_synthetic_set(tmp_path / "quickstart/data", [32], train=1, evaluation=0)
    (tmp_path / "my_data.json").write_text("my own")
    monkeypatch.setattr(sys, "argv", ["next_steps.py", str(tmp_path / "quickstart")])
    program(QUICKSTART / "next_steps.py").main()
    assert (tmp_path / "my_data.json").read_text() == "my own"
