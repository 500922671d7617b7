"""The shell scripts and packaging files: they parse, what they start is valid, and what they name exists.

The launcher is replaced by a program that records its arguments, ``srun`` by one that runs its command; everything else runs.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_vila.config.load import load_config
from megatron_vila.data.synthetic import corpus
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.launch import main as launcher
from megatron_vila.plan.validate import validate

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted(ROOT.glob("examples/*.sh")), ROOT / "tests/run.sh", ROOT / ".ci/check", ROOT / ".ci/run"]
PACKAGED = (".py", ".yaml", ".typed", ".jinja", ".css", ".js")
MODELS = ["longvila-1.5b", "longvila-7b", "llama3-longvila-8b"]
DATA = {"DATA": "/data/a.json,/data/b.json", "TOKENIZER": "/models/tokenizer"}


@pytest.fixture
def start(tmp_path):
    """Runs a script with stand-ins for the cluster's programs; returns the exit status, the output and the launcher's calls."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=31 exec "$@"',
        "scontrol": f'[[ $1 == requeue ]] && echo "$2" >> {tmp_path}/requeued || printf "node-07\\nnode-08\\n"',
        "nvidia-smi": "exit 9",
        "python3": (
            f'if [[ $1 == -m && $2 == megatron_vila.launch ]]; then {{ printf "%s\\n" "$@"; echo; }} >> {tmp_path}/calls\n'
            f'exit "${{LAUNCH_STATUS:-0}}"; fi; exec {sys.executable} "$@"'
        ),
    }
    for name, body in stand_ins.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_dir / name).chmod(0o755)

    def run(script, *arguments, **environment):
        system = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", str(ROOT / script), *arguments],
            env=system | environment, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        calls = tmp_path / "calls"
        recorded = calls.read_text().strip().split("\n\n") if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, [call.split("\n") for call in recorded]

    return run


def started_config(call):
    """The configuration that a call of the launcher would train, its number of ranks and the launcher's options."""
    assert call[:2] == ["-m", "megatron_vila.launch"]
    options = dict(zip(call[2:12:2], call[3:12:2], strict=True))
    config = load_config(call[12], [a for a in call[13:] if not a.startswith("--")])
    return config, int(options["--nnodes"]) * int(options["--nproc-per-node"]), options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if os.access(s, os.X_OK)], ids=lambda p: p.name)
def test_every_program_stops_at_the_first_error(script):
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE)


