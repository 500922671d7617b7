"""Synthetic videos: what is asked can be seen in the needle's frames and nowhere else."""

import collections
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vila.data.images import load_image
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.synthetic import (
    ANSWERS,
    COLORS,
    DIGITS,
    SHAPES,
    Needle,
    corpus,
    render,
    symbol_mask,
    write_synthetic_set,
    write_video,
)
from megatron_vila.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_vila.data.video import decode_video_frames, probe_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic")
    write_synthetic_set(out, [1, 6], train=16, evaluation=8, images=True)
    write_synthetic_set(out / "held", [5], train=8, evaluation=8, hold=4, fps=24)
    return out


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def pictures(folder, record):
    if "image" in record:
        return np.asarray(load_image(folder / record["image"]))[None]
    path = folder / record["video"]
    return np.stack([np.asarray(p) for p in decode_video_frames(path, range(probe_video(path).num_frames))])


def answer(record):
    return record["conversations"][1]["value"]


def seen(clip_THWC, color):
    """Pixels of each frame that are close to ``color``."""
    return (np.abs(clip_THWC.astype(int) - COLORS[color]).max(-1) < 50).sum((1, 2))


@pytest.mark.parametrize("name", ["train_1", "eval_1", "train_6", "eval_6", "train_image", "eval_image"])
def test_the_answer_stands_in_the_needle_frame_and_nowhere_else(folder, name):
    for record in records(folder, name):
        clip = pictures(folder, record)
        assert len(clip) == (6 if name.endswith("6") else 1)
        found = {color: seen(clip, color) for color in COLORS}
        needle = record["needle_frame"]
        assert found[answer(record)][needle] > 40
        for color, count in found.items():
            count[needle] = 0 if color == answer(record) else count[needle]
            assert count.max() < 40


def test_answers_are_equally_frequent_and_needles_stand_at_any_place(folder):
    for name in ("train_1", "train_6", "eval_6", "train_image"):
        counts = collections.Counter(map(answer, records(folder, name)))
        assert set(counts) == set(COLORS) and len(set(counts.values())) == 1
    assert len({r["needle_frame"] for r in records(folder, "train_6")}) >= 4


def test_records_are_llava_format_and_no_two_share_a_video(folder):
    paths = []
    for name, medium in (("train_6", "video"), ("eval_6", "video"), ("train_image", "image"), ("eval_image", "image")):
        for record in records(folder, name):
            asked, answered = record["conversations"]
            assert (asked["from"], answered["from"]) == ("human", "gpt")
            assert asked["value"].startswith(f"<{medium}>\n") and "colour" in asked["value"]
            paths.append(record[medium])
    assert len(set(paths)) == len(paths)
    assert len({(folder / path).read_bytes() for path in paths}) == len(paths)


def test_backgrounds_change_between_and_within_videos(folder):
    clips = np.stack([pictures(folder, r) for r in records(folder, "train_6")]).astype(int)
    assert np.abs(clips[1:] - clips[:-1]).mean((1, 2, 3, 4)).min() > 5
    assert np.abs(np.diff(clips, axis=1)).mean((2, 3, 4)).min() > 1


