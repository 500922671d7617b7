"""The command line of ``tools/evaluate.py``: one sub-command for each evaluation."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vila import parent
from megatron_vila.busy import CurrentStdout, busy, counted
from megatron_vila.errors import SettingError, entry_point
from megatron_vila.evaluation.grid import MODES, Cell, grid
from megatron_vila.evaluation.results import RESULTS_FILE, Results, percent, resume
from megatron_vila.exit_codes import FINISHED
from megatron_vila.plan.cache_memory import CACHE_DTYPES

if TYPE_CHECKING:
    from megatron_vila.failing.watch import Watch

SYNTHETIC = "synthetic"
TIMEOUT = "--timeout-minutes"
"""Folder in the output for a haystack and needles that the test makes."""

HEAT_MAP_FILE = "needle.png"

_NEEDLE = """Hide a picture in a long video and ask the model for it: docs/evaluation.md.

python tools/evaluate.py needle runs/quickstart/stage_4 --frames 8,16,32,64 --out runs/needle
python tools/evaluate.py needle MODEL --frames 300,600,1200 --haystack movie.mp4 --needles needles.json --out runs/needle
torchrun --nproc-per-node 8 tools/evaluate.py needle MODEL --ulysses 4 --ring 2 --frames 6000 --out runs/needle
"""


@entry_point
def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. Under a launcher every rank calls it."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="evaluate.py", description="Measure what a trained model can do.")
    commands = made.add_subparsers(required=True, metavar="EVALUATION")
    needle = commands.add_parser(
        "needle",
        help="needle in a video haystack: frames x depth, a heat map",
        description=_NEEDLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    needle.set_defaults(run=_needle)
    needle.add_argument("model", help="a run's folder, a checkpoint, an imported or a Hugging Face folder")
    needle.add_argument(
        "--out", type=Path, required=True, help="folder for needle.json and needle.png, or a test to go on with"
    )
    needle.add_argument(
        "--frames", type=_whole_numbers, required=True, metavar="8,16,...", help="frames, needle included"
    )
    needle.add_argument(
        "--depths", type=_numbers, default=[0, 25, 50, 75, 100], metavar="0,25,...", help="depths in percent"
    )
    needle.add_argument(
        "--mode", default=MODES[0], choices=MODES,
        help="generate: answers are written with the cache and compared as text; teacher-forcing: the paper's test",
    )  # fmt: skip
    needle.add_argument("--haystack", help="a long video file, or a folder of pictures (default: a synthetic one)")
    needle.add_argument(
        "--needles", help="JSON list of objects with image, question and answer; needed with --haystack"
    )
    needle.add_argument(
        "--fps", type=float, default=1.0, help="frames per second that are taken of a video file (default 1)"
    )
    needle.add_argument(
        "--synthetic-needles", type=int, default=5, help="needles that are made without --needles (default 5)"
    )
    needle.add_argument(
        "--trained-frames", type=int, help="longest trained video, marked in the map (default: that of the run)"
    )
    needle.add_argument("--restart", action="store_true", help="begin anew, even if --out holds results")
    needle.add_argument("--tp", type=int, default=1, help="tensor parallel ranks (default 1)")
    needle.add_argument("--ulysses", type=int, default=0, help="ranks that share the heads (default: chosen)")
    needle.add_argument("--ring", type=int, default=0, help="ranks that share the tokens (default: chosen)")
    needle.add_argument(
        "--cache", choices=CACHE_DTYPES, default="auto", help="dtype of keys and values (auto: the model's)"
    )
    needle.add_argument("--chunk-tokens", type=int, default=0, help="tokens that are read at once (default: chosen)")
    needle.add_argument("--tokenizer", default="", help="tokenizer of the model, if its own is not there any more")
    needle.add_argument(TIMEOUT, type=float, default=30.0, help="how long ranks wait for one another (default 30)")
    return made


def _whole_numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _needle(options: argparse.Namespace) -> int:
    if (options.haystack is None) != (options.needles is None):
        given, missing = ("haystack", "needles") if options.haystack is not None else ("needles", "haystack")
        raise SettingError(
            f"--{given} needs --{missing}, since questions must suit the video; leave out both for synthetic ones"
        )
    cells = grid(options.frames, options.depths)
    return _on_ranks(options.timeout_minutes, lambda watch, is_first: _run_needle(options, cells, watch, is_first))


def _run_needle(options: argparse.Namespace, cells: Sequence[Cell], watch: Watch, is_first: bool) -> None:
    """The test on ranks that have met; ``is_first``: the one that writes and prints."""
    from megatron_vila.evaluation import haystack as hay
    from megatron_vila.evaluation.needle import NeedleTest
    from megatron_vila.generate.loading import load_model
    from megatron_vila.parallel.agreement import on_rank_zero

    watch.at(0, "loading the model")
    longest = max(cell.frames for cell in cells)
    source, needles_file = on_rank_zero(lambda: _material(options, longest))
    haystack = hay.open_haystack(source, options.fps, max(1, longest - 1))
    needles = hay.read_needles(needles_file)
    with busy("loading the model") if is_first else contextlib.nullcontext():
        loaded = load_model(
            options.model,
            tp=options.tp,
            ulysses=options.ulysses,
            ring=options.ring,
            cache=options.cache,
            chunk_tokens=options.chunk_tokens,
            tokenizer=options.tokenizer,
            timeout_minutes=options.timeout_minutes,
        )
    settings = {
        "model": loaded.identity,
        "mode": options.mode,
        # A longer synthetic haystack begins alike; its file is another one.
        "haystack": hay.digest_of_haystack(haystack) if options.haystack is not None else SYNTHETIC,
        "fps": options.fps,
        "needles": hay.digest_of_needles(needles),
        "cache": options.cache,
    }
    file = options.out / RESULTS_FILE
    trained = options.trained_frames or loaded.config.data.num_frames
    results = on_rank_zero(lambda: resume(file, settings, trained, options.restart))
    left = sum((cell.frames, cell.depth) not in results.cells for cell in cells)
    if is_first and left < len(cells):
        print(f"{len(cells) - left} of {len(cells)} cells are in {file}")
    with contextlib.closing(loaded), _counted(left * len(needles), is_first) as count:

        def asked() -> None:
            watch.at(sum(len(cell.answers) for cell in results.cells.values()), "asking for needles")
            count()

        test = NeedleTest(loaded, haystack, needles, options.mode)
        test.run(cells, results, lambda: on_rank_zero(lambda: results.write(file)), asked)
    on_rank_zero(lambda: _show(results, options, Path(options.model).name))


def _counted(questions: int, is_first: bool) -> contextlib.AbstractContextManager[Callable[[], None]]:
    return counted("questions", questions) if is_first else contextlib.nullcontext(lambda: None)


def _material(options: argparse.Namespace, longest: int) -> tuple[str, str]:
    """Paths of haystack and needles: those of the command line, or of synthetic ones that are made in the output."""
    if options.haystack is not None:
        return options.haystack, options.needles
    from megatron_vila.data.synthetic import write_needle_set

    with busy("making a synthetic haystack and needles"):
        made = write_needle_set(options.out / SYNTHETIC, max(1, longest - 1), options.synthetic_needles)
    return str(made[0]), str(made[1])


def _show(results: Results, options: argparse.Namespace, name: str) -> None:
    """The map as a file, and what it says in lines."""
    # Imported late: matplotlib takes a second.
    from megatron_vila.evaluation.heat_map import draw_heat_map

    how = "answers generated" if options.mode == MODES[0] else "teacher forcing"
    draw_heat_map(results, options.out / HEAT_MAP_FILE, f"Needle in a video haystack: {name}, {how}")
    for line in lines_of(results):
        print(line)
    print(f"heat map: {options.out / HEAT_MAP_FILE}, every answer: {options.out / RESULTS_FILE}")


def lines_of(results: Results) -> list[str]:
    """A table of scores in percent, a line for each depth, and the means."""
    frames = sorted({frames for frames, _ in results.cells})
    depths = sorted({depth for _, depth in results.cells})
    lines = ["frames  " + "".join(f"{count:>7,}" for count in frames)]
    for depth in depths:
        cells = (results.cells.get((count, depth)) for count in frames)
        lines.append(
            f"{depth:>5g} %  " + "".join("      -" if cell is None else f"{percent(cell.score):>7}" for cell in cells)
        )
    means = [("all cells", results.mean())]
    if results.trained_frames is not None:
        trained = f"trained lengths (up to {results.trained_frames} frames)"
        means = [(trained, results.mean(True)), ("beyond", results.mean(False))]
    lines += [f"{name}: {percent(mean)} %" for name, mean in means if mean is not None]
    return lines


def _on_ranks(timeout_minutes: float, run: Callable[[Watch, bool], None]) -> int:
    """``run`` on all ranks of a launcher, or on a lone one; it is told whether this is rank 0. Returns the exit code.

    A rank that fails or does not come ends the others.
    """
    rank = int(os.environ.get("RANK", 0))
    parent.end_with_parent()
    warnings.filterwarnings("ignore", module=r"(torch|megatron\.core|transformers|cutlass|nvidia_cutlass_dsl)\b")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[CurrentStdout()])
    with busy("starting: torch, Megatron-Core and transformers") if rank == 0 else contextlib.nullcontext():
        from megatron_vila import accelerator

        accelerator.prepare()
        # Imported late: Megatron-Core must be prepared for this machine first.
        from megatron_vila import processes
        from megatron_vila.failing import failures
        from megatron_vila.failing.watch import Watch
    reporter = failures.Reporter("give the same command again: it goes on where it was")
    try:
        processes.meet(timeout_minutes, TIMEOUT)
        with Watch(timeout_minutes, reporter, setting=TIMEOUT) as watch:
            processes.init_distributed(timeout_minutes)
            run(watch, processes.rank_and_world()[0] == 0)
            processes.end_distributed()
            watch.part()
    except BaseException as error:
        return reporter.report(error)
    return FINISHED
