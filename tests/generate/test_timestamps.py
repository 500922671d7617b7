"""Moments of a video: who gets on the list, what they are called, and what a picture and a file of them hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_vila import accelerator, processes
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.data.synthetic import write_video
from megatron_vila.generate.frame_attention import FrameAttention
from megatron_vila.generate.timestamps import (
    clock,
    draw_strip,
    label,
    media_numbers,
    moments,
    pictures_of,
    unit_seconds,
    write_json,
)
from megatron_vila.parallel.cache import Span, SpanShape
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, FrameRef

ONE = Unit(1, 1, 2, 16)


def _document(frames) -> Document:
    """A frame every three tokens: text, then its two."""
    ids = np.array([1, MEDIA_TOKEN, MEDIA_TOKEN] * len(frames), np.int64)
    return Document(ids, np.full(len(ids), IGNORE), tuple(frames), np.arange(len(frames)) * 3 + 1, "asked")


def _video(name: str, count: int, every: int = 1) -> list[FrameRef]:
    return [FrameRef(name, (i * every,), True, ONE) for i in range(count)]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four frames a second for ten seconds; frame i is gray 6 i."""
    path = tmp_path_factory.mktemp("video") / "gray.mp4"
    write_video(path, (np.full((1, 64, 64, 3), 6 * i, np.uint8) for i in range(40)), 64, 4)
    return path


def test_a_planted_frame_wins_and_has_the_share_that_its_keys_were_given():
    """Keys of one frame point where the queries do; of two layers one is looked at."""
    accelerator.prepare()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        topology = ParallelTopology.create(ParallelConfig())
        document = _document(_video("v", 9))
        span = Span.empty(SpanShape(2, 2, 4), len(document), torch.float64, torch.device("cpu"))
        planted = document.frame_starts[6] + np.arange(2)
        k = torch.zeros(len(document), 2, 4, dtype=torch.float64)
        for layer in range(2):
            k[planted, :, 0] = math.log(50.0) if layer else 0.0
            span.write(layer, k, k)
        span.commit(np.arange(len(document)))
        seen = FrameAttention((span,), topology, 1.0, range(28, 32), layers=[1])
        seen.begin_chunk(np.array([0, 4]), 3, 27)  # the last token is padding, and no query of it counts
        q = torch.zeros(4, 4, 4, dtype=torch.float64)
        q[:3, :, 0] = 1.0
        total = 25 + 2 * 50 + 2  # plain keys, the planted ones, and two keys of the tail without direction
        for layer in range(2):
            seen.on_queries(layer, q, torch.full((4, 4), math.log(total), dtype=torch.float64))
        weights = seen.weights(document, 4)
    finally:
        processes.end_distributed()
    np.testing.assert_allclose(weights, np.where(np.arange(9) == 6, 100, 2) / total, rtol=1e-12)
    assert [moment.unit for moment in moments(document, weights, np.arange(9.0), count=1)] == [6]


def test_neighbors_of_a_stronger_frame_stay_off_the_list_but_not_those_of_another_video():
    document = _document([*_video("a", 10), *_video("b", 10)])
    seconds = np.tile(np.arange(10.0), 2)
    weights = np.full(20, 0.001)
    weights[[4, 5, 6, 9, 14]] = 0.5, 0.6, 0.4, 0.3, 0.2
    found = moments(document, weights, seconds, count=3, apart_s=1.5)
    assert [(m.rank, m.unit, m.medium, m.source, m.index) for m in found] == [
        (1, 5, 0, "a", 5),
        (2, 9, 0, "a", 9),
        (3, 14, 1, "b", 4),
    ]
    assert [m.unit for m in moments(document, weights, seconds, count=3, apart_s=0)] == [5, 4, 6]


def test_without_a_distance_moments_may_be_four_times_closer_than_spread_evenly():
    document, seconds = _document(_video("a", 101)), np.arange(101.0)
    found = moments(document, np.linspace(0.1, 0.2, 101), seconds, count=5)
    assert [m.unit for m in found] == [100, 95, 90, 85, 80]
    assert len(moments(_document(_video("a", 3)), np.ones(3), np.arange(3.0), count=8)) == 3


def test_pictures_have_numbers_and_no_neighbors():
    document = _document([FrameRef(f"{i}.png", (0,), False, ONE) for i in range(3)])
    seconds = unit_seconds(document)
    assert np.isnan(seconds).all()
    found = moments(document, np.array([0.1, 0.3, 0.2]), seconds)
    assert [(m.unit, m.seconds) for m in found] == [(1, None), (2, None), (0, None)]
    assert media_numbers(document).tolist() == [0, 1, 2]


