"""``python -m megatron_vila.generate MODEL --video hour.mp4 --ask "..."``: answers questions about long videos.

Text goes to stdout as it is written, everything else to stderr. Under torchrun all ranks share one question. Exit codes are those
of ``exit_codes.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vila import exit_codes, parent
from megatron_vila.busy import LastingConsole, busy
from megatron_vila.errors import SettingError, UserError, entry_point
from megatron_vila.plain_files import replace_file
from megatron_vila.plan.cache_memory import CACHE_DTYPES
from megatron_vila.streams import leave, tell

if TYPE_CHECKING:
    from megatron_vila.failing.failures import Reporter
    from megatron_vila.failing.watch import Watch
    from megatron_vila.generate.loaded import LoadedModel, Reply
    from megatron_vila.generate.prompt import Pictures

_MOMENTS = 5
"""Moments that --timestamps names."""
TIMEOUT = "--timeout-minutes"


@entry_point
def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    rank = int(os.environ.get("RANK", 0))
    parent.end_with_parent()
    warnings.filterwarnings("ignore", module=r"(torch|megatron\.core|transformers|cutlass|nvidia_cutlass_dsl)\b")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logging.StreamHandler(sys.stderr)])
    logging.getLogger("megatron_vila").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    with _busy("starting: torch, Megatron-Core and transformers"):
        from megatron_vila import accelerator

        accelerator.prepare()
        # Imported late: Megatron-Core must be prepared for this machine first.
        from megatron_vila.failing import failures
    reporter = failures.Reporter("give the same command again")
    try:
        return _run(options, reporter)
    except BaseException as error:
        return reporter.report(error)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process (2) with a message if it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vila.generate",
        description="Ask a trained model about long videos and pictures.",
        epilog="On several GPUs: torchrun --nproc-per-node 8 -m megatron_vila.generate ... docs/inference.md tells more.",
    )
    parser.add_argument("model", help="folder of a run, a checkpoint, an import or a Hugging Face model")
    add = parser.add_argument_group("what is asked").add_argument
    add("--video", action="append", default=[], metavar="FILE", help="video file or folder of pictures; may be repeated")
    add("--image", action="append", default=[], metavar="FILE", help="picture; may be repeated")
    add("--ask", action="append", metavar="TEXT", help="question; may be repeated (default: asked for on a terminal)")
    add("--frames", type=int, metavar="N", help="most frames of a video (default: as in training)")
    add("--fps", type=float, metavar="F", help="most frames of a second of video (default: as in training)")
    add("--start", metavar="TIME", help="where the video begins, as 90, 1:30 or 0:01:30")
    add("--end", metavar="TIME", help="where it ends")
    add = parser.add_argument_group("answers").add_argument
    add("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens that have this probability")
    add("--top-k", type=int, default=0, metavar="K", help="draw among so many likeliest tokens; 0: all")
    add("--seed", type=int, default=0, metavar="S", help="seed of what is drawn")
    add(
        "--timestamps", nargs="?", const="", metavar="PNG",
        help="tell which moments of the video got most attention; PNG: and draw them",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write questions, answers and figures")
    add = parser.add_argument_group("what is kept").add_argument
    add("--save-snapshot", metavar="FOLDER", help="keep what was read, for later questions")
    add("--snapshot", metavar="FOLDER", help="ask about what was kept in place of a video")
    add = parser.add_argument_group("how it runs").add_argument
    add("--cache", choices=CACHE_DTYPES, default="auto", help="dtype of keys and values (auto: the model's)")
    add("--precision", choices=("auto", "bf16", "fp32", "fp64"), default="auto", help="auto: bf16 on GPUs, fp32 on CPUs")
    add("--tp", type=int, default=1, help="tensor parallel ranks (1)")
    add("--ulysses", type=int, default=0, help="ranks that share the heads (default: chosen)")
    add("--ring", type=int, default=0, help="ranks that share the tokens (default: chosen)")
    add("--chunk-tokens", type=int, default=0, metavar="N", help="tokens read at once (default: chosen)")
    add("--attention", default="auto", help="attention kernel, as model.attention")
    add("--tokenizer", default="", metavar="FOLDER", help="tokenizer of the model, if its own is not there any more")
    add(TIMEOUT, type=float, default=30.0, metavar="M", help="how long ranks wait for one another (30)")
    options = parser.parse_args(arguments)
    has_media = bool(options.video or options.image)
    if options.snapshot and (has_media or options.save_snapshot or options.frames or options.fps or options.start or options.end):
        parser.error("--snapshot stands for media that were read: leave out --video, --image and what belongs to them")
    if options.save_snapshot and not has_media:
        parser.error("--save-snapshot keeps what was read of media: give --video or --image")
    if options.timestamps is not None and not (options.video or options.image or options.snapshot):
        parser.error("--timestamps tells moments of a video: give --video")
    if not options.ask and not sys.stdin.isatty():
        parser.error("there is no question: give --ask TEXT, or start it on a terminal")
    if not 0 < options.timeout_minutes <= 10**5:
        parser.error(f"{TIMEOUT} {options.timeout_minutes} must be above 0 and at most 100000")
    return options


def _busy(text: str) -> contextlib.AbstractContextManager:
    return busy(text, LastingConsole(stderr=True)) if _is_first() else contextlib.nullcontext()


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _run(options: argparse.Namespace, reporter: Reporter) -> int:
    import torch

    from megatron_vila import processes
    from megatron_vila.failing.watch import Watch

    # First of all, so that what a single rank finds wrong is told and ends the others.
    processes.meet(options.timeout_minutes, TIMEOUT)
    with Watch(options.timeout_minutes, reporter, setting=TIMEOUT) as watch:
        processes.init_distributed(options.timeout_minutes)
        try:
            _Session(options, watch).run()
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"the GPU's memory is full ({error}); ask with fewer frames (--frames), read fewer tokens at once "
                "(--chunk-tokens), keep a smaller cache (--cache fp8), or use more GPUs (--ring)"
            ) from error
        processes.end_distributed()
        watch.part()
    return exit_codes.FINISHED


@contextlib.contextmanager
def _told_of(option: str) -> Iterator[None]:
    """What the operating system refuses within the block is told as a matter of ``option``."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{option} cannot be written: {error}; name another file") from error


