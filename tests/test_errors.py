"""What a user can cure is told in a message, everything else keeps its traceback, wherever it comes out."""

import ast
import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vila import interrupts, launch, train
from megatron_vila.errors import UserError, entry_point
from megatron_vila.exit_codes import FAILED, INTERRUPTED, USER_ERROR
from tests.ranks import pool
from tests.training.command_run import command_on_rank
from tests.training.real_run import REPOSITORY, overrides

NOT_CURABLE = {
    # what another rank failed with, and what the machine is at the end of
    *("PeerError", "StallError", "LoaderError", "MachineError"),
    # what one part of the loader tells another, which goes another way then
    *("CardsMissingError", "ClosedError", "VideoEngineError"),
    # a fault of the package itself
    "SquaresError",
}


def test_every_error_of_the_package_is_one_that_a_user_can_cure_or_known_not_to_be():
    kinds = {}
    for path in (REPOSITORY / "megatron_vila").rglob("*.py"):
        for found in ast.walk(ast.parse(path.read_text())):
            if isinstance(found, ast.ClassDef) and found.name.endswith("Error"):
                kinds[found.name] = [base.id for base in found.bases if isinstance(base, ast.Name)]

    def is_curable(name):
        return name == "UserError" or any(map(is_curable, kinds.get(name, [])))

    assert {name for name in kinds if not is_curable(name)} == NOT_CURABLE


def plant(*_, **__):
    first, second = (1, 2, 3)
    return first, second


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENTRY_POINTS = {
    "explain": ("megatron_vila.explain.__main__.validate", ["tiny"]),
    "data": ("megatron_vila.data.__main__.check", ["check", "samples.json"]),
    "convert": ("megatron_vila.convert.importer.import_checkpoint", ["import", "SOURCE", "OUT"]),
    "dry run": ("megatron_vila.dry_run.describe_start", ["tiny", "--dry-run"]),
    "launch": ("megatron_vila.train.parse", ["--nproc-per-node", "1", "tiny"]),
}


def _entry(name):
    if name in ("explain", "data"):
        return importlib.import_module(f"megatron_vila.{name}.__main__").main
    return {"convert": lambda: _tool("convert_checkpoint"), "dry run": lambda: train, "launch": lambda: launch}[name]().main


@pytest.fixture
def levels():
    """Commands choose what is logged, for their own process."""
    names = ("megatron_vila", "megatron_vila.data")
    before = {name: logging.getLogger(name).level for name in names}
    yield
    logging.root.handlers.clear()
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_fault_of_the_program_keeps_its_traceback_at_every_entry_point(videos, tmp_path, monkeypatch, capsys, name):
    target, arguments = ENTRY_POINTS[name]
    main = _entry(name)
    monkeypatch.chdir(tmp_path)
    Path("samples.json").write_text("[]")
    if name == "dry run":
        arguments = [arguments[0], *overrides(videos, tmp_path), *arguments[1:]]
    monkeypatch.setattr(target, plant)
    with monkeypatch.context() as patch:
        if name == "launch":
            patch.setattr(launch, "hold_back_signals", lambda: None)
        assert main(arguments) == FAILED
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1 and "first, second = (1, 2, 3)" in said and "megatron_vila: " not in said


def _planted_in_the_trainer(rank, world, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_vila.training.trainer.Trainer.__init__", plant)
        return command_on_rank(rank, world, arguments)


def test_a_fault_of_the_program_in_the_making_of_the_trainer_keeps_its_traceback(videos, tmp_path):
    ((status, _, said),) = pool.run(1, _planted_in_the_trainer, 1, ["tiny", *overrides(videos, tmp_path)])
    assert status == FAILED
    assert said.count("Traceback") == 1 and "first, second = (1, 2, 3)" in said


def test_an_entry_point_tells_an_error_by_its_kind(capsys):
    @entry_point
    def main(error):
        raise error

    assert main(UserError("no such file; name another")) == USER_ERROR
    assert capsys.readouterr().err == "megatron_vila: no such file; name another\n"
    assert main(KeyboardInterrupt()) == INTERRUPTED and capsys.readouterr().err == "megatron_vila: interrupted\n"
    assert main(ValueError("of a library")) == FAILED and "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(SystemExit(3))


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "megatron_vila.launch"],
        ["-m", "megatron_vila.train"],
        ["-m", "megatron_vila.data"],
        ["tools/view_data.py"],
        ["tools/prepare_data.py"],
    ],
    ids=lambda command: command[-1],
)
def test_ctrl_c_while_a_command_still_imports_ends_it_with_one_line(tmp_path, command):
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "megatron_vila: interrupted\n")


def test_another_program_that_imports_the_package_keeps_its_own_ctrl_c():
    program = "import signal, megatron_vila; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", program, "megatron_vila"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout == "True\n"


def test_ctrl_c_is_raised_within_a_command_and_ends_it_at_once_when_that_is_over():
    before, seen = signal.getsignal(signal.SIGINT), []

    @entry_point
    def main():
        seen.append(signal.getsignal(signal.SIGINT))
        return 0

    try:
        interrupts.end_at_once()
        ends = signal.getsignal(signal.SIGINT)
        main()
        assert seen == [signal.default_int_handler] and signal.getsignal(signal.SIGINT) is ends
    finally:
        signal.signal(signal.SIGINT, before)
