"""What a needle test leaves: cells that are found again after a kill, settings that must not be mixed, means, and the map."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_vila.errors import SettingError
from megatron_vila.evaluation.grid import Cell, grid
from megatron_vila.evaluation.heat_map import draw_heat_map, heat_map
from megatron_vila.evaluation.results import Answered, CellResult, Results, ResultsError, percent, read_results, resume

SETTINGS = {"model": "abc", "mode": "generate"}


def cell(frames, depth, right, of=5):
    answers = tuple(
        Answered(number, "red", "red" if number < right else "blue", number < right) for number in range(of)
    )
    return CellResult(frames, depth, Cell(frames, depth).place, 4 * frames + 20, 0.5, answers)


def results(*cells, trained=None):
    found = Results(dict(SETTINGS), trained)
    for one in cells:
        found.add(one)
    return found


def test_depth_0_is_the_first_frame_and_depth_100_the_last():
    assert [Cell(32, depth).place for depth in (0, 25, 50, 75, 100)] == [0, 7, 15, 23, 31]
    assert [Cell(1, depth).place for depth in (0, 100)] == [0, 0]
    assert [Cell(1001, depth).place for depth in (32.3, 64.1)] == [323, 641]  # not one less by rounding


def test_a_grid_has_every_length_with_every_depth_once_short_videos_first():
    cells = grid([16, 8, 16], [100, 0])
    assert [(c.frames, c.depth) for c in cells] == [(8, 0), (8, 100), (16, 0), (16, 100)]


@pytest.mark.parametrize(
    ("frames", "depths", "named"), [([0, 8], [0], "--frames"), ([], [0], "--frames"), ([8], [101], "--depths")]
)
def test_numbers_that_make_no_cell_are_refused(frames, depths, named):
    with pytest.raises(SettingError, match=named):
        grid(frames, depths)


def test_what_was_written_is_gone_on_with(tmp_path):
    file = tmp_path / "needle.json"
    before = results(cell(8, 0, 5), cell(8, 50.5, 3), trained=8)
    before.write(file)
    after = resume(file, SETTINGS, 16, restart=False)
    assert after.cells == before.cells and after.trained_frames == 16
    assert resume(tmp_path / "none.json", SETTINGS, 8, restart=False).cells == {}


def test_a_kill_while_results_are_written_leaves_those_before(tmp_path, monkeypatch):
    file = tmp_path / "needle.json"
    results(cell(8, 0, 5)).write(file)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results(cell(8, 0, 5), cell(8, 50, 5)).write(file)
    assert list(read_results(file).cells) == [(8, 0)]


def test_results_of_other_settings_are_refused_unless_they_may_be_lost(tmp_path):
    file = tmp_path / "needle.json"
    results(cell(8, 0, 5)).write(file)
    with pytest.raises(ResultsError, match=r"mode was 'generate', now 'teacher-forcing'.*--restart"):
        resume(file, SETTINGS | {"mode": "teacher-forcing"}, 8, restart=False)
    assert resume(file, SETTINGS | {"mode": "teacher-forcing"}, 8, restart=True).cells == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1}', '{"format": 7}', '{"format": 1, "settings": {}, "trained_frames": 1, "cells": [{}]}'],
)
def test_a_file_that_is_no_result_is_told(tmp_path, content):
    file = tmp_path / "needle.json"
    file.write_text(content)
    with pytest.raises(ResultsError, match="--restart"):
        resume(file, SETTINGS, 8, restart=False)


def test_a_score_is_the_mean_over_needles_and_trained_lengths_are_told_from_others(tmp_path):
    found = results(cell(8, 0, 5), cell(8, 100, 4), cell(64, 0, 1), trained=32)
    assert found.cells[8, 100].score == 0.8
    assert (found.mean(), found.mean(True), found.mean(False)) == pytest.approx((2 / 3, 0.9, 0.2))
    found.write(tmp_path / "needle.json")
    stored = json.loads((tmp_path / "needle.json").read_text())
    assert (stored["score_trained"], stored["score_beyond"]) == pytest.approx((0.9, 0.2))
    assert [one["answers"][0] for one in stored["cells"]][0] == {
        "needle": 0,
        "expected": "red",
        "answer": "red",
        "right": True,
    }
    assert results(cell(64, 0, 1), trained=32).mean(True) is None


def test_100_percent_stands_only_where_nothing_was_missed():
    assert [percent(score) for score in (1, 0.9999, 0.8, 0.6666, 0)] == ["100", "99.9", "80", "66.6", "0"]


def test_a_map_shows_each_score_in_its_cell_and_frames_the_trained_lengths():
    found = results(cell(8, 0, 5), cell(8, 100, 4), cell(32, 0, 3), cell(64, 100, 1), trained=32)
    (axes, _) = heat_map(found, "a model").axes
    shown = {(text.get_position(), text.get_text()) for text in axes.texts}
    # Columns are 8, 32 and 64 frames, rows 0 and 100 %: the depth of the first frame stands at the top.
    assert shown >= {((0.5, 0.5), "100"), ((0.5, 1.5), "80"), ((1.5, 0.5), "60"), ((2.5, 1.5), "20")}
    assert axes.yaxis_inverted() and len(shown) == 5  # and a line of means
    (box,) = axes.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((0, 0), 2, 2)
    assert not heat_map(results(cell(64, 0, 1), trained=32), "a model").axes[0].patches


def test_a_map_is_a_picture_with_green_for_all_and_red_for_none(tmp_path):
    file = tmp_path / "map.png"
    draw_heat_map(results(cell(8, 0, 5), cell(16, 0, 0)), file, "a model")
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((63, 159, 95), (142, 27, 27)):
        assert (np.abs(pixels - color).max(-1) < 4).mean() > 0.05