def test_only_the_sourced_scripts_are_not_programs():
    assert {s.name for s in SCRIPTS if not os.access(s, os.X_OK)} == {"common.sh", "launch.sh"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_each_stage_of_each_model_starts_a_valid_run(start, model, stage):
    context = {"CONTEXT": "131072"} if (model, stage) == ("longvila-1.5b", 4) else {}
    status, output, calls = start(f"examples/train_stage{stage}.sh", MODEL=model, NNODES="4", **DATA, **context)
    assert status == 0, output
    config, ranks, _ = started_config(calls[0])
    assert ranks == 32
    assert validate(config, ranks) == []
    assert config.data.train == ["/data/a.json", "/data/b.json"]
    assert config.optim.projector.trainable == (stage != 4)


@pytest.mark.parametrize(
    ("context", "nodes", "ring"), [(131072, 4, 4), (262144, 4, 4), (524288, 4, 8), (1048576, 8, 16)]
)
def test_each_context_of_stage_4_sets_its_rotary_base(start, context, nodes, ring):
    status, output, calls = start(
        "examples/train_stage4.sh", f"parallel.ring={ring}", CONTEXT=str(context), NNODES=str(nodes), **DATA
    )
    assert status == 0, output
    config, ranks, _ = started_config(calls[0])
    assert validate(config, ranks) == []
    assert config.train.seq_length == config.model.llm.max_positions == context
    assert config.model.llm.rope_theta > 1.5e7


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """What a stage script asks for: a text sample and a tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    turns = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]
    (folder / "train.json").write_text(json.dumps([{"id": "text", "conversations": turns}]))
    train_tokenizer(corpus(), folder / "tokenizer", 400)
    return {"DATA": str(folder / "train.json"), "TOKENIZER": str(folder / "tokenizer")}


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_a_dry_run_of_each_stage_checks_for_the_world_that_the_script_would_start(
    start, small_data, capsys, tmp_path, stage, monkeypatch
):
    """The arguments are the script's, the launcher runs here: a dry run starts nothing else."""
    monkeypatch.chdir(tmp_path)
    # A small vocabulary, as the small tokenizer has.
    settings = ["--dry-run", "--gpu", "h200", "model.llm.vocab_size=512", "checkpoint.load="]
    _, output, calls = start(f"examples/train_stage{stage}.sh", *settings, NNODES="4", GPUS_PER_NODE="8", **small_data)
    assert launcher(calls[0][2:]) == 0, output
    said = capsys.readouterr().out
    assert "data.train: 1 samples in" in said and "[[Red." in said
    assert "dry run for 32 ranks: " in said
    assert launcher([*calls[0][2:], "--world-size", "31"]) == 2
    assert "world size 31 is not a multiple of" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_with_a_mistake_ends_a_stage_script_with_2_and_one_message(tmp_path):
    """The whole of it: shell, launcher and checks, in one process."""
    environment = {"DATA": str(tmp_path / "nowhere.json"), "TOKENIZER": str(tmp_path), "NNODES": "4"}
    python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", str(ROOT / "examples/train_stage5.sh"), "--dry-run", "train.stepz=3"], capture_output=True, text=True,
        env={"PATH": f"{python}:{os.environ['PATH']}", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("megatron_vila: command line: unknown key 'train.stepz'; did you mean 'train.steps'?")
    assert "Traceback" not in done.stderr and "torch.distributed" not in done.stderr


def test_stage_4_refuses_a_context_without_a_known_base(start):
    status, output, calls = start("examples/train_stage4.sh", CONTEXT="1000", **DATA)
    assert status == 1 and calls == []
    assert "use one of 131072 262144 524288 1048576" in output


@pytest.mark.parametrize("missing", sorted(DATA))
def test_a_stage_without_data_or_tokenizer_says_what_to_set(start, missing):
    status, output, calls = start("examples/train_stage5.sh", **{k: v for k, v in DATA.items() if k != missing})
    assert status != 0 and calls == []
    assert f"set {missing} to" in output


def test_the_slurm_job_runs_256_ranks_that_find_each_other(start):
    status, output, calls = start(
        "examples/slurm_256gpu.sh",
        "train.steps=7",
        SLURM_NNODES="32",
        SLURM_JOB_ID="123",
        SLURM_JOB_NODELIST="node-[07-38]",
    )
    assert status == 0, output
    config, ranks, options = started_config(calls[0])
    assert ranks == 256 and config.train.steps == 7
    assert options["--master-addr"] == "node-07" and options["--node-rank"] == "31"
    assert validate(config, ranks) == []
    nodes = re.search(r"#SBATCH --nodes=(\d+)", (ROOT / "examples/slurm_256gpu.sh").read_text())
    assert int(nodes[1]) * 8 == 256


@pytest.mark.parametrize(("status", "again"), [(0, False), (75, True), (143, True), (1, False), (2, False)])
def test_the_slurm_job_queues_itself_again_when_it_was_stopped_and_only_then(start, tmp_path, status, again):
    job = {"SLURM_NNODES": "32", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[07-38]"}
    ended, output, _ = start("examples/slurm_256gpu.sh", LAUNCH_STATUS=str(status), **job)
    assert ended == status, output
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() == "123\n") if again else not requeued.exists()


@pytest.mark.parametrize("setting", ["checkpoint.resume=false", "checkpoint.resume=no", "checkpoint.save=false"])
def test_the_slurm_job_refuses_settings_with_which_it_would_begin_anew_each_time(start, setting):
    status, output, calls = start("examples/slurm_256gpu.sh", "checkpoint.save_every=5", "checkpoint.resume=True", setting)
    assert status == 2 and not calls
    assert f"{setting} cannot be used in a job that queues itself again" in output and "another OUTPUT" in output


def test_the_quickstart_stages_are_valid_and_grow():
    configs = [load_config(str(ROOT / f"examples/quickstart/stage_{n}.yaml")) for n in (1, 2, 3, 4)]
    assert all(validate(c, 2) == [] for c in configs)
    assert [c.data.num_frames for c in configs] == [1, 4, 16, 32]
    assert all(c.parallel.ulysses == 2 and c.model == configs[0].model for c in configs)


def test_installed_packages_keep_their_version_and_missing_ones_are_pinned(tmp_path):
    import numpy

    pins = tmp_path / "pins.txt"
    pins.write_text("# a comment\nnumpy==0.0.1\nnot-installed-anywhere==1.2.3\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/environment.py"), "pins", str(pins)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [f"numpy=={numpy.__version__}", "not-installed-anywhere==1.2.3"]


def set_up(home, **environment):
    """Sources a copy of common.sh in ``home``: in the environments of these tests installations are recorded, not carried out."""
    (home / "examples").mkdir(parents=True, exist_ok=True)
    (home / "tools").mkdir(exist_ok=True)
    for name in ("examples/common.sh", "tools/environment.py", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, home / name)
    for name in ("constraints.txt", "constraints-py312.txt"):
        shutil.copy(ROOT / name, home / name)
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source {home}/examples/common.sh; echo "python=$PYTHON"; command -v python; '
         'echo "path=${PYTHONPATH:-}"'],
        env={"PATH": os.environ["PATH"], "HOME": str(home)} | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def recording_environment(folder, home, pip_status=0, complete=False):
    """A virtual environment whose Python notes what is to be installed and otherwise is this one. ``complete``: lacks nothing."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin/python"
    answers = {
        "-m pip --version": ":",
        "environment.py missing": f"exit {0 if complete else 1}",
        "environment.py install": f'echo "$*" >> {home}/pip; exit {pip_status}',
        "environment.py check": ":",
        "sys.prefix": f"echo {folder}",
    }
    cases = "".join(f'*"{part}"*) {answer} ;;\n' for part, answer in answers.items())
    program.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{cases}*) exec {sys.executable} "$@" ;;\nesac\n')
    program.chmod(0o755)
    return {"VIRTUAL_ENV": str(folder), "WITH_GPU": "0"}


def test_the_active_environment_is_used_and_installed_into_once(tmp_path):
    active = recording_environment(tmp_path / "env", tmp_path)
    first, second = set_up(tmp_path, **active), set_up(tmp_path, **active)
    assert first.returncode == second.returncode == 0, first.stderr
    assert f"python={tmp_path}/env/bin/python\n{tmp_path}/env/bin/python" in first.stdout
    assert "installing" in first.stdout and "installing" not in second.stdout
    assert len((tmp_path / "pip").read_text().splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


def test_into_an_environment_that_lacks_nothing_nothing_is_installed(tmp_path):
    active = recording_environment(tmp_path / "env", tmp_path, complete=True)
    done = set_up(tmp_path, PYTHONPATH="/somewhere", **active)
    assert done.returncode == 0, done.stderr
    assert f"path={tmp_path}:/somewhere\n" in done.stdout
    assert "installing" not in done.stdout and not (tmp_path / "pip").exists()


def test_changed_requirements_are_installed_again(tmp_path):
    active = recording_environment(tmp_path / "env", tmp_path)
    set_up(tmp_path, **active)
    mark = tmp_path / "env/.megatron_vila-installed"
    mark.write_text(mark.read_text().replace(" ", " 1", 1))
    assert "installing" in set_up(tmp_path, **active).stdout


def test_an_installation_that_fails_leaves_no_mark_and_says_what_to_do(tmp_path):
    active = recording_environment(tmp_path / "env", tmp_path, pip_status=1)
    done = set_up(tmp_path, **active)
    assert done.returncode == 1
    assert "deactivate the environment" in done.stderr
    assert not (tmp_path / "env/.megatron_vila-installed").exists()


def test_conda_is_used_unless_it_is_the_base_environment(tmp_path):
    active = recording_environment(tmp_path / "env", tmp_path)
    active["CONDA_PREFIX"] = active.pop("VIRTUAL_ENV")
    done = set_up(tmp_path, CONDA_DEFAULT_ENV="vila", **active)
    assert f"python={tmp_path}/env/bin/python" in done.stdout, done.stderr


def test_a_container_with_its_own_torch_is_used(tmp_path):
    container = recording_environment(tmp_path / "usr", tmp_path)
    del container["VIRTUAL_ENV"]
    (tmp_path / "usr/bin/python3").symlink_to("python")
    path = f"{tmp_path}/usr/bin:{os.environ['PATH']}"
    done = set_up(tmp_path, PATH=path, NVIDIA_PYTORCH_VERSION="26.06", **container)
    assert f"python={tmp_path}/usr/bin/python3" in done.stdout, done.stderr


def test_a_python_that_is_too_old_is_refused_with_the_cure(tmp_path):
    (tmp_path / "env/bin").mkdir(parents=True)
    python = tmp_path / "env/bin/python"
    python.write_text('#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.2" || exit 1\n')
    python.chmod(0o755)
    done = set_up(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"), WITH_GPU="0")
    assert done.returncode == 1
    assert "Python 3.9.2, Python 3.11 or later is needed" in done.stderr


def declared_requirements():
    tree = ast.parse((ROOT / "setup.py").read_text())
    value = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "REQUIRED")
    return [Requirement(text) for text in ast.literal_eval(value)]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    for name in ("constraints.txt", "constraints-py312.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        pins = dict(line.split("==") for line in lines)
        assert list(pins) == sorted(pins)
        for requirement in declared_requirements():
            if requirement.marker is None or requirement.marker.evaluate(
                {"python_version": "3.12" if "312" in name else "3.11", "sys_platform": "linux"}
            ):
                assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (name, requirement)


def test_what_the_package_imports_is_what_setup_py_requires():
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "megatron": "megatron-core"}
    imported = set()
    for path in ROOT.glob("megatron_vila/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"megatron_vila"}
    declared = {canonicalize_name(r.name) for r in declared_requirements()}
    indirect = {"triton", "einops"}  # imported by megatron-core on our behalf
    optional = {"accelerate", "flash_attn", "quack", "ray", "fsspec", "pyarrow", "triton"}
    assert {distributions.get(name, name) for name in third_party - optional} == declared - indirect


def test_a_built_package_is_the_package_with_its_presets_and_types_and_nothing_else(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("megatron_vila", "benchmarks", "tools", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    ours = {p.relative_to(ROOT) for p in (ROOT / "megatron_vila").rglob("*") if p.suffix in PACKAGED}
    assert len([path for path in ours if path.suffix == ".yaml"]) > 10
    assert {p.relative_to(tmp_path / "built") for p in (tmp_path / "built").rglob("*") if p.is_file()} == ours


def test_every_file_that_the_readme_runs_exists():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = "\n".join(blocks)
    assert "bash examples/quickstart.sh" in commands and "bash tests/run.sh" in commands
    for path in re.findall(r"(?:bash|python) ((?:[\w.]+/)+[\w.]+\.(?:sh|py))", commands):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m (megatron_vila[\w.]*)", commands):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module


def test_every_seeded_fault_still_finds_its_place():
    from tools.faults import FAULTS

    places = {fault.name: (ROOT / fault.file).read_text().count(fault.old) for fault in FAULTS}
    assert len(places) == len(FAULTS)
    assert {name: count for name, count in places.items() if count != 1} == {}
