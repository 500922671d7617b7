"""One part of a preparation: a range of records, in their order, into shards.

Media are prepared by several processes, some records ahead, each medium once even if several records have it. What was made
waits on disk until its shard is finished, so nothing is made twice after a kill. Only this process writes shards.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from megatron_vila.data.media import MediaError, name_of
from megatron_vila.data.prepare.medium import name_of_medium, prepare_medium
from megatron_vila.data.prepare.options import Outcome
from megatron_vila.data.prepare.pool import Pool
from megatron_vila.data.prepare.sample import members_of
from megatron_vila.data.prepare.shard import Shard, size_of
from megatron_vila.data.prepare.state import Output, Plan, Step
from megatron_vila.data.prepare.tally import Note, Tally
from megatron_vila.data.records import Record
from megatron_vila.data.sources.source import ChangedFileError, Source
from megatron_vila.errors import UserError

AHEAD = 16
"""Records that are in work at once, for each process: a long video must not leave the others idle."""

JUDGED_FROM = 100
"""Samples from which on the share of bad ones is judged."""


CountTokens = Callable[[Record, tuple[Outcome, ...]], int | None]
"""Tokens of a record whose media became something; None where its text cannot be rendered."""


class TooManyBadError(UserError):
    """More samples than allowed are bad."""


class Sample(NamedTuple):
    """A record with what became of its media, or the ``reason`` why it is bad."""

    number: int
    record: Record | None
    names: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    reason: str = ""


def prepare_part(
    source: Source,
    plan: Plan,
    part: int,
    output: Output,
    pool: Pool,
    *,
    processes: int,
    max_bad: float,
    count_tokens: CountTokens | None,
    on_sample: Callable[[], None],
) -> list[Step]:
    """Do what is left of ``part`` and return all its steps. ``on_sample`` is called after each record, those done before too.

    Raises ``TooManyBadError`` where more than the share ``max_bad`` of the samples is bad, ``OSError`` where the disk does not
    take it, ``StateError``, ``ChangedFileError``.
    """
    with output.alone(f"part {part}"):
        steps, records = output.steps(part), plan.range_of(part)
        first = steps[-1].end if steps else records.start
        for _ in range(records.start, first):
            on_sample()
        if steps and steps[-1].last:
            return steps
        folder = output.media_folder(part)
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob("*.part"):
            shutil.rmtree(unfinished, ignore_errors=True)
        left = range(first, records.stop)
        ahead = _Ahead(source, left, plan, str(folder), pool, AHEAD * max(1, processes))
        writer = _Writer(source, output, part, steps, ahead, plan.options.shard_bytes)
        try:
            for sample in ahead.samples():
                writer.add(sample, count_tokens)
                on_sample()
                writer.judge(max_bad)
            writer.finish(records.stop, last=True)
        finally:
            writer.drop()
        shutil.rmtree(folder, ignore_errors=True)
        return steps


class _Ahead:
    """Prepares the media of records, at most ``window`` records ahead of the one that is asked for."""

    def __init__(self, source: Source, left: range, plan: Plan, folder: str, pool: Pool, window: int) -> None:
        self._source, self._left, self._plan, self._folder = source, left, plan, folder
        self._pool, self._window = pool, window
        self._work: dict[str, Future] = {}
        self._uses = _shared(source, left)

    def samples(self) -> Iterator[Sample]:
        """The samples in the order of their records."""
        begun: deque[tuple[int, Record | str, tuple[str, ...]]] = deque()
        for index in self._left:
            begun.append(self._begin(index))
            if len(begun) >= self._window:
                yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def release(self, names: tuple[str, ...]) -> None:
        """A record with these media is safe in its shard: remove what no other record needs."""
        for name in names:
            self._uses[name] = self._uses.get(name, 1) - 1
            if self._uses[name] <= 0:
                self._work.pop(name, None)
                del self._uses[name]
                shutil.rmtree(f"{self._folder}/{name}", ignore_errors=True)

    def _begin(self, index: int) -> tuple[int, Record | str, tuple[str, ...]]:
        if index in self._source.bad:
            return index, self._source.bad[index], ()
        try:
            record = self._source.record(index)
        except ChangedFileError:
            raise
        except (UserError, OSError) as error:
            return index, str(error), ()
        names = tuple(map(name_of_medium, record.media))
        for name, medium in zip(names, record.media, strict=True):
            if name not in self._work:
                self._work[name] = self._pool.submit(prepare_medium, medium, self._plan.options, self._folder)
        return index, record, names

    def _finish(self, index: int, record: Record | str, names: tuple[str, ...]) -> Sample:
        if isinstance(record, str):
            return Sample(index, None, names, (), record)
        try:
            return Sample(index, record, names, tuple(self._work[name].result() for name in names))
        except MediaError as error:
            return Sample(index, record, names, (), str(error))
        except OSError:
            raise  # what is written, not what is read
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Sample(index, record, names, (), f"{', '.join(name_of(m.path)[:200] for m in record.media)}: {reason}")


def _shared(source: Source, left: range) -> dict[str, int]:
    """How many of the records have each medium that more than one has, by its name."""
    names = np.array([name for index in left for name in _names(source, index)], dtype="S32")
    found, counts = np.unique(names, return_counts=True)
    return {name.decode(): int(count) for name, count in zip(found[counts > 1], counts[counts > 1], strict=True)}


def _names(source: Source, index: int) -> tuple[str, ...]:
    if index in source.bad:
        return ()
    try:
        return tuple(map(name_of_medium, source.record(index).media))
    except ChangedFileError:
        raise
    except (UserError, OSError):
        return ()


class _Writer:
    """Puts samples into shards, one after the other, and says in ``steps`` what is done."""

    def __init__(
        self, source: Source, output: Output, part: int, steps: list[Step], ahead: _Ahead, shard_bytes: int
    ) -> None:
        self._source, self._output, self._part, self._steps, self._ahead = source, output, part, steps, ahead
        self._shard_bytes = shard_bytes
        self._shard: Shard | None = None
        self._tally, self._names = Tally(), list[tuple[str, ...]]()
        self._seen = sum(step.tally.samples + len(step.tally.bad) for step in steps)
        self._bad = sum(len(step.tally.bad) for step in steps)

    def add(self, sample: Sample, count_tokens: CountTokens | None) -> None:
        members, reason = [], sample.reason
        if sample.record is not None and not reason:
            try:
                members = members_of(sample.number, sample.record, sample.outcomes)
            except (UserError, ValueError) as error:
                reason = str(error)
        self._seen += 1
        if reason:
            self._bad += 1
            self._tally.bad.append(self._note(sample, reason))
        elif sample.record is not None:
            if self._shard is not None and self._shard.bytes + size_of(members) > self._shard_bytes:
                self.finish(sample.number, last=False)
            if self._shard is None:
                self._shard = Shard(self._output.shard(self._part, len(self._steps)))
            self._shard.add(members)
            tokens = count_tokens(sample.record, sample.outcomes) if count_tokens else None
            self._tally.count(sample.outcomes, tokens)
            if any(outcome.poor for outcome in sample.outcomes):
                worst = min(outcome.psnr for outcome in sample.outcomes if outcome.poor and outcome.psnr is not None)
                self._tally.poor.append(self._note(sample, f"{worst:.1f} dB in the worst frame that was checked"))
        self._names.append(sample.names)

    def _note(self, sample: Sample, reason: str) -> Note:
        sample_id = sample.record.sample_id if sample.record is not None else ""
        return Note(sample.number, self._source.name(sample.number), sample_id, reason)

    def judge(self, max_bad: float) -> None:
        if self._seen >= JUDGED_FROM and self._bad > max_bad * self._seen:
            tallies = [*(step.tally for step in self._steps), self._tally]
            first = next(note for tally in tallies for note in tally.bad)
            raise TooManyBadError(
                f"{self._bad} of the first {self._seen} samples are bad, more than --max-bad {max_bad:g}; the first: "
                f"{first.place}: {first.reason}. Mend them (is --media-dir right?) and start anew, or start again with a higher "
                "--max-bad"
            )

    def finish(self, end: int, last: bool) -> None:
        """The shard is full, or the records are at their end: put it in place, and then say so."""
        name, size = "", 0
        if self._shard is not None:
            name, size = self._shard.path.name, self._shard.finish()
        step = Step(end, name, size, last, self._tally)
        self._output.write_step(self._part, len(self._steps), step)
        self._steps.append(step)
        for names in self._names:
            self._ahead.release(names)
        self._shard, self._tally, self._names = None, Tally(), []

    def drop(self) -> None:
        """Remove what is not finished."""
        if self._shard is not None:
            self._shard.drop()
