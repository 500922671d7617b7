"""What a preparation keeps on disk to go on after it was killed anywhere: its plan, and what each finished shard holds.

All of it is in the folder ``prepare`` of the output: ``plan.json``, and for each step of a part ``part-PPPPP-SSSSSS.json``, which
is written when the shard of the same number stands in its place. A shard without this file is made again, with the same bytes.
The last step of a part says so; it may have no shard, if all records after the last shard were bad.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vila.data.prepare.options import Options, versions
from megatron_vila.data.prepare.shard import shard_name
from megatron_vila.data.prepare.tally import Tally
from megatron_vila.errors import UserError

FOLDER = "prepare"
PLAN = "plan.json"
FORMAT = 1


class StateError(UserError):
    """What stands in the output folder does not belong to what is asked for; the text says what to do."""


@dataclass(frozen=True)
class Plan:
    """What is prepared and how: ``records`` records of the sources ``paths`` whose hash is ``digest``."""

    paths: tuple[str, ...]
    records: int
    digest: str
    options: Options

    def range_of(self, part: int) -> range:
        """The records of a part."""
        first, end = (self.records * number // self.options.parts for number in (part, part + 1))
        return range(first, end)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "versions": versions(), **asdict(self), "paths": list(self.paths)}


@dataclass(frozen=True)
class Step:
    """Records up to ``end`` are done; ``shard`` of ``size`` bytes holds the good ones, or is empty where there is none."""

    end: int
    shard: str
    size: int
    last: bool
    tally: Tally


class Output:
    """The folder of a preparation, made by ``open_output``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / FOLDER

    def media_folder(self, part: int) -> Path:
        """Where media of a part wait for their shard."""
        return self.state / f"media-{part:05d}"

    def steps(self, part: int) -> list[Step]:
        """The finished steps of a part, whose shards are there. Raises ``StateError`` for one that is not what it was."""
        found: list[Step] = []
        while True:
            file = self._step(part, len(found))
            if not file.exists():
                return found
            content = json.loads(file.read_text())
            step = Step(**content | {"tally": Tally.of_json(content["tally"])})
            if step.shard:
                self._check(step)
            found.append(step)

    def _check(self, step: Step) -> None:
        path = self.folder / step.shard
        size = path.stat().st_size if path.is_file() else None
        if size != step.size:
            state = "is missing" if size is None else f"has {size:,} bytes in place of {step.size:,}"
            raise StateError(
                f"{path} {state} since it was finished; put it back, or remove {self.folder} and start again"
            )

    def write_step(self, part: int, number: int, step: Step) -> None:
        write_whole(self._step(part, number), json.dumps(vars(step) | {"tally": step.tally.as_json()}))

    def _step(self, part: int, number: int) -> Path:
        return self.state / f"part-{part:05d}-{number:06d}.json"

    def shard(self, part: int, number: int) -> Path:
        return self.folder / shard_name(part, number)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold the lock ``name``, which ends with this process. Raises ``StateError`` if another process has it."""
        path = self.state / f"{name}.lock"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StateError(f"another process works on {name} of {self.folder}; wait for it or end it") from error
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(descriptor)


def open_output(folder: Path, plan: Plan) -> Output:
    """The output folder for ``plan``: a new one, or the one that a preparation by the same plan has begun.

    Raises ``StateError`` for a folder that holds something else or was begun with another source or other options.
    """
    output = Output(folder)
    path = output.state / PLAN
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        others = [entry.name for entry in os.scandir(folder) if entry.name != FOLDER]
        if others:
            raise StateError(f"{folder} is not empty (it holds {others[0]}); name a new folder, or empty this one")
        output.state.mkdir(exist_ok=True)
        _write_first(path, json.dumps(plan.as_json(), indent=1))
    _compare(folder, json.loads(path.read_text()), plan)
    return output


def parts_of(folder: Path) -> int:
    """How many parts the preparation in ``folder`` has. Raises ``StateError`` if there is none."""
    try:
        return int(json.loads((folder / FOLDER / PLAN).read_text())["options"]["parts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"no preparation was begun in {folder} ({error}); nothing can be finished") from error


def _compare(folder: Path, begun: dict[str, Any], plan: Plan) -> None:
    cure = f"start again as before, or remove {folder} and start anew"
    if begun.get("format") != FORMAT:
        raise StateError(
            f"{folder} was begun by another version of this program; use that one, or start anew in another folder"
        )
    if different := plan.options.difference(begun["options"]):
        raise StateError(f"{folder} was begun with {different}; {cure}")
    if (begun["digest"], begun["records"]) != (plan.digest, plan.records):
        names = ", ".join(begun["paths"])
        raise StateError(
            f"{folder} was begun from {names} with {begun['records']:,} records, and now there are {plan.records:,}"
            f"{'' if begun['records'] != plan.records else ' others'}; put the source back, or remove {folder} and start anew"
        )
    if begun["versions"] != versions():
        old, new = (
            ", ".join(f"{name} {version}" for name, version in each.items()) for each in (begun["versions"], versions())
        )
        raise StateError(f"{folder} was begun with {old}, and now there is {new}, which encodes otherwise; {cure}")


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that it is there whole or not at all."""
    with _temporary(path, text) as name:
        os.replace(name, path)


def _write_first(path: Path, text: str) -> None:
    """As ``write_whole``, but a file that another task wrote meanwhile stays."""
    with _temporary(path, text) as name, contextlib.suppress(FileExistsError):
        os.link(name, path)


@contextlib.contextmanager
def _temporary(path: Path, text: str) -> Iterator[str]:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
