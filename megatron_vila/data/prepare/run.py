"""A whole preparation, or a part of it: what is checked before the work, the work, and its end.

One way does the work: ``prepare_part``. One machine does all parts one after the other, a task of an array job does one, and
Ray's tasks do one each; whoever finishes the last part makes the index.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_vila.busy import busy, counted
from megatron_vila.config.schema import Config, DataConfig
from megatron_vila.data.containers.open import open_sets
from megatron_vila.data.prepare.finish import UnfinishedError, all_steps, finish, require_energon
from megatron_vila.data.prepare.options import Options, Outcome
from megatron_vila.data.prepare.part import CountTokens, prepare_part
from megatron_vila.data.prepare.pool import Pool
from megatron_vila.data.prepare.state import Output, Plan, open_output
from megatron_vila.data.prepare.tally import Tally, total
from megatron_vila.data.records import Record
from megatron_vila.data.sources.source import BadRecordsError, Source
from megatron_vila.errors import SettingError, UserError

LEAST_ROOM = 2
"""Shards that the disk must have room for before the work: one in the making, and the media that wait for the next."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Task:
    """What is prepared: the records of ``paths``, whose media lie in ``media_dir`` (empty: beside them), to the folder ``out``.
    ``format`` is what keeps the records (``formats/detect.py``), empty: what is found there.

    ``config`` counts tokens if it names a tokenizer. ``processes`` prepare media at once (0: this one). ``max_bad`` is the
    largest share of bad samples.
    """

    paths: tuple[str, ...]
    out: str
    options: Options
    format: str = ""
    media_dir: str = ""
    ignore_fields: tuple[str, ...] = ()
    processes: int = 0
    max_bad: float = 0.5
    config: Config | None = None


def prepare(task: Task, part: int | None = None) -> tuple[Tally, bool]:
    """Prepare ``part``, or every part, and finish if all parts are done then: the counts of all, and true; else those of the
    part, and false. Raises ``UserError``.
    """
    require_energon()
    with disk_errors(task.out):
        source, plan, output = begin(task)
        parts = range(plan.options.parts) if part is None else (part,)
        with counted("samples", sum(len(plan.range_of(number)) for number in parts)) as on_sample:
            do_parts(task, source, plan, output, parts, on_sample)
        try:
            all_steps(output, plan)
        except UnfinishedError:
            return total(step.tally for number in parts for step in output.steps(number)), False
        return _finish(task, output, plan), True


def only_finish(task: Task) -> Tally:
    """Make the index and the report of parts that are all done. Raises ``UserError``."""
    require_energon()
    with disk_errors(task.out):
        _, plan, output = begin(task)
        return _finish(task, output, plan, anew=True)


def begin(task: Task) -> tuple[Source, Plan, Output]:
    """Open source and output, after all checks that need no work. Raises ``UserError``."""
    _check_places(task)
    with busy("reading the records"):
        source = _open(task)
    plan = Plan(tuple(task.paths), len(source), source.digest, task.options)
    if plan.options.parts > plan.records:
        raise SettingError(f"{plan.options.parts} parts for {plan.records} records; use at most {plan.records}")
    return source, plan, open_output(Path(task.out), plan)


def do_parts(
    task: Task, source: Source, plan: Plan, output: Output, parts: Sequence[int], on_sample: Callable[[], None]
) -> None:
    """Do ``parts``, one after the other."""
    count_tokens = _token_counter(task.config)
    with Pool(task.processes) as pool:
        for part in parts:
            prepare_part(
                source,
                plan,
                part,
                output,
                pool,
                processes=task.processes,
                max_bad=task.max_bad,
                count_tokens=count_tokens,
                on_sample=on_sample,
            )


def _finish(task: Task, output: Output, plan: Plan, anew: bool = False) -> Tally:
    with busy("the index of the shards"):
        return finish(output, plan, task.processes, anew)


def _open(task: Task) -> Source:
    """The records with each marker where it stands: any rule for media can be applied to what comes out."""
    data = DataConfig(
        media_dir=task.media_dir, media_format="verbatim", bad_records="skip", ignore_fields=list(task.ignore_fields)
    )
    try:
        return open_sets(data, task.paths, task.format)
    except BadRecordsError as error:
        raise UserError(f"nothing can be prepared: {error}") from error


def _check_places(task: Task) -> None:
    """Raise ``SettingError`` for an output that cannot be written, has no room, or lies within a source (or a source in it)."""
    out = Path(task.out).resolve()
    for path in filter(None, (*task.paths, task.media_dir)):
        source = Path(path).resolve()
        inside = out == source or (source.is_dir() and source in out.parents and path != task.media_dir)
        if inside or out in source.parents:
            raise SettingError(
                f"the output {task.out} and the source {path} lie in each other; name a folder beside it"
            )
    parent = next(each for each in (out, *out.parents) if each.exists())
    if not parent.is_dir():
        raise SettingError(f"the output {task.out} cannot be a folder: {parent} is a file; name another one")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise SettingError(f"the output {task.out} cannot be written: {error.strerror}; name another folder") from error
    room, needed = shutil.disk_usage(parent).free, LEAST_ROOM * task.options.shard_bytes
    if room < needed:
        raise SettingError(
            f"the disk of {task.out} has room for {room:,} bytes, and {LEAST_ROOM} shards alone need {needed:,}; free some, name "
            "another folder, or make shards smaller (--shard-mib)"
        )


@contextmanager
def disk_errors(out: str) -> Iterator[None]:
    """Turn what the system says of a disk into a ``UserError`` with the cure; ``out`` is named where no file is."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        cure = "free space" if error.errno in _FULL else "mend that"
        raise UserError(
            f"{error.filename or out} cannot be written or read: {error.strerror or error}. What is finished stays; {cure}, and "
            "start the same command again"
        ) from error


def _token_counter(config: Config | None) -> CountTokens | None:
    """Counts the tokens of a sample with all frames that are kept, ``data.num_frames`` at most; None without a tokenizer."""
    if config is None or not config.data.tokenizer:
        return None
    # Imported late: most preparations need no transformers.
    from megatron_vila.config.text_rules import TextRules
    from megatron_vila.data.chat import ChatEncoder
    from megatron_vila.data.tokenizer import load_tokenizer
    from megatron_vila.plan.pictures import pictures_of, places

    encoder = ChatEncoder(load_tokenizer(config.data.tokenizer), TextRules.of(config.data))
    pictures = pictures_of(config.model)
    separators = {True: len(config.data.frame_separator_ids), False: len(config.data.image_separator_ids)}

    def count(record: Record, outcomes: tuple[Outcome, ...]) -> int | None:
        try:
            tokens = sum(len(segment.token_ids) for segment in encoder.encode(record.turns))
        except UserError:
            return None  # another tokenizer may take it
        for medium, outcome in zip(record.media, outcomes, strict=True):
            frames = min(outcome.frames, config.data.num_frames) if medium.is_video else 1
            units = pictures.units(frames, medium.is_video, (outcome.width, outcome.height))
            tokens += places(units, separators[medium.is_video])
        return tokens

    return count


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
