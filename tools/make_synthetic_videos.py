"""Make synthetic long videos with questions (LLaVA format) and a tokenizer for them: see megatron_vila/data/synthetic.py.

Example: python tools/make_synthetic_videos.py data/synthetic --frames 1 4 16 32 --train 512 --eval 256 --images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.busy import busy, counted
from megatron_vila.data.synthetic import ANSWERS, corpus, write_synthetic_set
from megatron_vila.errors import UserError, entry_point


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--frames", type=int, nargs="*", default=[1, 4, 16, 32], help="steps of the videos, one set per number"
    )
    parser.add_argument("--train", type=int, default=512, help="training samples of each set")
    parser.add_argument("--eval", type=int, default=256, help="held-out samples of each set")
    parser.add_argument(
        "--kinds", nargs="+", default=["colour"], choices=list(ANSWERS), help="what the questions ask for"
    )
    parser.add_argument("--images", action="store_true", help="also write a set of single pictures")
    parser.add_argument("--size", type=int, default=56, help="side of the pictures in pixels")
    parser.add_argument("--fps", type=int, default=8, help="frames per second of the video files")
    parser.add_argument("--hold", type=int, default=1, help="frames of the file for each step, the needle's length too")
    parser.add_argument("--codec", default="libx264", choices=["libx264", "mpeg4"], help="video encoder")
    parser.add_argument("--vocab-size", type=int, default=512, help="largest vocabulary of the tokenizer")
    parser.add_argument(
        "--fill", action="store_true", help="fill the vocabulary up to --vocab-size with unused pieces"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")
    args = parser.parse_args()
    total = (len(args.frames) + args.images) * (args.train + args.eval)
    try:
        with counted("videos and pictures" if args.images else "videos", total) as on_sample:
            written = write_synthetic_set(
                args.out,
                args.frames,
                args.train,
                args.eval,
                kinds=args.kinds,
                images=args.images,
                size=args.size,
                fps=args.fps,
                hold=args.hold,
                codec=args.codec,
                seed=args.seed,
                on_sample=on_sample,
            )
        with busy("a tokenizer for the questions"):
            # Imported late: --help needs no transformers.
            from megatron_vila.data.tokenizer import train_tokenizer

            tokenizer = train_tokenizer(corpus(), args.out / "tokenizer", args.vocab_size, args.fill)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error}; name another folder or free space") from error
    for path in written:
        print(path)
    print(f"{args.out / 'tokenizer'}: {len(tokenizer)} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