def test_one_uniformly_sampled_frame_falls_into_each_step(folder):
    for steps, hold in ((1, 1), (5, 1), (5, 4), (32, 8), (17, 250)):
        assert (sample_frame_indices((steps * hold, 24.0), steps) // hold).tolist() == list(range(steps))
    for record in records(folder / "held", "train_5"):
        info = probe_video(folder / "held" / record["video"])
        assert (info.num_frames, round(info.fps)) == (20, 24)
        clip = pictures(folder / "held", record)[sample_frame_indices(info, 5)]
        assert np.flatnonzero(seen(clip, answer(record)) > 40).tolist() == [record["needle_frame"] // 4]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    def content(name, seed):
        write_synthetic_set(tmp_path / name, [3], train=8, evaluation=0, images=True, seed=seed, kinds=["shape"])
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    first = content("a", 1)
    assert len(first) == 8 + 8 + 2
    assert content("b", 1) == first
    other = content("c", 2)
    assert other.keys() == first.keys() and not [k for k in first if other[k] == first[k]]


def test_each_kind_of_question_has_its_own_answers(tmp_path):
    write_synthetic_set(tmp_path, [2], train=48, evaluation=0, kinds=["colour", "shape", "digit"])
    answers = collections.defaultdict(collections.Counter)
    for record in records(tmp_path, "train_2"):
        kind = next(k for k in ANSWERS if k in record["conversations"][0]["value"])
        answers[kind][answer(record)] += 1
    assert {kind: dict(found) for kind, found in answers.items()} == {
        k: dict.fromkeys(v, 2) for k, v in ANSWERS.items()
    }


def test_symbols_can_be_told_apart():
    axis = np.linspace(-1, 1, 40)
    u_HW, v_HW = np.meshgrid(axis, axis)
    for symbols in (SHAPES, tuple(DIGITS)):
        masks = np.stack([symbol_mask(s, u_HW, v_HW) for s in symbols])
        assert len(symbols) == 8 and masks.any((1, 2)).all()
        apart = (masks[:, None] != masks[None]).sum((2, 3))[~np.eye(8, dtype=bool)]
        assert apart.min() > 40


def test_a_video_of_thousands_of_frames_is_drawn_in_pieces(tmp_path):
    rng = np.random.default_rng(0)
    pieces = [len(clip) for clip in render(3000, 16, Needle(1500, "red", "disc"), 1, rng)]
    assert sum(pieces) == 3000 and max(pieces) <= 64
    write_video(tmp_path / "long.mp4", render(3000, 16, Needle(1500, "red", "square"), 1, rng), 16, 24)
    assert probe_video(tmp_path / "long.mp4").num_frames == 3000
    around = np.stack([np.asarray(p) for p in decode_video_frames(tmp_path / "long.mp4", [1499, 1500, 1501])])
    assert (seen(around, "red") > 10).tolist() == [False, True, False]


def test_mpeg4_files_show_the_needle_too(tmp_path):
    write_synthetic_set(tmp_path, [4], train=8, evaluation=0, codec="mpeg4")
    for record in records(tmp_path, "train_4"):
        assert seen(pictures(tmp_path, record), answer(record)).argmax() == record["needle_frame"]


def test_a_tokenizer_trained_on_the_corpus_writes_each_answer_as_one_token(tmp_path):
    tokenizer = train_tokenizer(corpus(), tmp_path, 512)
    for answers in ANSWERS.values():
        for text in answers:
            assert len(tokenizer.tokenize(text)) == 1, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["smell"]}, "smell"),
        ({"kinds": []}, "kinds"),
        ({"size": 57}, "even number"),
        ({"lengths": [0]}, "lengths"),
        ({"hold": 0}, "hold=0"),
        ({"train": -1}, "train=-1"),
    ],
)
def test_sets_that_cannot_be_drawn_are_refused(tmp_path, change, message):
    arguments = {"lengths": [2], "train": 1, "evaluation": 1, **change}
    with pytest.raises(ValueError, match=message):
        write_synthetic_set(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_set_and_its_tokenizer(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_synthetic_videos.py", str(tmp_path / "set"), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "make_synthetic_videos.py"), run_name="__main__")
        return ended.value.code

    assert run("--frames", "2", "--train", "8", "--eval", "8") == 0
    assert len(records(tmp_path / "set", "train_2")) == len(records(tmp_path / "set", "eval_2")) == 8
    assert load_tokenizer(tmp_path / "set" / "tokenizer").chat_template
    assert "train_2.json" in capsys.readouterr().out
    assert run("--size", "15") == 2 and "size=15" in capsys.readouterr().err
