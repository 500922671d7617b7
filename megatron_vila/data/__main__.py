"""``python -m megatron_vila.data check [FILES] ...``: read all samples and their media, and report what cannot be used.

The exit status is 0 if all can be used, 1 if any cannot, 2 if nothing could be checked or
the JSON report cannot be written.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_vila import accelerator
from megatron_vila.data.check import ANY_VOCABULARY, USUAL, Report, check
from megatron_vila.data.sources.open import PARTS
from megatron_vila.errors import UserError, entry_point

SHOWN = 20
"""Problems on the screen; a JSON report has all."""


@entry_point
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_vila.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="read all samples and report what cannot be used")
    command.add_argument("files", nargs="*", help="files of records, folders of shards (default: those of --config)")
    command.add_argument("--config", help=f"YAML file or preset whose settings hold (default: {USUAL})")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that win, as data.num_frames=64",
    )
    command.add_argument("--media-dir", help="data.media_dir")
    command.add_argument("--tokenizer", help="data.tokenizer; without one nothing is said of tokens")
    command.add_argument("--threads", type=int, default=4, help="samples that are read at once")
    command.add_argument("--json", metavar="PATH", help="write the whole report as JSON; - for standard output")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    # The report names what is broken.
    logging.getLogger("megatron_vila.data").setLevel(logging.ERROR)
    accelerator.prepare()
    # Imported late: Megatron-Core must be prepared for this machine first.
    from megatron_vila.config.load import load_config
    from megatron_vila.start_checks import check_data

    config = load_config(options.config or USUAL, options.set)
    config.data.media_dir = config.data.media_dir if options.media_dir is None else options.media_dir
    config.data.tokenizer = config.data.tokenizer if options.tokenizer is None else options.tokenizer
    if options.files:
        config.data.train, config.data.eval, config.data.weights = [], [], []
    if not options.config:
        config.model.llm.vocab_size = ANY_VOCABULARY
    check_data(config)
    sets = {"train": options.files} if options.files else {name: getattr(config.data, name) for name in PARTS}
    report = _last(check(config, sets, max(1, options.threads)))
    if options.json != "-":
        print(describe(report))
    try:
        if options.json:
            _write_json(report, options.json)
    except OSError as error:
        raise UserError(f"--json {options.json} cannot be written: {error.strerror}; name another file") from error
    return 1 if report.problems else 0


def describe(report: Report) -> str:
    """The report as text, with the first of its problems."""
    lines = [f"{report.usable} of {report.samples} samples can be used, with {report.frames} frames"]
    if report.tokens is not None:
        mean = report.tokens / max(report.usable, 1)
        lines.append(f"{report.tokens} tokens, {mean:.0f} a sample, {report.longest} in the longest")
        lines.append(f"{report.truncated} ({_share(report):.1%}) lose frames to fit train.seq_length")
    if report.unanswered:
        lines.append(f"{report.unanswered} have no answer to learn")
    if report.problems:
        kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in report.counts.items() if count)
        lines.append(f"{len(report.problems)} cannot be used: {kinds}")
        for problem in report.problems[:SHOWN]:
            place = f"{problem.place}, sample {problem.sample_id}: " if problem.place else ""
            lines.append(f"  {problem.kind.replace('_', ' ')}: {place}{problem.reason}")
    if len(report.problems) > SHOWN:
        lines.append(f"  ... and {len(report.problems) - SHOWN} more (--json has all)")
    return "\n".join(lines)


def _share(report: Report) -> float:
    return report.truncated / max(report.usable, 1)


def _write_json(report: Report, path: str) -> None:
    content = asdict(report) | {"usable": report.usable, "truncated_share": _share(report), "counts": report.counts}
    text = json.dumps(content, indent=2) + "\n"
    if path == "-":
        print(text, end="")
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _last(reports: Iterable[Report]) -> Report:
    """The last of ``reports``, with a bar on a terminal and a line for each tenth elsewhere, both on standard error."""
    console = Console(stderr=True)
    shown = _bar if console.is_terminal else _lines
    return deque(shown(reports, console), maxlen=1)[0]


def _bar(reports: Iterable[Report], console: Console) -> Iterator[Report]:
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[bad]} bad"), console=console) as progress:
        task = progress.add_task("", total=None, bad=0)
        for report in reports:
            progress.update(task, total=report.samples, completed=report.checked, bad=len(report.problems))
            yield report


def _lines(reports: Iterable[Report], console: Console) -> Iterator[Report]:
    tenth = 0
    for report in reports:
        if report.checked * 10 // max(report.samples, 1) > tenth:
            tenth = report.checked * 10 // report.samples
            console.out(f"checked {report.checked} of {report.samples}, {len(report.problems)} bad", highlight=False)
        yield report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
