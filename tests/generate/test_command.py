"""``python -m megatron_vila.generate`` as users start it: answers on stdout, one message for what they can cure, no hang."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_vila.exit_codes import FINISHED, USER_ERROR
from megatron_vila.generate.__main__ import main, parse
from megatron_vila.generate.progress import StreamedText, work
from tests.data.material import cut_off, write_video
from tests.generate import material
from tests.ranks import pool

QUESTION = "Which colour flashed in the video?"
ROOT = Path(__file__).parents[2]


def on_rank(rank: int, world: int, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each command on this rank."""
    results = []
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    try:
        for arguments in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(arguments)
            results.append((status, out.getvalue(), err.getvalue()))
            logging.root.handlers.clear()
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        logging.getLogger("megatron_vila").setLevel(logging.NOTSET)
    return results


def commanded(*arguments: str) -> tuple[int, str, str]:
    """One process."""
    ((result,),) = pool.run(1, on_rank, 1, [list(map(str, arguments))])
    return result


def refused(*arguments: str) -> str:
    status, out, err = commanded(*arguments)
    assert status == USER_ERROR and not out, err
    assert err.count("megatron_vila: ") == 1 and "Traceback" not in err
    return err


def on_a_terminal(rank: int, arguments: list[str], lines: str) -> tuple[int, str, str]:
    """The command with ``lines`` typed on a terminal, then its end (Ctrl-D)."""
    master, slave = os.openpty()
    os.write(master, f"{lines}\n".encode() + b"\x04")
    stdin = sys.stdin
    try:
        with os.fdopen(slave) as sys.stdin:
            return on_rank(rank, 1, [arguments])[0]
    finally:
        sys.stdin = stdin
        os.close(master)


@pytest.fixture(scope="module")
def truth(run):
    loading, asking = {}, {"videos": [str(run / "long.mp4")], "num_frames": 12, "max_new_tokens": 5}
    ((said, _),) = pool.run(1, material.answer, str(run / "run"), [QUESTION, "Who?"], loading, asking)
    return [text for text, _, _ in said]


def test_questions_are_answered_on_stdout_and_everything_is_written_where_it_was_asked_for(run, tmp_path, truth):
    video, snapshot = run / "long.mp4", tmp_path / "snapshot"
    status, out, err = commanded(
        run / "run", "--video", video, "--frames", "12", "--ask", QUESTION, "--ask", "Who?", "--max-new-tokens", "5",
        "--timestamps", tmp_path / "strip.png", "--json", tmp_path / "out.json", "--save-snapshot", snapshot,
    )  # fmt: skip
    assert status == FINISHED, err
    lines = out.splitlines()
    assert f"> {QUESTION}" in lines and "> Who?" in lines
    assert out.count("seen at 0:00:0") == 2 and "12 frames" in err and "cut off by --max-new-tokens" in err
    assert all(text in out for text in truth)
    answers = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert [answer["answer"] for answer in answers] == truth
    assert answers[0]["frames"] == 12 and len(answers[0]["moments"]) > 0
    assert (tmp_path / "strip.png").stat().st_size and (tmp_path / "strip-2.png").stat().st_size
    assert len(json.loads((tmp_path / "strip-2.frames.json").read_text())["units"]) == 12
    # The answers are there before a file that cannot be written ends the command.
    (tmp_path / "taken").write_text("no folder")
    for option in ("--json", "--timestamps"):
        asking = (run / "run", "--video", video, "--frames", "2", "--ask", "Who?", "--max-new-tokens", "2")
        status, out, err = commanded(*asking, option, tmp_path / "taken/x.png")
        assert status == USER_ERROR and out and f"{option} {tmp_path}/taken/x.png cannot be written" in err
    # The second day: the video is not needed any more.
    video.rename(tmp_path / "gone.mp4")
    try:
        again, out, err = commanded(run / "run", "--snapshot", snapshot, "--ask", "Who?", "--max-new-tokens", "5")
    finally:
        (tmp_path / "gone.mp4").rename(video)
    assert again == FINISHED and out.strip() == truth[1], err


