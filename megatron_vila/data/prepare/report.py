"""The report of a preparation: ``report.json`` for programs and ``report.html``, one file without scripts, for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from megatron_vila.data.prepare.options import given, option
from megatron_vila.data.prepare.state import Plan, write_whole
from megatron_vila.data.prepare.tally import Note, Tally

SHOWN = 500
"""Bad samples on the page; the JSON has all."""

_KINDS = {
    "video": "videos, encoded anew",
    "original": "videos, taken as they are",
    "pictures": "videos of pictures without a rate",
    "image": "pictures",
    "text": "samples without media",
}


def write_report(folder: Path, plan: Plan, tally: Tally, shards: Sequence[str], shard_bytes: int) -> None:
    """Both files, each in one step. Raises ``OSError``."""
    content = {
        "sources": list(plan.paths),
        "records": plan.records,
        "options": asdict(plan.options),
        "shards": list(shards),
        "shard_bytes": shard_bytes,
        **tally.as_json(),
        "bad": [note._asdict() for note in tally.bad],
        "poor": [note._asdict() for note in tally.poor],
    }
    write_whole(folder / "report.json", json.dumps(content, indent=1) + "\n")
    write_whole(folder / "report.html", page(plan, tally, len(shards), shard_bytes))


def summary(tally: Tally) -> str:
    """The counts in a line."""
    kinds = ", ".join(f"{count:,} {_KINDS[kind]}" for kind, count in sorted(tally.media.items()) if count)
    return (
        f"{tally.samples:,} samples prepared, {len(tally.bad):,} bad; {kinds or 'no media'}; "
        f"{tally.seconds / 3600:.2f} h of video, {tally.frames:,} frames; {size(tally.read)} became {size(tally.written)}"
    )


def size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def page(plan: Plan, tally: Tally, shards: int, shard_bytes: int) -> str:
    """The report as HTML."""
    share = len(tally.bad) / max(1, plan.records)
    figures = [
        (f"{tally.samples:,}", "samples prepared"),
        (f"{len(tally.bad):,}", f"bad samples ({share:.1%})"),
        (f"{tally.seconds / 3600:.2f} h", "of video"),
        (f"{tally.frames:,}", "frames of video"),
        (size(tally.read), "of media before"),
        (size(tally.written), "of media after"),
        (f"{shards:,}", f"shards, {size(shard_bytes)}"),
    ]
    if tally.tokens_of:
        figures.append((f"{tally.tokens / max(1, tally.samples):,.0f}", "tokens a sample"))
    cards = "".join(f"<div><b>{escape(number)}</b><span>{escape(text)}</span></div>" for number, text in figures)
    kinds = [(_KINDS[kind], f"{count:,}") for kind, count in sorted(tally.media.items())]
    options = [(option(name), given(name, value)) for name, value in asdict(plan.options).items()]
    parts = [
        f"<h1>Prepared samples</h1><p>{escape(', '.join(plan.paths))}</p><section class=cards>{cards}</section>",
        _table("Media", ("kind", "number"), kinds),
        _histogram("Frames of video in a sample", tally.frames_of),
        _histogram("Tokens of a sample", tally.tokens_of),
        _notes("Bad samples, which are left out", tally.bad, "reason"),
        _notes("Videos that lost more than --min-psnr allows", tally.poor, "quality"),
        _table("Options", ("option", "value"), options),
    ]
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>Prepared samples</title>{_STYLE}{''.join(parts)}</html>\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    if not rows:
        return ""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<h2>{escape(title)}</h2><table class={kind}><tr>{''.join(f'<th>{escape(name)}' for name in head)}{cells}</table>"


def _histogram(title: str, counts: Counter) -> str:
    """Bars from the smallest to the largest of powers of two."""
    if not counts:
        return ""
    most, rows = max(counts.values()), []
    for power in range(min(counts), max(counts) + 1):
        low, high = (0, 0) if power < 0 else (2**power, 2 ** (power + 1) - 1)
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        bar = f'<div class=bar style="width:{100 * counts[power] / most:.1f}%"></div>' if counts[power] else ""
        rows.append(f"<tr><td class=label>{label}<td class=bars>{bar}<td class=number>{counts[power]:,}")
    return f"<h2>{escape(title)}</h2><table class=histogram>{''.join(rows)}</table>"


def _notes(title: str, notes: Sequence[Note], what: str) -> str:
    rows = [(f"{note.key:09d}", note.sample_id, note.place, note.reason) for note in notes[:SHOWN]]
    more = f"<p>... and {len(notes) - SHOWN:,} more; report.json has all.</p>" if len(notes) > SHOWN else ""
    return _table(f"{title}: {len(notes):,}", ("key", "id", "place", what), rows, "notes") + more


_STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:#5a6a7a;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.75rem}
.cards div{border:1px solid #d9e0e7;border-radius:.5rem;padding:.75rem 1rem}.cards b{display:block;font-size:1.35rem}
.cards span{color:#5a6a7a}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #e6ebf0;vertical-align:top;overflow-wrap:anywhere}
th{color:#5a6a7a;font-weight:600}.histogram td{border:0;padding:.15rem .6rem}.label,.number{white-space:nowrap;width:1%}

.notes td:first-child{white-space:nowrap}.label{text-align:right}
.bar{background:#2f6f9f;height:1rem;border-radius:.15rem;min-width:1px}
</style>"""
