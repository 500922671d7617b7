"""The loader with real videos: ranks are threads, and what they exchange goes over a real barrier."""

import json
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vila.data import frame_chooser
from megatron_vila.data.dataset import NoUsableSampleError
from megatron_vila.data.order import epoch_order
from megatron_vila.data.reports import LoaderError
from megatron_vila.data.stream import Stream, StreamState
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import MEDIA_TOKEN
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.tokens import NO_PART
from tests.data.loader_run import BROKEN, GOOD, SEQ_LENGTH, TEXT, Data, Exchanges, all_steps, contents, sample, together
from tests.data.material import conversation, cut_off, destroy_frames, read_stamps, write_video
from tests.samples import Pooled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos a, b, c, d of 32 frames that can be read, others that cannot, and a picture."""
    folder = tmp_path_factory.mktemp("media")
    for name in "abcd":
        write_video(folder / f"{name}.mp4", 32)
    write_video(folder / "short.mp4", 5)
    cut_off(write_video(folder / "cut.mp4", 32))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    destroy_frames(write_video(folder / "middle.mp4", 32), 14, 18)
    Image.new("RGB", (40, 30), (255, 255, 255)).save(folder / "white.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    return folder


def names(step):
    return [row.row.sample_ids for row in step.rows]


def test_each_rank_decodes_its_own_frames_and_all_ranks_hold_the_same_rows(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    for ranks in (1, 3):
        for (ids, frames, *_), pixels in together(data.block(ranks, steps=4, shuffle=False)):
            assert pixels.dtype == torch.uint8 and pixels.shape == (len(frames), 3, 32, 32)
            if ids[0].endswith("mp4"):
                assert read_stamps(pixels) == [i for f in frames for i in f.indices]
            elif ids[0].endswith("png"):
                assert (pixels == 255).all()


@pytest.mark.parametrize("ranks", [1, 3])
def test_units_of_several_frames_are_placed_dealt_and_decoded_as_wholes(tmp_path, folder, monkeypatch, ranks):
    monkeypatch.setattr(frame_chooser, "pictures_of", lambda model: Pooled(3, 1, 5))
    data = Data(tmp_path, folder, GOOD)
    rows_of_ranks = data.block(ranks, steps=4, shuffle=False)
    for rows, ((ids, frames, tokens, _), pixels) in zip(
        zip(*rows_of_ranks, strict=True), together(rows_of_ranks), strict=True
    ):
        assert tokens.count(MEDIA_TOKEN) == sum(frame.tokens for frame in frames)
        assert sum(row.stats.work.frames for row in rows) == sum(len(frame.indices) for frame in frames)
        if ids[0].endswith("mp4"):
            assert [len(frame.indices) for frame in frames] == ([3, 2] if ids[0] == "short.mp4" else [3, 3, 2])
            assert {frame.tokens for frame in frames} == {5}
            assert read_stamps(pixels) == [i for f in frames for i in f.indices]


def test_a_frame_that_becomes_another_number_of_squares_than_its_unit_has_tiles_ends_the_run(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(frame_chooser, "pictures_of", lambda model: Pooled(3, 2, 5))
    told = "a frame became 1 squares, and its unit has 2 tiles"
    with Data(tmp_path, folder, GOOD).loader() as loader, pytest.raises(LoaderError, match=told):
        loader.next_step()


def test_without_packing_row_g_holds_sample_g_and_one_replica_gets_the_rows_in_their_order(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    with data.loader(batch=4) as loader:
        steps = all_steps(loader, 4)
    order = np.concatenate([epoch_order(7, 5, epoch, True) for epoch in range(3)])
    assert [ids for step in steps for ids in names(step)] == [(GOOD[index]["id"],) for index in order[:16]]
    assert [row.number for row in steps[0].rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_goes_to_one_replica_and_a_step_holds_the_same_rows_with_any_number_of_them(tmp_path, folder, packing):
    data = Data(tmp_path, folder, BROKEN + GOOD, packing=packing)
    with data.loader(batch=6) as loader:
        whole = [{row.number: (contents(row), row.pixels) for row in step.rows} for step in all_steps(loader, 3)]
    for dp in (2, 3):
        of_ranks = data.run(GridShape(dp=dp), 3, batch=6)
        for step, rows in enumerate(whole):
            got = [row for of_rank in of_ranks for row in of_rank[step].rows]
            assert sorted(row.number for row in got) == list(range(6))
            for row in got:
                content, pixels = rows[row.number]
                assert contents(row) == content and torch.equal(row.pixels, pixels)
            assert len({repr(of_rank[step].plan.rows) for of_rank in of_ranks}) == 1
            assert of_ranks[0][step].spread == of_ranks[1][step].spread


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_broken_sample_is_left_out_on_every_rank_and_the_next_of_the_order_takes_its_place(tmp_path, folder, ranks, caplog):
    data = Data(tmp_path, folder, BROKEN)
    of_ranks = data.run(GridShape(tp=ranks), 4, shuffle=False)
    loaded = list(together([[row for step in steps for row in step.rows] for steps in of_ranks]))
    assert [content[0][0] for content, _ in loaded] == ["a.mp4", "b.mp4", "c.mp4", "white.png"] * 2
    for (_, frames, *_), pixels in loaded:
        if frames[0].is_video:
            assert read_stamps(pixels) == [i for f in frames for i in f.indices]
    counts = Counter()
    for step in of_ranks[0]:
        counts.update(step.plan.counts)
    # The second epoch has not come to its last sample's end: nothing after white.png is drawn.
    assert counts == {"drawn": 20, "left_out_broken": 12, "left_out_too_long": 0, "truncated": 0, "unsupervised": 0}
    for name in ("cut.mp4", "middle.mp4", "empty.mp4", "text.mp4", "missing.mp4", "bad.png"):
        told = [m for m in caplog.messages if m.startswith(f"sample {name} is broken and left out")]
        assert len(told) == ranks, "once a rank, in two epochs"
        assert str(folder / name) in told[0]


def test_only_the_rank_that_decodes_the_destroyed_frames_notices_and_all_ranks_leave_the_sample_out(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("middle.mp4"), sample("a.mp4")])
    exchanges, noticed = Exchanges(4), Counter()

    def run(rank):
        exchange = exchanges.of(rank)
        with data.loader(GridShape(tp=4), rank, exchange, batch=1, shuffle=False, prefetch=0) as loader:
            noticed[rank] += sum(len(row.reports()) for row in [loader._maker.begin(0, [0]).result().decoded()])
            return loader.next_step().rows

    with ThreadPoolExecutor(4) as threads:
        rows_of_ranks = list(threads.map(run, range(4)))
    assert +noticed == Counter({2: 1}), "of 0 4 | 9 13 | 18 22 | 27 31 only frame 18 is destroyed"
    assert [content[0] for content, _ in together(rows_of_ranks)] == [("a.mp4",)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_file_that_one_rank_cannot_see_is_left_out_on_all_ranks(tmp_path, folder, packing):
    (tmp_path / "other_host").mkdir()
    for file in folder.iterdir():
        if file.name != "b.mp4":
            (tmp_path / "other_host" / file.name).symlink_to(file)
    data = Data(tmp_path, folder, [sample("a.mp4"), sample("b.mp4"), sample("c.mp4")], packing=packing)
    for blind in range(2):
        first, second = data.run(
            GridShape(tp=2),
            2,
            batch=2,
            shuffle=False,
            more=lambda rank, blind=blind: {"folder": str(tmp_path / "other_host")} if rank == blind else {},
        )
        for mine, other in zip(first, second, strict=True):
            assert names(mine) == names(other) and "b.mp4" not in str(names(mine))
            assert mine.plan.after.to_json() == other.plan.after.to_json()
            for left, right in zip(mine.rows, other.rows, strict=True):
                stamps = read_stamps(torch.cat([left.pixels, right.pixels]))
                assert stamps == [i for f in left.row.frames for i in f.indices]


def test_when_every_sample_is_broken_all_ranks_end_with_the_reasons(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("middle.mp4"), sample("empty.mp4")])

    def use(loader, steps):
        with pytest.raises(NoUsableSampleError, match=r"none of the 2 samples can be used: 2 are broken") as error:
            loader.next_step()
        return str(error.value)

    for message in data.run(GridShape(dp=2), 1, use):
        assert "middle.mp4" in message and "empty.mp4" in message


def test_an_error_that_nobody_foresaw_on_one_rank_leaves_the_sample_out_on_all_ranks(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("white.png"), sample("a.mp4")])

    def use(loader, steps):
        if loader._exchange.rank:
            loader._dataset.probe = None  # this rank has lost what it looks at videos with
        step = loader.next_step()
        return names(step), loader.broken

    first, second = data.run(GridShape(tp=2), 1, use, batch=2, shuffle=False, prefetch=0)
    assert first == second == ([("white.png",)] * 2, {1: "TypeError: 'NoneType' object is not callable"})


def test_held_out_samples_that_cannot_be_used_are_told_and_have_no_stand_in(tmp_path, folder):
    long_text = {"id": "long", "conversations": conversation("word " * 400)}
    bad = {"id": "bad", "conversations": conversation("\ud83d")}
    data = Data(tmp_path, folder, [sample("middle.mp4"), long_text, bad, sample("a.mp4")], skip_bad=True)
    exchanges = Exchanges(4)

    def run(rank):
        with data.held_out(GridShape(tp=4), rank, exchanges.of(rank).agree) as loader:
            return [loader.sample(step) for step in range(5)]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(4)))
    for found in results:
        assert [(left.index, left.kind) for left in found[:3]] == [(0, "broken"), (1, "too_long"), (2, "broken")]
        assert found[3].row.sample_ids == ("a.mp4",) and found[3].number == 3
        assert (found[4].number, found[4].index) == (4, 0), "after the last one it begins again"
    assert "middle.mp4: " in results[0][0].reason
    assert "text and images alone have" in results[0][1].reason
    assert "is half of a character" in results[0][2].reason


def test_an_unexpected_error_on_one_rank_ends_all_ranks(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)

    def no_memory(turn, documents, local):
        raise MemoryError("out of memory")

    def use(loader, steps):
        if loader._exchange.rank:
            loader._maker._decoder.submit = no_memory
        with pytest.raises(LoaderError, match=r"MemoryError: out of memory \(samples of the row: ") as error:
            loader.next_step()
        return error.value.__cause__

    causes = data.run(GridShape(dp=2), 1, use, prefetch=0)
    assert causes[0] is None and isinstance(causes[1], MemoryError)


@pytest.mark.parametrize("before", ["the first card", "the rows"])
def test_a_file_of_records_that_vanishes_ends_all_ranks_with_its_name(tmp_path, folder, before):
    data = Data(tmp_path, folder, GOOD)
    gone = threading.Barrier(2)

    def use(loader, steps):
        if before == "the rows":
            loader.next_step()
        gone.wait(timeout=60)
        Path(data.files).unlink(missing_ok=True)
        with pytest.raises(LoaderError, match=r"ChangedFileError: .*train.jsonl is gone since it was opened"):
            for _ in range(4):
                loader.next_step()
        return True

    assert data.run(GridShape(dp=2), 1, use, prefetch=1) == [True, True]


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.integers(1, 2),
    dp=st.sampled_from([1, 2, 4]),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 5),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_layout_and_the_threads_do_not_change_the_rows(
    tmp_path_factory, folder, ranks, dp, workers, prefetch, packing, seed
):
    data = Data(tmp_path_factory.mktemp("run"), folder, BROKEN + GOOD, packing=packing)
    with data.loader(batch=4, seed=seed) as loader:
        truth = [(step.plan, {row.number: (contents(row), row.pixels) for row in step.rows}) for step in all_steps(loader, 3)]
    grid = GridShape(tp=ranks, dp=dp)
    of_ranks = data.run(grid, 3, batch=4, seed=seed, workers=workers, prefetch=prefetch)
    for step, (plan, rows) in enumerate(truth):
        for replica in range(dp):
            block = [of_ranks[rank][step] for rank in grid.group("block", replica * ranks)]
            assert all(loaded.plan.rows == plan.rows and loaded.plan.counts == plan.counts for loaded in block)
            assert all(loaded.plan.after.to_json() == plan.after.to_json() for loaded in block)
            numbers = [row.number for row in block[0].rows]
            for number, (content, pixels) in zip(numbers, together([loaded.rows for loaded in block]), strict=True):
                assert content == rows[number][0] and torch.equal(pixels, rows[number][1])


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumed_after_any_step_under_another_layout_goes_on_as_if_it_had_not_ended(tmp_path, folder, packing):
    data = Data(tmp_path, folder, BROKEN + GOOD, packing=packing)
    with data.loader(batch=4) as loader:
        whole = all_steps(loader, 8)
    for step, grid in ((1, GridShape(dp=4)), (2, GridShape(tp=2)), (5, GridShape(dp=2, tp=2))):
        state = StreamState.from_json(json.loads(json.dumps(whole[step - 1].plan.after.to_json())), len(BROKEN + GOOD))
        for steps in data.run(grid, 8 - step, batch=4, state=state):
            assert [s.plan.rows for s in steps] == [s.plan.rows for s in whole[step:]]
            assert [s.plan.counts for s in steps] == [s.plan.counts for s in whole[step:]]
            assert steps[-1].plan.after.to_json() == whole[-1].plan.after.to_json()


def test_packed_rows_are_full_and_stay_within_the_length_when_samples_turn_out_broken(tmp_path, folder):
    records = [TEXT, sample("middle.mp4"), TEXT, sample("a.mp4", 30), TEXT, sample("b.mp4"), sample("white.png")]
    data = Data(tmp_path, folder, records, packing=True)
    of_ranks = data.run(GridShape(tp=2), 6)
    rows = [row for step in of_ranks[0] for row in step.rows]
    for row in rows:
        ends = row.row.cu_seqlens
        assert (ends % 2 == 0).all() and ends[-1] % 4 == 0
        assert (row.row.positions == 0).sum() == row.stats.documents, "positions start anew in each document"
        assert sum(row.row.lengths) <= SEQ_LENGTH
        assert "middle.mp4" not in row.row.sample_ids
    assert max(row.stats.documents for row in rows) > 1
    assert sum(step.plan.tokens for step in of_ranks[0]) > 0.8 * 12 * SEQ_LENGTH
    assert sum(step.plan.counts["left_out_broken"] for step in of_ranks[0]) > 0
    assert all(step.plan.tokens == sum(sum(row.row.lengths) for row in step.rows) for step in of_ranks[0])
    assert all(step.plan.labels == sum(row.row.supervised_tokens for row in step.rows) for step in of_ranks[0])


def test_what_happened_to_the_samples_is_counted_and_an_answerless_one_is_named_once(tmp_path, folder, caplog):
    silent = {"id": "silent", "conversations": conversation()[:1]}
    long_text = {"id": "long", "conversations": conversation("word " * 400)}
    many = {"id": "many", "video": "a.mp4", "conversations": conversation("What " * 50)}
    data = Data(tmp_path, folder, [silent, long_text, many, TEXT], num_frames=32)
    with data.loader(batch=3, shuffle=False) as loader:
        first, second = all_steps(loader, 2)
    assert names(first) == [("silent",), ("many",), ("text",)]
    assert first.plan.counts == {"drawn": 4, "left_out_broken": 0, "left_out_too_long": 1, "truncated": 1, "unsupervised": 1}
    assert second.plan.counts == first.plan.counts
    assert [row.stats.unsupervised for row in first.rows] == [1, 0, 0]
    assert [row.stats.truncated for row in first.rows] == [0, 1, 0]
    assert [row.stats.work.frames for row in first.rows] == [len(row.pixels) for row in first.rows]
    assert 0 < first.rows[1].stats.work.frames < 32
    assert first.wait_s >= 0 and all(row.stats.work.decode_s >= 0 for row in first.rows)
    assert [m for m in caplog.messages if "silent" in m] == ["sample silent has no answer to learn: it trains nothing"]


def test_a_sample_whose_files_change_between_planning_and_loading_counts_as_broken(tmp_path, folder):
    (tmp_path / "media").mkdir()
    changing = tmp_path / "media" / "changing.mp4"
    shutil.copy(folder / "a.mp4", changing)
    shutil.copy(folder / "b.mp4", tmp_path / "media" / "b.mp4")
    data = Data(tmp_path, tmp_path / "media", [sample("changing.mp4"), sample("b.mp4")])
    with data.loader(batch=1, shuffle=False, prefetch=0) as loader:
        loader._look_ahead()
        shutil.copy(folder / "short.mp4", changing)
        loader._dataset.probe.cache_clear()
        assert names(loader.next_step()) == [("b.mp4",)]
        assert re.search("its files have changed: it had [0-9]+ tokens and has [0-9]+", loader.broken[0])


def test_one_video_shown_twice_in_a_sample_is_decoded_twice(tmp_path, folder):
    record = {"id": "twice", "video": ["a.mp4", "a.mp4"], "conversations": conversation("<video> or <video>?")}
    data = Data(tmp_path, folder, [record], num_frames=4)
    with data.loader(batch=1) as loader:
        (row,) = loader.next_step().rows
    assert read_stamps(row.pixels) == [0, 10, 21, 31] * 2


def test_closing_stops_the_threads(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    before = set(threading.enumerate())
    loader = data.loader(prefetch=20)
    loader.next_step()
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before


def test_pixels_of_ranks_without_frames_are_empty(tmp_path, folder):
    data = Data(tmp_path, folder, [TEXT])
    grid = GridShape(tp=2, ulysses=2, pp=2)
    with data.loader(grid, grid.rank(pp=1), batch=1) as loader:
        (row,) = loader.next_step().rows
    assert row.pixels.shape == (0, 3, 32, 32) and row.plan.reshard is NO_PART
    assert np.array_equal(row.row.cu_seqlens % 8, [0, 0])


def test_steps_and_the_parts_of_rows_are_planned_in_threads_of_the_loader(tmp_path, folder, monkeypatch):
    threads = {"shard": set(), "plan": set()}

    def noted(cls, name):
        original = getattr(cls, name)

        def method(*arguments):
            threads[name].add(threading.current_thread().name.partition("_")[0])
            return original(*arguments)

        monkeypatch.setattr(cls, name, method)

    noted(RowPlan, "shard")
    noted(Stream, "plan")
    with Data(tmp_path, folder, GOOD).loader(batch=2, prefetch=2) as loader:
        rows = loader.next_step().rows
    assert all(np.array_equal(row.plan.positions, row.row.positions) for row in rows)
    assert threads == {"shard": {"build"}, "plan": {"plan"}}
