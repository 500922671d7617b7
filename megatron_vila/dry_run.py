"""``--dry-run``: everything that can be checked before a run starts, in one process and without a process group.

The settings, the memory of the GPU that is planned for, the checkpoint that the run would start or continue from, and the data,
opened as the trainer opens them, with samples as the model sees them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vila.checkpoint.files import checked_info, read_state
from megatron_vila.checkpoint.fit import KEEP_UPDATES, lost_updates, require_vocabulary
from megatron_vila.checkpoint.folder import resolve_checkpoint, to_resume
from megatron_vila.checkpoint.resume import changes, kept_settings, settings_of
from megatron_vila.checkpoint.save_load import undecided
from megatron_vila.checkpoint.tensors import StoredTensors
from megatron_vila.config.schema import Config
from megatron_vila.convert.stored_model import misfits
from megatron_vila.convert.weight_map import entries
from megatron_vila.data.chat import describe
from megatron_vila.data.check import problem_of
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.sources.holdings import holdings_warnings
from megatron_vila.data.sources.source import report_bad_records
from megatron_vila.data.tokenizer import tokenizer_warnings
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.explain.sample import SETS, left_out, parse_sample, require_sample
from megatron_vila.explain.text import console
from megatron_vila.plan.hardware import Machine
from megatron_vila.plan.memory import describe_memory
from megatron_vila.start_checks import check_start
from megatron_vila.training.run_data import open_dataset

logger = logging.getLogger(__name__)


def dry_run(config: Config, world_size: int, machine: Machine, show: Sequence[str] | None = None) -> None:
    """Check ``config`` for ``world_size`` ranks on ``machine``s and print what was found.

    ``show`` lists samples to print, whose pixels are read too: ``N`` of data.train, ``eval:N`` of data.eval; None: the first of
    each, without its pixels. Raises ``ConfigError``, ``CheckpointError`` or ``NoUsableSampleError`` with the cure for the first
    thing that does not fit.
    """
    wanted = [parse_sample(text, f"--show {text}", config) for text in show or []]
    warnings = check_start(config, world_size, machine)
    for warning in warnings:
        logger.warning("warning: %s", warning)
    _say(describe_memory(config, world_size, machine))
    _say(describe_start(config))
    for name in SETS:
        files = getattr(config.data, name)
        indices = [index for set_name, index in wanted if set_name == name] if wanted else [0]
        if files:
            dataset = open_dataset(config, name)
            if name == "train":
                for warning in [
                    *tokenizer_warnings(config, dataset.encoder.tokenizer),
                    *holdings_warnings(config, dataset.records.holdings),
                ]:
                    warnings.append(warning)
                    logger.warning("warning: %s", warning)
            _say(f"data.{name}: {len(dataset)} samples in {', '.join(files)}")
            if dataset.records.bad:
                print(report_bad_records(dataset.records.bad, len(dataset)))
            for index in indices:
                print(describe_sample(dataset, name, index, decode=bool(wanted)))
    found = "everything fits together" if not warnings else f"it can start; see the {len(warnings)} warning(s) above"
    print(f"dry run for {world_size} ranks: {found}")


def describe_sample(dataset: VilaDataset, name: str, index: int, decode: bool) -> str:
    """Sample ``index`` of data.``name`` as the model sees it, with what was done to make it fit; or why it cannot be used, and of
    training data the next one that can. Pixels are read where ``decode`` says so.

    Raises ``ConfigError`` if there is no such sample, ``NoUsableSampleError`` if no sample can be used.
    """
    require_sample(dataset, index, f"--show {index}", name)
    problem = problem_of(dataset, index, decode)
    lines = [f"number {index}:"]
    if problem is not None:
        fate = "an evaluation" if name == "eval" else "a run"
        kind = problem.kind.replace("_", " ")
        lines = [f"number {index} cannot be used ({kind}): {problem.reason}", f"({fate} leaves it out)"]
    sample = dataset.first_usable(index, {index: problem.reason} if problem else None)
    if problem is not None and name == "eval":
        return "\n".join(lines)
    if sample.index != index:
        lines.append(f"number {sample.index}, the next that can be used:")
    lines += [f"({line})" for line in left_out(sample, dataset.seq_length)]
    return "\n".join([*lines, describe(sample.document, dataset.encoder.tokenizer)])


def describe_start(config: Config) -> str:
    """What the run would start or continue from, and what has changed since.

    Raises ``CheckpointError`` if that is damaged, of another model, or of a run that this one cannot continue from. Sizes of
    files are looked at, not their content.
    """
    try:
        resumed = _resumed(config)
        if resumed is None and not config.checkpoint.load:
            return "Start: random weights (checkpoint.load is empty)."
        folder = resumed or resolve_checkpoint(Path(config.checkpoint.load))
    except OSError as error:
        raise CheckpointError(f"the folder of the checkpoint cannot be read: {error}; make it readable") from error
    lines = []
    try:
        info = checked_info(folder)
        tensors = StoredTensors(folder, info["files"])
        require_vocabulary(config.model.llm.vocab_size, tensors, info)
        stored = {name: tensor.shape for name, tensor in tensors.items()}
        problems = misfits(entries(config.model), stored)
        if problems:
            more = f" and {len(problems) - 3} more tensors" if len(problems) > 3 else ""
            raise CheckpointError(f"it is of another model than this configuration: {'; '.join(problems[:3])}{more}")
        if not config.model.lora.rank and (lost := lost_updates(stored)):
            raise CheckpointError(f"{lost}; {KEEP_UPDATES}")
        if resumed is not None:
            saved = read_state(folder)
            if saved["adam_step"] is None:
                raise CheckpointError("it holds weights only, a run cannot continue from it: choose another train.output")
            lines = changes(kept_settings(saved["extra"]), settings_of(config))
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"cannot load checkpoint {folder}: {error}") from error
    if resumed is None:
        return f"Start: weights of {folder}."
    step = info["step"]
    left = max(0, config.train.steps - step)
    start = f"Start: continues from {folder} after step {step}; {left} of train.steps={config.train.steps} are left."
    return "\n".join([start, *(f"changed since: {line}" for line in lines)])


def _resumed(config: Config) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` takes; with newest_whole the newest one whose files are there in full."""
    if not config.checkpoint.resume:
        return None
    known = to_resume(config.train.output)
    first = known[0] if known else None
    return next(filter(_is_complete, known), first) if config.checkpoint.resume == "newest_whole" else first


def _is_complete(folder: Path) -> bool:
    try:
        checked_info(folder)
    except DamagedError:
        return False
    except (CheckpointError, OSError) as error:
        raise CheckpointError(undecided(folder, error)) from error
    return True


def _say(text: str) -> None:
    """Broken between words on a terminal, in one line elsewhere."""
    console(sys.stdout).print(text, soft_wrap=not sys.stdout.isatty())
