"""The needle test on a small random model, as the command runs it: what is asked, what is kept, what is refused.

Functions that take ``rank`` first run on the rank pool.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.synthetic import write_needle_set
from megatron_vila.evaluation import needle as module
from megatron_vila.evaluation.command import main
from megatron_vila.evaluation.grid import GENERATE, TEACHER_FORCING, Cell
from megatron_vila.evaluation.haystack import Needle, open_haystack, read_needles
from megatron_vila.evaluation.needle import NeedleTest, normalized, together
from megatron_vila.evaluation.results import Answered, Results
from megatron_vila.exit_codes import FINISHED, INTERRUPTED, USER_ERROR
from megatron_vila.generate import load
from megatron_vila.generate.engine import Request
from megatron_vila.generate.sampling import Sampling
from tests.generate import material
from tests.ranks import pool

GRID = ["--frames", "3,7", "--depths", "0,50,100"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a random model in ``run/``, ``haystack.mp4`` and ``needles.json``."""
    folder = tmp_path_factory.mktemp("needle")
    material.make_files(folder)
    write_needle_set(folder, 12, 3, size=28)
    pool.run(1, material.save_run, str(folder), (1, 1, 1, 1))
    return folder


def command(rank, arguments, stop_after=None):
    """The exit status of the command, and what it said. Ctrl-C comes after so many cells were written."""
    said, write, written = io.StringIO(), Results.write, []

    def interrupted(results, path):
        written.append(write(results, path))
        if len(written) == stop_after:
            raise KeyboardInterrupt

    Results.write = interrupted
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main(arguments), said.getvalue()
    finally:
        Results.write = write


def evaluate(run, out, *more, world=1, grid=GRID, stop_after=None):
    given = ["--haystack", str(run / "haystack.mp4"), "--needles", str(run / "needles.json")]
    arguments = ["needle", str(run / "run"), "--out", str(out), *grid, *given, *more]
    return pool.run(world, command, arguments, stop_after)[0]


def answers(out):
    """Each cell's answers in ``out``, without the time that it took."""
    stored = json.loads((out / "needle.json").read_text())
    return {
        (cell["frames"], cell["depth"]): (cell["place"], cell["tokens"], cell["answers"]) for cell in stored["cells"]
    }


@pytest.fixture(scope="module")
def truth(run):
    """What one process that nobody interrupts finds."""
    status, said = evaluate(run, run / "truth")
    assert status == FINISHED, said
    return answers(run / "truth")


def test_every_cell_is_asked_for_every_needle_and_drawn(run, truth):
    assert list(truth) == [(frames, depth) for frames in (3, 7) for depth in (0, 50, 100)]
    assert [place for place, *_ in truth.values()] == [0, 1, 2, 0, 3, 6]
    assert all([answer["needle"] for answer in found] == [0, 1, 2] for *_, found in truth.values())
    assert len({answer["answer"] for *_, found in truth.values() for answer in found}) > 2, "needle and place matter"
    assert Image.open(run / "truth/needle.png").width > 600


def test_two_ranks_that_read_in_chunks_give_the_same_answers(run, truth, tmp_path):
    status, said = evaluate(run, tmp_path, "--ulysses", "2", "--chunk-tokens", "16", world=2)
    assert status == FINISHED, said
    assert answers(tmp_path) == truth


def _alone(rank, folder, grid_of):
    """The answers when each video is asked alone, read over the one before; and the frames that were encoded for all."""
    module._AT_ONCE = 1
    loaded = load(folder, chunk_tokens=16)
    try:
        haystack, needles = open_haystack(grid_of[0], 1, 6), read_needles(grid_of[1])
        results = Results({})
        test = NeedleTest(loaded, haystack, needles, GENERATE)
        test.run(
            [Cell(frames, depth) for frames in (3, 7) for depth in (0, 50, 100)], results, lambda: None, lambda: None
        )
        said = {place: [answer.answer for answer in cell.answers] for place, cell in results.cells.items()}
        return said, loaded.pictures.counts.encoded
    finally:
        module._AT_ONCE = 65536
        loaded.close()


def test_long_videos_are_asked_one_by_one_and_each_frame_is_encoded_once(run, truth):
    files = str(run / "haystack.mp4"), str(run / "needles.json")
    ((said, encoded),) = pool.run(1, _alone, str(run / "run"), files)
    assert said == {place: [answer["answer"] for answer in found] for place, (*_, found) in truth.items()}
    assert encoded == 6 + 3  # the haystack and the needles


def test_an_interrupted_test_goes_on_with_the_cells_that_are_left(run, truth, tmp_path):
    status, _ = evaluate(run, tmp_path, stop_after=4)
    assert status == INTERRUPTED and len(answers(tmp_path)) == 4
    status, said = evaluate(run, tmp_path)
    assert status == FINISHED and "4 of 6 cells are in" in said and "questions: 6 of 6" in said
    assert answers(tmp_path) == truth


def test_a_map_grows_and_other_settings_are_refused(run, truth, tmp_path):
    shutil.copytree(run / "truth", tmp_path, dirs_exist_ok=True)
    assert evaluate(run, tmp_path, grid=["--frames", "4", "--depths", "0"])[0] == FINISHED
    grown = answers(tmp_path)
    assert grown.pop((4, 0)) and grown == truth
    status, said = evaluate(run, tmp_path, "--mode", TEACHER_FORCING)
    assert status == USER_ERROR and "mode was 'generate', now 'teacher-forcing'" in said and "--restart" in said
    assert len(answers(tmp_path)) == 7
    assert evaluate(run, tmp_path, "--mode", TEACHER_FORCING, "--restart", grid=["--frames", "3"])[0] == FINISHED
    assert len(answers(tmp_path)) == 5  # the five depths that are asked for by default


