"""Read thousands of damaged media files as a run does, and look for anything but a usable sample or a ``MediaError``.

    python tools/mutate_media.py --count 5000

Small videos and pictures of many formats are made, and from each of them files with flipped bits, cut ends, exchanged and
repeated pieces and odd numbers in the header. Every file is planned and decoded in a child process, a batch to a process, so that
a crash is seen and belongs to a file. The same seed gives the same files. The status is 1 if a file crashed its process, took too
long, or raised another exception; these files are kept.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.data.images import load_image, preprocess
from megatron_vila.data.media import MediaError
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video import VideoReader, probe_video

SIDE, FRAMES = 64, 24
BATCH = 50
LIMIT_S = 60.0
"""Seconds for one file, after which it counts as hanging."""

MEMORY_BYTES = 4 * 2**30
"""Address space that a child may take beyond what it has at its start."""

VIDEOS = {
    "mp4": ("mp4", "libx264", {}),
    "faststart": ("mp4", "libx264", {"movflags": "faststart"}),
    "fragmented": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "hevc": ("mp4", "libx265", {}),
    "mov": ("mov", "mpeg4", {}),
    "mkv": ("mkv", "libx264", {}),
    "webm": ("webm", "libvpx", {}),
    "vp9": ("webm", "libvpx-vp9", {}),
    "avi": ("avi", "mpeg4", {}),
    "mjpeg": ("avi", "mjpeg", {}),
    "ts": ("ts", "libx264", {}),
    "mpeg2ts": ("ts", "mpeg2video", {}),
    "mpg": ("vob", "mpeg2video", {}),
    "flv": ("flv", "flv", {}),
    "wmv": ("wmv", "wmv2", {}),
}
PICTURES = {
    "png": ("PNG", {}),
    "palette": ("PNG", {"mode": "P"}),
    "gray16": ("PNG", {"mode": "I;16"}),
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "gif": ("GIF", {"save_all": True}),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True}),
    "animated": ("WEBP", {"save_all": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiffjpeg": ("TIFF", {"compression": "jpeg"}),
    "ppm": ("PPM", {}),
    "avif": ("AVIF", {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="another number gives other damage")
    parser.add_argument("--minutes", type=float, default=60, help="the run ends after this time, with what was done")
    parser.add_argument("--keep", type=Path, default=Path("mutated_media"), help="folder for files that show a fault")
    args = parser.parse_args()
    started_s = time.monotonic()
    counts, faults, largest_mib = run(args.count, args.seed, args.minutes * 60, args.keep)
    print(
        f"{counts.total()} files in {time.monotonic() - started_s:.0f} s: {counts['used']} used, {counts['refused']} refused, "
        f"{counts['faulty']} faulty; the one that took most memory took {largest_mib:.0f} MiB"
    )
    for name, what in faults:
        print(f"{args.keep / name}: {what}")
    return 1 if faults else 0


def run(count: int, seed: int, limit_s: float, keep: Path) -> tuple[Counter, list[tuple[str, str]], float]:
    """Damage and read ``count`` files.

    Gives how many were used, refused or faulty, (file, fault) of the latter, and the most MiB that reading one took.
    """
    counts, faults, largest_mib, end_s = Counter(), [], 0.0, time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
        files = mutations(seeds, Path(folder), count, seed)
        while (batch := list(itertools.islice(files, BATCH))) and time.monotonic() < end_s:
            for path, what, mib in read_batch(batch):
                largest_mib = max(largest_mib, mib)
                counts[what if what in ("used", "refused") else "faulty"] += 1
                if what not in ("used", "refused"):
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / path.name).write_bytes(path.read_bytes())
                    faults.append((path.name, what))
                path.unlink()
            if sys.stderr.isatty():
                print(f"\r{sum(counts.values())} of {count}", end="", file=sys.stderr)
    return counts, faults, largest_mib


def read_batch(paths: list[Path]) -> Iterator[tuple[Path, str, float]]:
    """Each file with what came of it and the MiB that it took.

    A file that ends its process or takes too long is followed by a new process.
    """
    context, todo = multiprocessing.get_context("fork"), list(paths)
    while todo:
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=_read_all, args=(todo, writer), daemon=True)
        child.start()
        writer.close()
        for path in list(todo):
            try:
                what, mib = reader.recv() if reader.poll(LIMIT_S) else (f"took more than {LIMIT_S:.0f} s", 0.0)
            except EOFError:
                child.join()
                what, mib = f"ended the process with status {child.exitcode}", 0.0
            todo.remove(path)
            yield path, what, mib
            if what.startswith(("took", "ended")):
                child.kill()
                break
        child.join()


def _read_all(paths: list[Path], writer) -> None:
    """Body of a child process: what came of each file, in order."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries write there about each damaged file
    for path in paths:
        Path("/proc/self/clear_refs").write_text("5")
        before_mib = _status_mib("VmRSS")
        try:
            _use(path)
            what = "used"
        except MediaError:
            what = "refused"
        except BaseException as error:
            what = f"raised {type(error).__name__}: {error}"
        writer.send((what, _status_mib("VmHWM") - before_mib))


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _use(path: Path) -> None:
    """Plan and decode a file as the loader does."""
    if path.name.split("-")[0] in PICTURES:
        preprocess([load_image(path)], 28, "pad")
        return
    info = probe_video(path)
    for fps, rule in ((0.0, "spread"), (2.0, "spread"), (2.0, "first")):
        indices = sample_frame_indices(info, 6, fps, rule).tolist()
        with VideoReader(info, indices) as reader:
            for index in indices:
                preprocess([reader.frame(index)], 28)


