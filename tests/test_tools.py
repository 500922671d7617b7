"""The programs of tools/ and examples/ as they are started: from any folder, without installation; installation with a bar."""

import ast
import contextlib
import os
import pty
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TOOLS = sorted(ROOT.glob("tools/*.py"))
PROGRAMS = [*TOOLS, *sorted(ROOT.glob("examples/*.py")), *sorted(ROOT.glob("examples/quickstart/*.py"))]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with a megatron_vila that must not be taken."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "megatron_vila").mkdir()
    (folder / "megatron_vila/__init__.py").write_text("raise ImportError('not this checkout')\n")
    return folder


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_program_starts_from_any_folder_without_installation(program, elsewhere):
    # -S leaves out what an editable installation puts on the path; the packages it needs are named instead.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{elsewhere}:{sysconfig.get_path('purelib')}"}
    done = subprocess.run(
        [sys.executable, "-S", str(program), "--help"], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_program_takes_the_package_from_its_own_checkout(program):
    """What is imported late is not met by --help."""
    depth = len(program.relative_to(ROOT).parts) - 1
    line = f"sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))  # this checkout, installed or not\n"
    text = program.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if "megatron_vila" in ast.unparse(node).split(".")[0]]
    imports = [node for node in imports if isinstance(node, ast.Import | ast.ImportFrom)]
    if imports:
        assert line in text
        assert min(node.lineno for node in imports) > text[: text.index(line)].count("\n")


def test_a_folder_that_cannot_be_written_is_told_without_a_trace(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    program = ROOT / "tools/make_synthetic_videos.py"
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "file/data"), "--train", "1", "--eval", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(program), run_name="__main__")
    assert "Not a directory" in capsys.readouterr().err


@pytest.fixture
def pip(tmp_path):
    """Replaces pip by a program that says what pip says; the value starts tools/environment.py with it. Before each next line,
    and at its end, the program waits for as many lines in ``tmp_path / "shown"``."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").write_text("")
    (tmp_path / "pins.txt").write_text("# pins\nnumpy==1.0\nrich==2.0\n")

    def start(said, status, stdout):
        (tmp_path / "shown").write_text("")
        (tmp_path / "pip/__main__.py").write_text(
            f"import sys, time\nend = time.monotonic() + 100\nfor number, line in enumerate({said!r}, 1):\n"
            f"    print(line, flush=True)\n    while len(open({str(tmp_path / 'shown')!r}).read()) < number:\n"
            f"        time.sleep(0.02)\n        if time.monotonic() > end: sys.exit('nothing was shown')\nsys.exit({status})\n"
        )
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools/environment.py"), "install", str(tmp_path / "pins.txt"), "test"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}, stdout=stdout,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def test_an_installation_shows_how_far_it_is_on_a_terminal(pip, tmp_path):
    master, terminal = pty.openpty()
    said = ["Collecting numpy", "  Downloading numpy-1.0-cp311.whl (12 MB)", "Installing collected packages: rich, other"]
    job = pip(said, 0, terminal)
    os.close(terminal)
    shown = ""

    def read_until(pattern):
        """Read what the terminal shows until ``pattern`` is there, or until the program has ended."""
        nonlocal shown
        with contextlib.suppress(OSError):  # the other end is closed
            while not re.search(pattern, shown):
                shown += os.read(master, 100_000).decode()
        assert re.search(pattern, shown), shown

    # The program says the next line once this one is shown.
    (tmp_path / "shown").write_text("1")
    read_until(r"\r\[#+\.+\] 1 packages found: numpy, 12 MB \(\d+ s\)")
    (tmp_path / "shown").write_text("12")
    # rich is there, the other one is not
    read_until(r"\r\[#{12}\.{12}\] 1 of 2 packages installed \(\d+ s\)")
    (tmp_path / "shown").write_text("123")
    read_until(r"\r\x1b\[K$")
    assert job.wait() == 0, job.stderr.read()
    os.close(master)


def test_an_installation_that_fails_shows_what_pip_said(pip, tmp_path):
    job = pip(["Collecting numpy", "ERROR: no such version"], 1, subprocess.PIPE)
    (tmp_path / "shown").write_text("12")
    shown, told = job.communicate()
    assert (job.returncode, shown) == (1, "")
    assert "ERROR: no such version" in told


def test_requirements_that_are_not_met_are_named(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/environment.py").write_text((ROOT / "tools/environment.py").read_text())
    (tmp_path / "setup.py").write_text(
        "from setuptools import setup\nREQUIRED = ['torch>=2', 'rich>=9999', 'none-such>=1', 'other; python_version < \"3\"']\n"
        "setup(name='x', install_requires=REQUIRED, extras_require={'test': ['pytest>=1'], 'gpu': ['no-gpu-package==1']})\n"
    )

    def missing(*extras):
        command = [sys.executable, str(tmp_path / "tools/environment.py"), "missing", *extras]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    assert missing("test") == (1, ["rich>=9999", "none-such>=1"])
    assert missing("gpu") == (1, ["rich>=9999", "none-such>=1", "no-gpu-package==1"])
    text = (tmp_path / "setup.py").read_text().replace("'rich>=9999', 'none-such>=1', ", "")
    (tmp_path / "setup.py").write_text(text)
    assert missing("test") == (0, [])


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-py312.txt"])
def test_what_the_gpu_extra_brings_is_pinned(file):
    _, extras = runpy.run_path(str(ROOT / "tools/environment.py"))["requirements"]()
    extra = [Requirement(text) for text in extras["gpu"]]
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if not line.startswith("#"))
    for requirement in extra:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), requirement
    # as pip resolved them: what they require in turn, but for torch and its CUDA libraries
    brought = {"apache-tvm-ffi", "torch-c-dlpack-ext", "nvidia-cutlass-dsl", "cuda-bindings", "cuda-pathfinder"}
    brought |= {f"nvidia-cutlass-dsl-libs-{part}" for part in ("base", "core", "cu12", "cu13")}
    assert brought <= set(pins)
    assert len({pins[name] for name in brought if name.startswith("nvidia-cutlass")}) == 1