def test_times_are_those_of_the_file(video):
    document = _document(_video(str(video), 5, every=9))
    np.testing.assert_allclose(unit_seconds(document), [0, 2.25, 4.5, 6.75, 9])


@pytest.mark.parametrize(
    ("seconds", "tenths", "text"),
    [(0, False, "0:00:00"), (59.99, False, "0:00:59"), (3600 * 11 + 61, False, "11:01:01"), (7.25, True, "0:00:07.2")],
)
def test_a_time_is_hours_minutes_and_seconds(seconds, tenths, text):
    assert clock(seconds, tenths) == text


def test_tenths_are_told_of_short_videos_only():
    document = _document(_video("a", 2))
    for last, text in ((59.0, "0:00:01.5"), (61.0, "0:00:01")):
        seconds = np.array([1.5, last])
        assert label(moments(document, np.array([1.0, 0.0]), seconds, count=1)[0], seconds) == text


def test_a_strip_shows_the_frames_of_the_moments_in_their_order(video, tmp_path):
    document = _document(_video(str(video), 40))
    seconds, weights = unit_seconds(document), np.full(40, 0.001)
    weights[[35, 3, 20]] = 0.3, 0.1, 0.2
    found = moments(document, weights, seconds, count=3)
    assert [m.unit for m in found] == [35, 20, 3]
    pictures = pictures_of(document, found)
    assert [round(float(np.asarray(p).mean())) for p in pictures] == pytest.approx([210, 120, 18], abs=4)
    draw_strip(tmp_path / "out" / "strip.png", found, pictures, weights, seconds, "What is shown?")
    with Image.open(tmp_path / "out" / "strip.png") as strip:
        assert strip.format == "PNG"
        pixels = np.asarray(strip.convert("RGB")).astype(int)
    row = pixels[len(pixels) * 2 // 5]  # through the pictures
    grays = [int(row[round((column + 0.5) * len(row) / 3)].mean()) for column in range(3)]
    assert grays == pytest.approx([18, 120, 210], abs=6)
    write_json(tmp_path / "times.json", document, found, weights, seconds)
    told = json.loads((tmp_path / "times.json").read_text())
    assert [(m["time"], m["seconds"], m["index"], m["weight"]) for m in told["moments"]] == [
        ("0:00:08.7", 8.75, 35, 0.3),
        ("0:00:05.0", 5.0, 20, 0.2),
        ("0:00:00.7", 0.75, 3, 0.1),
    ]
    assert told["media"] == [str(video)] and len(told["units"]) == 40
    assert told["frames_together"] == pytest.approx(weights.sum())


def test_a_strip_is_drawn_without_the_pictures_of_a_file_that_is_gone(tmp_path):
    gone, there = str(tmp_path / "gone.mp4"), tmp_path / "there.png"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(there)
    document = _document([*_video(gone, 2), FrameRef(str(tmp_path), (1,), True, ONE, (str(there),))])
    seconds, weights = np.array([0.0, 5.0, np.nan]), np.array([0.1, 0.2, 0.05])
    found = moments(document, weights, seconds)
    pictures = pictures_of(document, found)
    assert [None if p is None else p.getpixel((0, 0)) for p in pictures] == [None, None, (200, 0, 0)]
    draw_strip(tmp_path / "strip.png", found, pictures, weights, seconds)
    assert Image.open(tmp_path / "strip.png").width > 300


@pytest.mark.parametrize("question", ["Is it $5 or \\foo{ $?", "$x^$", "what\n is it? " * 2000])
def test_a_strip_shows_a_question_of_any_letters(tmp_path, question):
    there = tmp_path / "there.png"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(there)
    document = _document([FrameRef(str(tmp_path), (0,), True, ONE, (str(there),))])
    weights, seconds = np.array([0.5]), np.array([np.nan])
    found = moments(document, weights, seconds)
    draw_strip(tmp_path / "strip.png", found, pictures_of(document, found), weights, seconds, question)
    with Image.open(tmp_path / "strip.png") as strip:
        pixels = np.asarray(strip.convert("L"))
    assert (pixels[:60] < 200).any(1).sum() < 30  # one line above the pictures
    assert (pixels[:, -4:] > 200).all()  # which ends within the strip


def test_a_moment_of_several_frames_is_told_by_its_first(video):
    frames = [
        FrameRef(str(video), (0, 4), True, replace(ONE, frames=2)),
        FrameRef(str(video), (8, 12), True, replace(ONE, frames=2)),
    ]
    document = _document(frames)
    (best, _) = moments(document, np.array([0.1, 0.2]), unit_seconds(document))
    assert (best.index, best.seconds) == (8, 2.0)
