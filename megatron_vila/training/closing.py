"""The last lines of a run: where it is saved, what happened to its samples, and the commands for what comes next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_vila.config.schema import Config


def closing_lines(
    arguments: Sequence[str],
    config: Config,
    step: int,
    saved: Path | None,
    stopped: bool,
    skipped: int,
    counts: Mapping[str, int],
) -> list[str]:
    """The lines that the writer prints at the end of a run that was started with ``arguments`` and stands at ``step``.

    ``saved`` is the checkpoint of this step, None without one; ``counts`` and ``skipped`` are of the whole run.
    """
    output = config.train.output
    if not config.checkpoint.resume:
        # The same command would begin at step 0.
        arguments = [*arguments, "checkpoint.resume=true"]
    where = f"saved in {saved}" if saved is not None else "nothing is saved (checkpoint.save=false)"
    lines = [f"{'stopped' if stopped else 'finished'} after step {step}: {where}", f"  samples: {_samples(counts, skipped)}"]
    if saved is None:
        return lines
    if stopped:
        return [*lines, f"  continue: {command(arguments)}"]
    return [
        *lines,
        f"  evaluate it: {command(arguments, 'data.eval=[HELD_OUT.json]')}",
        f"  export it: python tools/convert_checkpoint.py export {shlex.quote(output)} OUT",
        f"  train it further: {command(arguments, f'train.steps={2 * step}')}",
        f"  start another run from it: {command(arguments, f'checkpoint.load={output}', 'train.output=OTHER')}",
    ]


def command(arguments: Sequence[str], *changes: str) -> str:
    """How a user starts the trainer as this process was started, with ``changes`` of settings."""
    settings = {text.partition("=")[0]: text for text in (*arguments, *changes)}
    ranks, nodes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if nodes > 1:
        return f"on each node as before, with {shlex.join(changes)}" if changes else "on each node as before"
    start = f"megatron_vila.launch --nproc-per-node {ranks}" if ranks > 1 else "megatron_vila.train"
    return f"python -m {start} {shlex.join(settings.values())}"


def _samples(counts: Mapping[str, int], skipped: int) -> str:
    told = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "drawn"]
    updates = f"{skipped} updates skipped" if skipped else "no update skipped"
    return f"{counts.get('drawn', 0)} drawn, {', '.join(told) or 'all used as they are'}; {updates}"
