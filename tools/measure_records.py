"""Measures what opening a large set of records costs: time to the first sample and memory, at the first and a later start.

    python tools/measure_records.py FOLDER --kind shards --records 1000000

writes the set into FOLDER unless it is there, and opens it in two processes, one after the other: the first finds no kept index.
A line of JSON for each: seconds to open the set, to read the first sample and 1,000 others at random, and MiB of memory of the
process before and after (anonymous, and files that are mapped).

With --ranks N it starts two runs of N ranks instead, of the preset tiny on the CPU: seconds from the command to the end of the
first step, CPU time of all processes of the run, and the most MiB that a rank held. With --records 1000 the same tells what of
that is not due to the records.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

KINDS = ("shards", "jsonl", "json")
SHARD = 10_000
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAG0lEQVR4nGPkYEAFLPzoAoLoAgLDR4DxO5oAALc0AhqMRhohAAAAAElFTkSuQmCC"
)
WORDS = ("the", "a", "video", "shows", "person", "walking", "red", "blue", "green", "street", "then", "turns", "left", "slowly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="shards")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, metavar="N", help="start runs of N ranks")
    parser.add_argument("--open", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(_measure(options.open)))
        return
    path = options.folder / (options.kind if options.kind == "shards" else f"records.{options.kind}")
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        _WRITERS[options.kind](path, options.records)
    with tempfile.TemporaryDirectory() as cache:
        for start in ("first", "later"):
            environment = os.environ | {"XDG_CACHE_HOME": cache}
            if options.ranks:
                found = _start(path, options.ranks, environment)
            else:
                command = [sys.executable, __file__, str(options.folder), "--open", str(path)]
                told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(told)
            print(json.dumps({"kind": options.kind, "records": options.records, "start": start, **found}), flush=True)


def _start(path: Path, ranks: int, environment: dict[str, str]) -> dict[str, float]:
    """A run of two steps: seconds to the end of the first one, CPU time of all its processes, MiB that a rank held at most."""
    from megatron_vila.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(_texts(100, "0.png"), f"{folder}/tokenizer", 512)
        metrics = Path(folder, "run", "metrics.jsonl")
        command = [sys.executable, "-m", "megatron_vila.launch", "--nproc-per-node", str(ranks), "tiny", "train.steps=2"]
        command += [f"data.train=[{path}]", f"data.tokenizer={folder}/tokenizer", f"train.output={folder}/run"]
        cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        started_s, step_s, most_mib = time.perf_counter(), 0.0, 0.0
        run = subprocess.Popen(
            [*command, "data.media_format=vila", "checkpoint.save=false"],
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdout=subprocess.DEVNULL,
        )
        while run.poll() is None:
            if not step_s and metrics.exists() and metrics.stat().st_size:
                step_s = time.perf_counter() - started_s
            most_mib = max(most_mib, *_peaks(run.pid))
            time.sleep(0.05)
    if run.returncode:
        sys.exit(run.returncode)
    cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu_s
    return {
        "ranks": ranks,
        "first_step_s": round(step_s, 1),
        "run_cpu_s": round(cpu_s, 1),
        "rank_most_mib": round(most_mib),
    }


def _peaks(launcher: int) -> list[float]:
    """The most MiB that each process which ``launcher`` started has held so far; 0 stands for none."""
    peaks = [0.0]
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        with contextlib.suppress(OSError, KeyError):
            peaks += [_memory(pid)["vmhwm"] for pid in children.read_text().split()]
    return peaks


def _measure(path: str) -> dict[str, float]:
    from megatron_vila.config.schema import DataConfig
    from megatron_vila.data.sources.open import open_records

    before, started_s = _memory(), time.perf_counter()
    records = open_records(DataConfig(), [path])
    opened_s = time.perf_counter() - started_s
    records.record(len(records) // 2)
    first_s = time.perf_counter() - started_s
    numbers = random.Random(0)
    for _ in range(1000):
        records.record(numbers.randrange(len(records)))
    found = {"open_s": opened_s, "first_sample_s": first_s, "sample_us": (time.perf_counter() - started_s - first_s) * 1e3}
    for name, size in _memory().items():
        found |= {f"{name}_before_mib": before[name], f"{name}_mib": size}
    return {name: round(value, 3) for name, value in found.items()}


def _memory(pid: str = "self") -> dict[str, float]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name.lower(): int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def _texts(count: int, media: str) -> Iterator[str]:
    words = random.Random(0)

    def said(number: int) -> str:
        return " ".join(words.choices(WORDS, k=number))

    for number in range(count):
        turns = [("human", f"<image>\n{said(20)}?"), ("gpt", said(60)), ("human", f"{said(12)}?"), ("gpt", said(55))]
        conversation = [{"from": role, "value": text} for role, text in turns]
        yield json.dumps({"id": f"sample-{number:07d}", "image": media.format(number), "conversations": conversation})


def _write_jsonl(path: Path, count: int) -> None:
    with path.open("w") as stream:
        stream.writelines(f"{text}\n" for text in _texts(count, "pictures/{:07d}.png"))


def _write_json(path: Path, count: int) -> None:
    with path.open("w") as stream:
        for number, text in enumerate(_texts(count, "pictures/{:07d}.png")):
            stream.write(f"{',' if number else '['}\n{text}")
        stream.write("]\n")


def _write_shards(folder: Path, count: int) -> None:
    """Shards of ``SHARD`` samples with a record and a picture each, and the index that ``energon prepare`` would write."""
    (folder / ".nv-meta").mkdir(parents=True)
    database = sqlite3.connect(folder / ".nv-meta" / "index.sqlite")
    database.execute(
        "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL, "
        "byte_offset INTEGER, byte_size INTEGER)"
    )
    texts, counts = _texts(count, "0.png"), {}
    for shard, first in enumerate(range(0, count, SHARD)):
        name, offset, rows = f"{shard:06d}.tar", 0, []
        with (folder / name).open("wb") as stream:
            for place in range(min(SHARD, count - first)):
                key = f"{first + place:08d}"
                parts = (("json", next(texts).encode()), ("0.png", PICTURE))
                blocks = b"".join(_member(f"{key}.{part}", content) for part, content in parts)
                rows.append((shard, key, place, offset, len(blocks)))
                offset += stream.write(blocks)
            stream.write(bytes(2 * tarfile.BLOCKSIZE))
        database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", rows)
        counts[name] = len(rows)
    database.execute("CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index)")
    database.commit()
    database.close()
    (folder / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": counts}))
    (folder / ".nv-meta" / "split.yaml").write_text(json.dumps({"split_parts": {"train": list(counts)}}))


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


_WRITERS = {"shards": _write_shards, "jsonl": _write_jsonl, "json": _write_json}

if __name__ == "__main__":
    main()