def test_on_a_terminal_each_line_is_a_question_and_one_that_cannot_be_asked_does_not_end_it(run, truth):
    about = [str(run / "run"), "--video", str(run / "long.mp4"), "--frames", "12", "--max-new-tokens", "5"]
    ((status, out, err),) = pool.run(1, on_a_terminal, about, f"{QUESTION}\n\n<image><image> same?\nWho?")
    assert status == FINISHED, err
    assert [line for line in out.splitlines() if line] == truth
    assert err.count("megatron_vila: ") == 1 and "holds 2 markers <image>" in err
    assert err.count("12 frames, ") == 2


def test_what_a_user_can_cure_is_one_message_and_nothing_on_stdout(run, tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video")
    half = cut_off(write_video(tmp_path / "half.mp4", 6))
    os.mkfifo(tmp_path / "endless.mp4")
    model, ask = run / "run", ("--ask", "Who?")
    for arguments, words in (
        ((model, "--video", tmp_path / "none.mp4", *ask), "none.mp4: no such file"),
        ((model, "--video", tmp_path / "text.mp4", *ask), "text.mp4: not a video that can be read"),
        ((model, "--video", half, *ask), "half.mp4"),
        ((model, "--video", tmp_path / "endless.mp4", *ask), "endless.mp4: not a regular file but a pipe"),
        ((model, "--video", run / "long.mp4", "--ask", "<video><video> same?"), "2 markers <video>, and there are 0 images"),
        ((model, "--video", run / "long.mp4", "--start", "9:99x", *ask), "'9:99x' is not a time"),
        ((model, "--snapshot", tmp_path / "nothing", *ask), "nothing cannot be taken up"),
        ((model, "--temperature", "-1", *ask), "temperature=-1.0 must be 0 or more"),
        ((run / "videos", *ask), "holds neither checkpoints"),
    ):
        assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m"], "there is no question"),
        (["m", "--ask", "a", "--snapshot", "s", "--video", "v"], "--snapshot stands for media"),
        (["m", "--ask", "a", "--save-snapshot", "s"], "give --video or --image"),
        (["m", "--ask", "a", "--timestamps"], "give --video"),
        (["m", "--ask", "a", "--cache", "int4"], "invalid choice"),
        (["m", "--ask", "a", "--timeout-minutes", "0"], "must be above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_loaded(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == USER_ERROR and words in capsys.readouterr().err


def test_text_is_written_in_whole_characters_as_tokens_come(capsys):
    pieces = {1: b"caf", 2: b"\xc3", 3: b"\xa9", 4: b" noir"}
    streamed = StreamedText(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    seen = []
    for token in (1, 2, 3, 4):
        streamed.token(token)
        seen.append(capsys.readouterr().out)
    streamed.finish("café noir.")
    assert seen == ["caf", "", "é", " noir"] and capsys.readouterr().out == ".\n"


def test_later_tokens_count_for_more_in_the_time_that_is_left():
    llm = material.load_config("longvila-7b-stage5").model.llm
    assert work(llm, 2 * 10**6) > 3 * work(llm, 10**6) > 0
    assert work(llm, 2000) < 2.1 * work(llm, 1000)


def test_two_ranks_answer_as_one_and_a_killed_rank_ends_the_other(run, truth):
    """Under torchrun, with the command's own processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_vila.generate"]
    command += [str(run / "run"), "--video", str(run / "long.mp4"), "--frames", "12", "--chunk-tokens", "32", "--ask", QUESTION]
    # A story that is longer than the rank that is killed lives.
    command += ["--max-new-tokens", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        patience = threading.Timer(240, started.kill)
        patience.start()
        assert started.stdout is not None
        assert started.stdout.read(len(truth[0])) == truth[0]  # as it is written
        ranks = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), 9)
        _, err = started.communicate()
        patience.cancel()
    assert started.returncode != FINISHED and "SIGKILL" in err
