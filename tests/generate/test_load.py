"""Models are loaded from whatever holds their weights, and answer alike; what cannot be loaded is told with its cure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.data.tokenizer import train_tokenizer
from tests.generate import material
from tests.ranks import pool

QUESTION = "Which colour flashed in the video?"


def ask(folder, world: int = 1, question=QUESTION, loading=None, **asking):
    """The answers, the same on all ranks, and the frames that each rank encoded."""
    ranks = pool.run(world, material.answer, str(folder), question, loading or {}, asking)
    assert all(said == ranks[0][0] for said, _ in ranks)
    return ranks[0][0], [encoded for _, (encoded, _) in ranks]


def refused(folder, world: int = 1, question=QUESTION, loading=None, **asking) -> str:
    """The text of the error, the same on all ranks."""
    texts = {text for _, text in pool.run(world, material.refusal, str(folder), question, loading or {}, asking)}
    (text,) = texts
    return text


@pytest.fixture(scope="module")
def truth(run):
    """What the model says to one process."""
    said, encoded = ask(run / "run", videos=[str(run / "long.mp4")], num_frames=12)
    (text, token_ids, frames) = said[0]
    assert encoded == [12] and frames == 12 and text and len(set(token_ids)) > 2
    return said


def test_a_checkpoint_of_any_layout_gives_the_same_answer_on_one_rank_and_on_two(run, truth):
    video = {"videos": [str(run / "long.mp4")], "num_frames": 12}
    pool.run(2, material.save_run, str(run), (1, 2, 1, 1), 0, "of_pp")
    assert ask(run / "of_pp/checkpoints/step-00000003", **video)[0] == truth
    for sizes in ({"tp": 2}, {}):
        said, encoded = ask(run / "of_pp", 2, loading={"chunk_tokens": 64, **sizes}, **video)
        assert said == truth and encoded == [6, 6]


def test_an_exported_folder_is_imported_once_and_answers_as_the_run_does(run, truth, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exported = export_checkpoint(run / "run", tmp_path / "hf")
    loading = {"tokenizer": str(run / "tokenizer")}
    cache = str(tmp_path / "cache")
    for _ in range(2):
        (answers,) = pool.run(1, _answer_with_cache, cache, str(exported), QUESTION, loading, str(run / "long.mp4"))
        assert answers == truth
        (imported,) = Path(cache, "megatron_vila/imported").glob("hf-*")
        marker = imported / "seen"
        before = marker.exists()
        marker.touch()
    assert before  # the second time it was there


def _answer_with_cache(rank: int, cache: str, folder: str, question: str, loading: dict, video: str):
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    try:
        said, _ = material.answer(rank, folder, question, loading, {"videos": [video], "num_frames": 12})
        return said
    finally:
        del os.environ["XDG_CACHE_HOME"]


def test_the_updates_of_lora_are_part_of_the_answer(run, truth):
    pool.run(1, material.save_run, str(run), (1, 1, 1, 1), 4, "of_lora")
    said, _ = ask(run / "of_lora", videos=[str(run / "long.mp4")], num_frames=12)
    assert said != truth


def test_several_questions_and_pictures_are_answered_as_each_alone_and_frames_are_encoded_once(run):
    media = {"videos": [str(run / "long.mp4")], "images": [str(next((run / "images").glob("*.png")))]}
    questions = [QUESTION, "Name the shape that flashed in the video."]
    together, encoded = ask(run / "run", question=questions, num_frames=7, **media)
    assert encoded == [8]
    alone = [ask(run / "run", question=question, num_frames=7, **media)[0][0] for question in questions]
    assert together == alone
    assert ask(run / "run", question="Say something.")[0][0][2] == 0


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        ({"ring": 2}, "1 processes are not tp*ulysses*ring = 1*1*2 = 2"),
        ({"precision": "int4"}, "precision=int4 is unknown; use auto, bf16, fp32, fp64"),
        ({"cache": "int4"}, "cache=int4 is unknown; use auto, bf16"),
        ({"tokenizer": "nowhere"}, "name the tokenizer's folder with --tokenizer"),
        ({"attention": "best"}, "best"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_those_that_can(run, loading, words):
    assert words in refused(run / "run", loading=loading)


def test_folders_that_hold_no_model_are_told(run, tmp_path):
    assert "is not a folder" in refused(tmp_path / "nothing")
    assert "holds neither checkpoints" in refused(run / "videos")
    (tmp_path / "checkpoints").mkdir()
    assert "no finished checkpoint there" in refused(tmp_path, 2)


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    other = tmp_path / "other"
    train_tokenizer(["quite another text, of other words and letters: xyz"], other, 512, fill=True)
    assert "its ids mean other text; name that one's folder with --tokenizer" in refused(
        run / "run", loading={"tokenizer": str(other)}
    )


def test_the_tokenizer_beside_the_checkpoints_serves_where_the_one_of_training_is_gone(run, tmp_path, truth):
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    pool.run(1, material.save_run, str(tmp_path), (1, 1, 1, 1))
    (tmp_path / "tokenizer").rename(tmp_path / "run" / "tokenizer")
    said, _ = ask(tmp_path / "run", videos=[str(run / "long.mp4")], num_frames=12)
    assert said == truth


def test_a_closed_model_lets_go_of_a_prefix_that_was_taken_up(run):
    assert pool.run(1, material.held_after_close, str(run / "run")) == [False]


def test_more_frames_than_the_memory_holds_are_refused_with_the_number_that_fits(run):
    (said,) = pool.run(1, material.in_little_memory, str(run / "run"), 80)
    refused_all, fitting, one_more = said
    assert f"these {material.LONG} frames" in refused_all and "frames would fit: ask with --frames" in refused_all
    assert "use more GPUs (--ring 2)" in refused_all and not fitting and "would fit" in one_more
