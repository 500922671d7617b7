"""The end of a preparation: the index of the shards by Energon's own program, what they hold, and the report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_vila.data.prepare.report import write_report
from megatron_vila.data.prepare.state import Output, Plan, Step, write_whole
from megatron_vila.data.prepare.tally import Tally, total
from megatron_vila.data.sources.holdings import FILE, FORMAT, Holdings
from megatron_vila.errors import UserError, some

INSTALL = "pip install megatron-vila[prepare]"


class NoIndexError(UserError):
    """The index of the shards cannot be made."""


class UnfinishedError(UserError):
    """Parts are missing; the text names them."""


def require_energon() -> None:
    """Raise ``UserError`` if Energon, which makes the index, is not installed: better now than after the work."""
    try:
        found = importlib.util.find_spec("megatron.energon")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise NoIndexError(f"megatron-energon, which makes the index of the shards, is not installed; {INSTALL}")


def all_steps(output: Output, plan: Plan) -> list[Step]:
    """The steps of all parts in their order. Raises ``UnfinishedError``."""
    parts = [output.steps(part) for part in range(plan.options.parts)]
    missing = [str(number) for number, steps in enumerate(parts) if not steps or not steps[-1].last]
    if missing:
        raise UnfinishedError(
            f"{len(missing)} of {len(parts)} parts are not finished: {some(missing)}; run them "
            f"(--part NUMBER/{len(parts)}), then --finish"
        )
    return [step for steps in parts for step in steps]


def finish(output: Output, plan: Plan, processes: int, anew: bool = False) -> Tally:
    """Write what belongs to all shards together; doing it again changes nothing. ``anew``: make an index that is there again.

    Raises ``UserError``.
    """
    with output.alone("the index"):
        steps = all_steps(output, plan)
        tally = total(step.tally for step in steps)
        shards = [step.shard for step in steps if step.shard]
        if not shards:
            write_report(output.folder, plan, tally, shards, 0)
            raise UserError(
                f"none of {plan.records:,} samples can be used; {output.folder}/report.html names the reasons. Mend them, remove "
                f"{output.folder} and start anew"
            )
        if anew:
            (output.folder / FILE).unlink(missing_ok=True)
        if not (output.folder / FILE).exists():
            _index(output.folder, processes)
        write_report(output.folder, plan, tally, shards, sum(step.size for step in steps))
        # Last: where it is, the set is whole.
        write_whole(output.folder / FILE, _described(plan, tally, len(shards)))
    for leftover in output.state.glob("*.lock"):
        leftover.unlink(missing_ok=True)
    return tally


def _described(plan: Plan, tally: Tally, shards: int) -> str:
    """The text of ``megatron_vila.json``: what the media are, so that a run that wants more is told so at its start."""
    options = plan.options
    holds = Holdings("verbatim", options.short_side, options.fps, options.picture_side)
    made = {"codec": "h264", "crf": options.crf, "preset": options.preset, "key_distance": options.key_distance}
    counts = {"shards": shards, "samples": tally.samples, "bad": len(tally.bad), "frames": tally.frames, "media": tally.media}
    return json.dumps({"format": FORMAT, **asdict(holds), **made, **counts}, indent=1) + "\n"


def _index(folder: Path, processes: int) -> None:
    """``.nv-meta`` by ``energon prepare``: all samples are the part ``train``, in the order of the shards."""
    require_energon()
    shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
    command = [
        sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder), "--non-interactive", "--no-progress",
        "--split-parts", "train:shard-.*", "--sample-type", "CrudeWebdataset", "--num-workers", str(max(1, processes)),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode or not (folder / ".nv-meta" / "index.sqlite").is_file():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise NoIndexError(
            f"energon prepare could not make the index of {folder}:\n{said}\nthe shards are whole: start again"
        )
