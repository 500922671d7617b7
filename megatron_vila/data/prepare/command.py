"""Prepare samples for training: any files of records become Energon WebDataset shards with small videos (docs/prepare_data.md).

The exit status is 0 if all samples were prepared, 1 if some are bad and were left out, 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megatron_vila.data.formats.detect import FORMATS
from megatron_vila.data.prepare.options import POOR, PRESETS, Options
from megatron_vila.errors import SettingError, entry_point

DEFAULT = "models/longvila-7b"
"""Whose pictures are prepared where no configuration is given."""


@entry_point
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    for name, values in (("--out", [options.out]), ("a source", options.sources)):
        if "" in values:
            raise SettingError(f"{name} is empty (''); name a folder{'' if name == '--out' else ' or a file'}")
    # Imported late: --help needs no torch.
    from megatron_vila.data.prepare.report import summary
    from megatron_vila.data.prepare.run import only_finish, prepare

    part, parts = _part(options)
    task = _task(options, parts)
    whole = True
    if options.ray:
        from megatron_vila.data.prepare.on_ray import prepare_on_ray

        tally = prepare_on_ray(task)
    elif options.finish:
        tally = only_finish(task)
    else:
        tally, whole = prepare(task, part)
    print(summary(tally) if whole else f"part {part} of {parts}: {summary(tally)}")
    if whole:
        print(f"use it with data.train=[{options.out}]; {options.out}/report.html is the report")
    return 1 if tally.bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = asdict(Options())
    parser.add_argument("sources", nargs="+", help="files or folders with records")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument(
        "--format", choices=FORMATS, default="", help="what keeps the records (default: what is found there)"
    )
    parser.add_argument(
        "--media-dir", default="", help="folder that paths of media start at (default: that of each source)"
    )
    parser.add_argument(
        "--ignore-fields", nargs="+", action="extend", default=[], metavar="NAME", help="fields that only look like media"
    )
    parser.add_argument(
        "--config", default=DEFAULT, help=f"YAML file or preset of the model that will be trained (default: {DEFAULT})"
    )
    parser.add_argument("--tokenizer", default="", help="tokenizer, to count tokens for the report")
    media = parser.add_argument_group("videos and pictures")
    media.add_argument("--short-side", type=int, help="pixels of a video's short side (default: what the model reads)")
    media.add_argument(
        "--fps", type=float, default=default["fps"], help="frames of a second of video; 0: all (%(default)s)"
    )
    media.add_argument(
        "--key-distance",
        type=int,
        default=default["key_distance"],
        help="frames from one key frame to the next (%(default)s)",
    )
    media.add_argument(
        "--crf", type=int, default=default["crf"], help="quality of x264, smaller is better (%(default)s)"
    )
    media.add_argument("--preset", choices=PRESETS, default=default["preset"], help="speed of x264 (%(default)s)")
    media.add_argument(
        "--min-psnr",
        type=float,
        default=default["min_psnr"],
        metavar="DB",
        help="least quality against the source (%(default)s)",
    )
    media.add_argument(
        "--poor",
        choices=POOR,
        default=default["poor"],
        help="videos below it are reported, or taken as they are (%(default)s)",
    )
    media.add_argument(
        "--picture-side",
        type=int,
        default=default["picture_side"],
        help="pixels of a picture's long side (%(default)s)",
    )
    media.add_argument(
        "--picture-quality",
        type=int,
        default=default["picture_quality"],
        help="of a picture that is made smaller (%(default)s)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--shard-mib", type=int, default=default["shard_bytes"] >> 20, help="largest shard in MiB (%(default)s)"
    )
    work.add_argument("--processes", type=int, help="media prepared at once (default: one for each core)")
    work.add_argument(
        "--max-bad",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of bad samples that ends the work (%(default)s)",
    )
    how = work.add_mutually_exclusive_group()
    how.add_argument("--part", metavar="I/N", help="do part I (from 0) of N; the one that is done last makes the index")
    how.add_argument("--finish", action="store_true", help="only make index and report of parts that are all done")
    how.add_argument(
        "--ray", type=int, metavar="N", help="do N parts on the Ray cluster of RAY_ADDRESS, or on this machine"
    )
    return parser


def _part(options: argparse.Namespace) -> tuple[int | None, int]:
    """The number of the part to do, None for all, and how many there are."""
    if options.finish:
        from megatron_vila.data.prepare.state import parts_of

        return None, parts_of(Path(options.out))
    if options.ray is not None and options.ray < 1:
        raise SettingError(f"--ray {options.ray} must be a number of parts, 1 or more")
    if options.part is None:
        return None, options.ray or 1
    found = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", options.part)
    if not found or int(found[1]) >= int(found[2]):
        raise SettingError(f"--part {options.part} must be I/N with I from 0 to N - 1, as 0/16")
    return int(found[1]), int(found[2])


def _task(options: argparse.Namespace, parts: int):
    from megatron_vila.config.load import load_config
    from megatron_vila.data.prepare.run import Task, cores

    config = load_config(options.config)
    config.data.tokenizer = options.tokenizer or config.data.tokenizer
    given = {each.name: getattr(options, each.name) for each in fields(Options) if hasattr(options, each.name)}
    if options.short_side is None:
        given["short_side"] = config.model.vision.image_size
    for name, value in (("--out", options.out), ("--media-dir", options.media_dir)):
        if "://" in value:
            raise SettingError(f"{name} {value} must be a folder of this machine; for another storage, copy the folder")
    if options.media_dir and not os.path.isdir(options.media_dir):
        raise SettingError(f"--media-dir {options.media_dir} is not a folder; name the folder that paths of media start at")
    if not 0 <= options.max_bad <= 1:
        raise SettingError(f"--max-bad {options.max_bad:g} is out of range; use 0 to 1")
    if not 1 <= options.shard_mib <= 2**20:
        raise SettingError(f"--shard-mib {options.shard_mib} is out of range; use 1 to {2**20}")
    if options.processes is not None and options.processes < 0:
        raise SettingError(f"--processes {options.processes} must be 0 (none beside this one) or more")
    chosen = Options(**given, shard_bytes=options.shard_mib << 20, parts=parts)
    return Task(
        # Absolute: tasks on other machines may stand elsewhere.
        paths=tuple(map(_absolute, options.sources)),
        out=_absolute(options.out),
        format=options.format,
        options=chosen,
        media_dir=_absolute(options.media_dir),
        ignore_fields=tuple(options.ignore_fields),
        processes=cores() if options.processes is None else options.processes,
        max_bad=options.max_bad,
        config=config,
    )


def _absolute(path: str) -> str:
    return path if not path or "://" in path else os.path.abspath(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