class _Session:
    """One command: the model, its media, and the questions one after the other. All ranks go through it alike; rank 0 talks."""

    def __init__(self, options: argparse.Namespace, watch: Watch) -> None:
        self._options, self._watch = options, watch
        self._results: list[dict[str, Any]] = []
        self._model: LoadedModel

    def run(self) -> None:
        from megatron_vila.generate.loading import load_model
        from megatron_vila.generate.prompt import media_of, seconds
        from megatron_vila.generate.sampling import Sampling

        options = self._options
        # What can be wrong with these is told before the model is loaded, which may take minutes.
        start, end = (None if time is None else seconds(time) for time in (options.start, options.end))
        media = media_of(options.image, options.video, start, end)
        sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
        Sampling(**sampling)
        self._watch.at(0, "loading the model")
        with _busy(f"loading {options.model}"):
            self._model = load_model(
                options.model,
                tp=options.tp,
                ulysses=options.ulysses,
                ring=options.ring,
                precision=options.precision,
                cache=options.cache,
                chunk_tokens=options.chunk_tokens,
                attention=options.attention,
                tokenizer=options.tokenizer,
                timeout_minutes=options.timeout_minutes,
            )
        self._sampling = self._model.sampling(**sampling)
        try:
            pictures = self._taken_up() if options.snapshot else self._model.prompts.choose(media, options.frames, options.fps)
            if options.ask:
                self._answer(options.ask, pictures)
            else:
                self._read_ahead(pictures)
                for number, question in enumerate(self._questions()):
                    self._watch.at(number + 1, "answering a question")
                    try:
                        self._answer([question], pictures)
                    except UserError as error:  # alike on all ranks: of the question, which another one can follow
                        if not pictures or self._model.prefix is None:
                            raise
                        if _is_first():
                            tell(f"megatron_vila: {error}")
        finally:
            self._model.close()

    def _taken_up(self) -> Pictures:
        """The media of the snapshot, which is held from now on."""
        from megatron_vila.generate import snapshot

        folder, model, engine = self._options.snapshot, self._model, self._model.engine
        content_of = model.pictures.hashes.of
        self._watch.at(0, "reading the snapshot")
        with _busy(f"reading {folder}"):
            prefix = snapshot.load(
                folder, model.topology, model.identity, engine.span_shape, engine.cache_dtype, content_of
            )
        model.hold(prefix)
        return model.pictures_of(prefix)

    def _read_ahead(self, pictures: Pictures) -> None:
        """Read the media before the first question is there."""
        if pictures:
            document = self._model.prompts.document("?", pictures)
            with self._reading(pictures) as progress:
                self._model.read(document, progress, self._options.max_new_tokens)
            self._keep()

    @contextlib.contextmanager
    def _reading(self, pictures: Pictures) -> Iterator[Any]:
        from megatron_vila.generate.progress import reading

        self._watch.at(0, "reading the media")
        frames = sum(unit.unit.frames for units in pictures for unit in units)
        shown = _is_first() and self._model.prefix is None
        with reading(frames, self._model.config.model.llm, shown) as progress:
            yield progress

    def _keep(self) -> None:
        """Save the snapshot that was asked for, once."""
        folder, self._options.save_snapshot = self._options.save_snapshot, None
        model, prefix = self._model, self._model.prefix
        if folder and prefix is not None:
            from megatron_vila.generate import snapshot

            self._watch.at(0, "saving the snapshot")
            with _busy(f"saving {folder}"):
                snapshot.save(folder, prefix, model.topology, model.identity, model.pictures.hashes.of)

    def _questions(self) -> Iterator[str]:
        """Lines of the terminal of rank 0, on all ranks, until its end (Ctrl-D)."""
        import torch.distributed as dist

        while True:
            line: list[str | None] = [None]
            if _is_first():
                with contextlib.suppress(EOFError):
                    tell("question (Ctrl-D ends):")
                    line[0] = input()
            dist.broadcast_object_list(line, src=0)
            if line[0] is None:
                return
            if line[0].strip():
                yield line[0]

    def _answer(self, questions: Sequence[str], pictures: Pictures) -> None:
        from megatron_vila.generate.progress import StreamedText, say

        options, model = self._options, self._model
        documents = [model.prompts.document(question, pictures) for question in questions]
        if pictures:
            with self._reading(pictures) as progress:
                model.read(documents[0], progress, len(questions) * options.max_new_tokens)
            self._keep()
        self._watch.at(0, "answering")
        streamed = StreamedText(model.text)
        several = len(questions) > 1
        if several and _is_first():
            say(f"> {questions[0]}")

        def on_token(row: int, token: int) -> None:
            # The first answer is shown as it is written; the others are written in the same steps.
            if not row and _is_first():
                streamed.token(token)

        replies = model.answer(questions, pictures, self._sampling, on_token=on_token)
        for number, reply in enumerate(replies):
            if _is_first():
                if not number:
                    streamed.finish(reply.text)
                else:
                    say(f"> {reply.question}\n{reply.text}")
            self._tell(reply)
        self._write_json()

    def _tell(self, reply: Reply) -> None:
        """The figures of an answer, and the moments that it comes from."""
        told = {
            "question": reply.question,
            "answer": reply.text,
            "stopped_by": reply.stopped_by,
            "token_ids": reply.token_ids.tolist(),
            "frames": reply.frames,
            "prompt_tokens": reply.prompt_tokens,
            "first_token_s": reply.first_token_s,
            "decode_s": reply.decode_s,
        }
        if self._options.timestamps is not None:
            told["moments"] = self._moments(reply)
        self._results.append(told)
        if _is_first():
            rate = ""
            if len(reply.token_ids) > 1 and reply.decode_s:
                rate = f", then {(len(reply.token_ids) - 1) / reply.decode_s:.1f} tokens/s"
            tell(
                f"{reply.frames:,} frames, {reply.prompt_tokens:,} tokens; first token after {reply.first_token_s:.2f} s{rate}"
                + ("; cut off by --max-new-tokens" if reply.stopped_by == "length" else "")
            )

    def _moments(self, reply: Reply) -> list[dict[str, Any]]:
        from megatron_vila.generate import timestamps
        from megatron_vila.generate.frame_attention import frame_attention
        from megatron_vila.generate.progress import say

        model = self._model
        if model.prefix is None:
            return []
        weights = frame_attention(model.engine, model.prefix, reply.tail, reply.token_ids)
        if not _is_first():
            return []
        document, probe = model.prefix.document, model.chooser.probe
        times = timestamps.unit_seconds(document, probe)
        found = timestamps.moments(document, weights, times, _MOMENTS)
        say("seen at " + ", ".join(f"{timestamps.label(m, times)} ({100 * m.weight:.2g} %)" for m in found))
        if self._options.timestamps:
            path = Path(self._options.timestamps)
            if len(self._results):
                path = path.with_stem(f"{path.stem}-{len(self._results) + 1}")
            pictures = timestamps.pictures_of(document, found, probe)
            with _told_of(f"--timestamps {path}"):
                timestamps.draw_strip(path, found, pictures, weights, times, reply.question)
                timestamps.write_json(path.with_suffix(".frames.json"), document, found, weights, times)
        return [
            {"time": timestamps.label(m, times), "seconds": m.seconds, "source": m.source, "weight": m.weight} for m in found
        ]

    def _write_json(self) -> None:
        if self._options.json and _is_first():
            text = json.dumps({"model": str(self._model.folder), "answers": self._results}, indent=1, ensure_ascii=False)
            with _told_of(f"--json {self._options.json}"):
                replace_file(Path(self._options.json), lambda place: place.write_text(text + "\n", encoding="utf-8"))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