def test_without_files_a_synthetic_haystack_is_made_and_may_get_longer(run, tmp_path):
    arguments = ["needle", str(run / "run"), "--out", str(tmp_path), "--depths", "100", "--synthetic-needles", "2"]
    for frames in ("1,3", "5"):
        ((status, said),) = pool.run(1, command, [*arguments, "--frames", frames])
        assert status == FINISHED, said
    assert [place for place, *_ in answers(tmp_path).values()] == [0, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "3", "--haystack", "none.mp4"], "--haystack needs --needles"),
        (["--frames", "0,3"], "--frames 0,3"),
        (["--frames", "3", "--depths", "120"], "--depths 120"),
    ],
)
def test_what_cannot_be_asked_is_told_at_once(tmp_path, capsys, arguments, message):
    assert main(["needle", "none", "--out", str(tmp_path), *arguments]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_used_are_told_before_a_model_is_loaded(run, tmp_path):
    arguments = ["needle", "none", "--out", str(tmp_path), "--frames", "3"]
    for more, message in (
        (["--haystack", "none.mp4", "--needles", str(run / "needles.json")], "none.mp4"),
        (["--haystack", str(run / "haystack.mp4"), "--needles", "none.json"], "none.json"),
        (["--synthetic-needles", "0"], "needles=0"),
        ([], "none is not a folder"),
    ):
        ((status, said),) = pool.run(1, command, [*arguments, *more])
        assert status == USER_ERROR and message in said and "Traceback" not in said


def _questions(rank, run, needles, cell):
    loaded = load(f"{run}/run")
    try:
        test = NeedleTest(loaded, open_haystack(f"{run}/haystack.mp4", 1, 6), needles, GENERATE)
        asked = [test.question(cell, needle) for needle in needles]
        tails = [loaded.engine.split(question.prompt)[1] for question in asked]
        return [(q.prompt, tail, q.forced, q.places) for q, tail in zip(asked, tails, strict=True)], loaded.config
    finally:
        loaded.close()


def test_the_model_is_asked_in_the_words_and_tokens_of_its_training(run, tmp_path):
    """Training would see a video, a folder of pictures, with the same question and answer."""
    needles = read_needles(run / "needles.json")
    needles = (*needles, Needle(needles[0].picture, needles[0].question, "It was red, not\nblue"))
    ((asked, config),) = pool.run(1, _questions, str(run), needles, Cell(7, 50))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(7):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    said = [((f"<video>\n{needle.question}"), needle.answer) for needle in needles]
    records = [
        {"video": str(folder), "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in said
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    config.data.num_frames = 7
    from megatron_vila.data.tokenizer import load_tokenizer

    source = JsonFiles([str(tmp_path / "train.json")])
    dataset = VilaDataset(source, load_tokenizer(config.data.tokenizer), config.data, config.model, 4096)
    stops = set(dataset.encoder.stops)
    for number, (prompt, tail, forced, places) in enumerate(asked):
        document = dataset.build(number).document
        (answered,) = np.nonzero(document.labels >= 0)
        assert document.labels[answered[-1]] in stops
        answered = answered[:-1]
        np.testing.assert_array_equal(prompt.token_ids, document.token_ids[: answered[0] + 1])
        first = len(prompt) - len(tail)
        np.testing.assert_array_equal(forced, document.token_ids[first : answered[-1] + 1])
        np.testing.assert_array_equal(first + places, answered)
        assert [frame.source for frame in prompt.frames] == [str(run / "haystack.mp4")] * 3 + [
            needles[number].picture
        ] + [str(run / "haystack.mp4")] * 3
        assert [frame.indices for frame in prompt.frames] == [(0,), (1,), (2,), (0,), (3,), (4,), (5,)]


def _forced(rank, run, cell):
    """What teacher forcing takes for answers, and what the model writes next behind each beginning of the right ones."""
    loaded = load(f"{run}/run")
    try:
        haystack, (first, second, _) = open_haystack(f"{run}/haystack.mp4", 1, 6), read_needles(f"{run}/needles.json")
        needles = first, Needle(second.picture, second.question, "It was red, not blue")
        test, results, stepwise = NeedleTest(loaded, haystack, needles, TEACHER_FORCING), Results({}), []
        test.run([cell], results, lambda: None, lambda: None)
        for needle in needles:
            question = test.question(cell, needle)
            prefix, _ = loaded.read(question.prompt)
            tails = [question.forced[: place + 1] for place in question.places]
            asked = [Request(prefix, tail) for tail in tails]
            ids = [answer.token_ids for answer in loaded.engine.answer(asked, Sampling(max_new_tokens=1))]
            stepwise.append((len(ids), loaded.text(np.concatenate(ids))))
        return [answer.answer for answer in results.cells.popitem()[1].answers], stepwise, test._judged(0, " Red. ")
    finally:
        loaded.close()


def test_teacher_forcing_takes_the_likeliest_token_behind_each_beginning_of_the_answer(run):
    ((forced, stepwise, judged),) = pool.run(1, _forced, str(run), Cell(7, 50))
    assert [text for _, text in stepwise] == forced and stepwise[0][0] == 1 < stepwise[1][0]
    assert judged == Answered(0, "red", " Red. ", True)


def test_answers_are_compared_by_letters_and_digits():
    assert normalized(" The  Red-One. ") == normalized("theredone") and normalized("٣") != normalized("4")
    assert normalized("red") != normalized("red red") and normalized("?") == "?" and normalized("ＲＥＤ") == "red"


def test_prompts_are_asked_together_while_they_are_short():
    assert together([30000, 30000, 6000, 70000, 80000, 1]) == [[0, 1], [2], [3], [4], [5]]
    assert together([1] * 5) == [[0, 1, 2, 3, 4]]