def make_seeds(folder: Path) -> dict[str, bytes]:
    """Whole files to damage: name to content."""
    seeds, random = {}, np.random.default_rng(0)
    pixels = np.kron(random.integers(0, 256, (FRAMES, 16, 16, 3), dtype=np.uint8), np.ones((1, 4, 4, 1), np.uint8))
    for name, (suffix, codec, options) in VIDEOS.items():
        path = folder / f"seed-{name}.{suffix}"
        quiet = {"x265-params": "log-level=error:pools=none"} if codec == "libx265" else {}
        with av.open(str(path), "w", options=options) as out:
            stream = out.add_stream(codec, rate=8, options={"g": "8", "threads": "1", **quiet})
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for picture in pixels:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        seeds[name] = path.read_bytes()
    for name, (kind, options) in PICTURES.items():
        path, options = folder / f"seed-{name}", dict(options)
        first, *rest = (Image.fromarray(picture).convert(options.pop("mode", "RGB")) for picture in pixels[:3])
        if options.get("save_all"):
            options["append_images"] = rest
        exif = Image.Exif()
        exif[0x0112] = 6
        first.save(path, format=kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}), **options)
        seeds[name] = path.read_bytes()
    return seeds


def mutations(seeds: dict[str, bytes], folder: Path, count: int, seed: int) -> Iterator[Path]:
    """``count`` damaged files, the formats in turn, each with one to three kinds of damage."""
    names, contents = list(seeds), list(seeds.values())
    for number in range(count):
        random = np.random.default_rng((seed, number))
        name = names[number % len(names)]
        data = bytearray(seeds[name])
        for _ in range(random.integers(1, 4)):
            damage = DAMAGE[random.integers(len(DAMAGE))]
            data = damage(data, random, contents[random.integers(len(contents))]) or bytearray(b"\0")
        path = folder / f"{name}-{number}"
        path.write_bytes(data)
        yield path


def _flip_bits(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    for place in random.integers(len(data), size=random.integers(1, 2 ** random.integers(1, 7) + 1)):
        data[place] ^= 1 << random.integers(8)
    return data


def _cut(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    return data[: random.integers(len(data)) + 1]


def _splice(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    """A piece of another file, in place of a piece or in between."""
    begin, end = sorted(random.integers(len(other) + 1, size=2))
    place = random.integers(len(data))
    return data[:place] + other[begin:end] + data[place + (end - begin) * random.integers(2) :]


def _repeat(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    begin, end = sorted(random.integers(len(data) + 1, size=2))
    return data[:end] + data[begin:end] + data[end:]


def _remove(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    begin = random.integers(len(data))
    return data[:begin] + data[begin + random.integers(1, 65) :]


def _edit_header(data: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    """Numbers that a parser may trust: small, large, negative; among the first bytes, or after a name of a box."""
    for _ in range(random.integers(1, 5)):
        width = int(random.choice([1, 2, 4, 8]))
        value = int(random.choice([0, 1, 2**7, 2**15 - 1, 2**31 - 1, 2**31, 2**32 - 1])) % 2 ** (8 * width)
        names = [i for i in range(len(data) - 4) if data[i : i + 4].isalpha()] if random.integers(2) else []
        place = int(random.choice(names)) + int(random.integers(-4, 24)) if names else int(random.integers(256))
        place = max(0, min(place, len(data) - width))
        data[place : place + width] = value.to_bytes(width, "little" if random.integers(2) else "big")
    return data


DAMAGE = (_flip_bits, _cut, _splice, _repeat, _remove, _edit_header, _edit_header)

if __name__ == "__main__":
    sys.exit(main())
