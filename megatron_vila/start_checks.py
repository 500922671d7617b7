"""What is looked at before a run starts: the numbers of its configuration (``plan/validate.py``), and after them the files that
it names and the machine at hand. Nothing is made. Torch is imported where there is a GPU to ask, or host memory to count.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable
from os.path import isdir, isfile  # unlike pathlib's, they say no to a name that is too long for the file system
from pathlib import Path

from megatron_vila.config.schema import Config, DataConfig
from megatron_vila.config.text_rules import NO_TEMPLATE
from megatron_vila.plan.bounds import value_of
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.hardware import UNNAMED, Machine, machine_of
from megatron_vila.plan.memory import ranks_of_a_node, state_on_host
from megatron_vila.plan.validate import (
    blend_problems,
    number_problems,
    number_warnings,
    refuse,
    shape_problems,
    value_problems,
)

MARKS_OF_SHARDS = (".nv-meta", "wids-meta.json")
"""What a folder with shards holds: Energon's index, or that of VILA."""

_OF_SAMPLES = ("data.", "model.", "train.seq_length")
"""How the keys begin that decide how samples are read and how many tokens they become."""

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""Without one of these there is no GPU that torch could find (the second: Windows' subsystem for Linux)."""


def check_start(config: Config, world_size: int, machine: Machine) -> list[str]:
    """Check all of ``config`` for ``world_size`` ranks on ``machine``; return warnings.

    Raises ``ConfigError`` that lists all problems of numbers, files and (of the machine at hand) host memory at once.
    """
    problems = number_problems(config, world_size)
    if machine.is_here and not any(value_problems(config)):
        problems += _host_problems(config, world_size, machine)
    refuse([*problems, *file_problems(config)])
    warnings = number_warnings(config, world_size, machine)
    if config.train.eval_every and not config.data.eval:
        warnings.append(f"train.eval_every={config.train.eval_every}, but data.eval is empty: nothing is evaluated")
    return warnings


def check_data(config: Config) -> None:
    """Check the settings by which samples are read as ``check_start`` checks them; data.train and data.tokenizer may be empty.

    Raises ``ConfigError`` that lists all problems at once.
    """
    problems = [p for p in value_problems(config) if p.startswith(_OF_SAMPLES)]
    if not problems:
        problems += [p for p in shape_problems(config) if p.startswith(_OF_SAMPLES)]
    problems += [*blend_problems(config), *data_file_problems(config.data)]
    if config.data.tokenizer:
        problems += tokenizer_problems(config.data.tokenizer, config.data.template)
    refuse(problems)


def planned_machine(gpu: str | None) -> Machine:
    """What ``--gpu`` names; without it this machine where it has a GPU, else one of 80 GB. Raises ``ConfigError``."""
    if gpu is not None:
        return machine_of(gpu)
    if any(map(os.path.exists, _GPU_DEVICES)):
        from megatron_vila import accelerator

        here = accelerator.machine()
        if here.gpu_bytes:
            return here
    return UNNAMED


def file_problems(config: Config) -> Iterable[str]:
    """Every file or folder of ``config`` that is missing, closed or of another kind, with the setting and the cure."""
    data = config.data
    yield from _home_problems(config)
    if not data.train:
        yield "data.train is empty: there is nothing to train on; set data.train=[samples.json] (docs/configuration.md)"
    yield from data_file_problems(data)
    yield from tokenizer_problems(data.tokenizer, data.template)
    load = config.checkpoint.load
    if load and not isdir(load):
        yield f"checkpoint.load='{load}' is not a folder; name a run's folder or the folder of one of its steps"
    elif load and not (isfile(Path(load) / "info.json") or any(Path(load).glob("checkpoints/step-*/info.json"))):
        yield (
            f"checkpoint.load='{load}' holds no finished checkpoint; give the folder of a step (step-...) or of a run that saved "
            "one (tools/convert_checkpoint.py import makes one of a Hugging Face folder)"
        )
    yield from _output_problems(config.train.output)


def data_file_problems(data: DataConfig) -> Iterable[str]:
    """Those of ``file_problems`` that concern the files of samples and the folder of their media."""
    for name in ("train", "eval"):
        for path in getattr(data, name):
            # What is remote is looked at when it is opened.
            if "://" not in path and (problem := _unreadable(path)):
                yield f"data.{name} names '{path}', {problem}; paths are relative to {Path.cwd()}"
    if data.media_dir and not isdir(data.media_dir):
        yield f"data.media_dir='{data.media_dir}' is not a folder; name the folder that the samples' paths start from"


def _home_problems(config: Config) -> Iterable[str]:
    """A shell does not replace ``~`` behind ``key=``, and neither do we: a folder of that name would be made."""
    for name in ("data.train", "data.eval", "data.media_dir", "data.tokenizer", "checkpoint.load", "train.output"):
        value = value_of(config, name)
        for path in value if isinstance(value, list) else [value]:
            if path.split("/")[0] == "~":
                yield f"{name} names '{path}', and ~ does not stand for a folder here; write $HOME/... or the whole path"


def _output_problems(folder: str) -> Iterable[str]:
    if not folder.strip():
        yield "train.output is empty; name the folder that checkpoints, metrics and plots go to"
        return
    output = Path(folder)
    try:
        existing = next(p for p in (output, *output.absolute().parents) if p.exists() or p.is_symlink())
    except OSError as error:
        yield f"train.output='{folder}' cannot be made: {error.strerror}; choose another folder"
        return
    if not existing.is_dir():
        what = "is a file" if existing.exists() else "is a link to what is not there"
        yield f"train.output='{output}' cannot be made: '{existing}' {what}; choose another folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"train.output='{output}' cannot be written: no permission in '{existing}'; choose another folder"
    checkpoints = output / "checkpoints"
    if os.path.lexists(checkpoints) and not isdir(checkpoints):
        yield f"train.output='{output}' takes no checkpoint: '{checkpoints}' is not a folder; remove it or choose another folder"
    elif isdir(checkpoints) and not os.access(checkpoints, os.W_OK | os.X_OK):
        yield f"train.output='{output}' takes no checkpoint: no permission in '{checkpoints}'; choose another folder"


def tokenizer_problems(folder: str, template: str) -> Iterable[str]:
    """Why ``folder`` cannot be used as data.tokenizer beside data.template; nothing is loaded."""
    path = Path(folder)
    if problem := tokenizer_folder_problem(folder):
        yield problem
    elif not template and not (path / "chat_template.jinja").is_file() and '"chat_template"' not in (
        (path / "tokenizer_config.json").read_text(encoding="utf-8", errors="replace")
    ):
        yield f"data.tokenizer='{folder}' {NO_TEMPLATE}"


def tokenizer_folder_problem(folder: str) -> str:
    """Why there is no tokenizer in ``folder``; empty if there may be one."""
    if not folder:
        return "data.tokenizer is empty; set it to the folder of a Hugging Face tokenizer with a chat template"
    if isfile(Path(folder) / "tokenizer_config.json"):
        return ""
    found = "has no tokenizer_config.json" if isdir(folder) else "is not a folder"
    return f"data.tokenizer='{folder}' {found}; name the folder of a Hugging Face tokenizer (save_pretrained writes one)"


def _unreadable(path: str) -> str:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return "which does not exist"
    except OSError as error:
        return f"which cannot be looked at ({error.strerror})"
    except ValueError as error:  # a zero byte, or a sign that no name of a file holds
        return f"which no file can be called ({error})"
    if stat.S_ISDIR(found.st_mode):
        if any(os.path.exists(os.path.join(path, mark)) for mark in MARKS_OF_SHARDS) or any(Path(path).rglob("*.tar")):
            return ""
        convert = f"python tools/prepare_data.py {shlex.quote(path)} --out FOLDER"
        return f"a folder without {' or '.join(MARKS_OF_SHARDS)}: `{convert}` makes shards of what it holds"
    if not stat.S_ISREG(found.st_mode):
        return "which is not a file"
    if not os.access(path, os.R_OK):
        return "which cannot be read (no permission)"
    return "which is empty" if found.st_size == 0 else ""


def _host_problems(config: Config, world_size: int, machine: Machine) -> Iterable[str]:
    from megatron_vila.host_memory import free_bytes

    ranks, available = ranks_of_a_node(config, world_size), free_bytes() / GIB
    kept = config.memory.offload_gib
    state = state_on_host(config, world_size, machine.gpu_bytes > 0) / GIB
    wanted = ranks * (kept + state)
    if wanted > available:
        settings = [f"memory.offload_gib={kept:g}"] if kept else []
        if state:
            settings.append(f"optim.offload_fraction={config.optim.offload_fraction:g} ({state:.1f} GiB a rank)")
        yield (
            f"{' and '.join(settings)} on {ranks} ranks of a node asks for {wanted:.1f} GiB of host memory, and "
            f"{available:.1f} GiB are there; lower {'both' if len(settings) > 1 else 'it'} to {available / ranks:.1f} GiB a rank "
            "or less"
        )
