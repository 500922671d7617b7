"""The loader with real videos: blocks of ranks are threads, and ``agree`` is a real exchange with a barrier."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vila.data import dataset
from megatron_vila.data.loader import EmptyRow, LoaderError
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import MEDIA_TOKEN
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.tokens import NO_PART
from tests.data.loader_run import BROKEN, GOOD, SEQ_LENGTH, TEXT, Agreement, Data, contents, sample, together
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


def test_each_rank_decodes_its_own_frames_and_all_ranks_hold_the_same_rows(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD, shuffle=False)
    for ranks in (1, 3):
        for (_, names, frames, *_), pixels in together(data.block(ranks, steps=4, shuffle=False)):
            assert pixels.dtype == torch.uint8 and pixels.shape == (len(frames), 3, 32, 32)
            if names[0].endswith("mp4"):
                assert read_stamps(pixels) == [i for f in frames for i in f.indices]
            elif names[0].endswith("png"):
                assert (pixels == 255).all()


@pytest.mark.parametrize("ranks", [1, 3])
def test_units_of_several_frames_are_placed_dealt_and_decoded_as_wholes(tmp_path, folder, monkeypatch, ranks):
    monkeypatch.setattr(dataset, "pictures_of", lambda model: Pooled(3, 1, 5))
    data = Data(tmp_path, folder, GOOD)
    rows_of_ranks = data.block(ranks, steps=4, shuffle=False)
    for rows, ((_, names, frames, ids, _), pixels) in zip(zip(*rows_of_ranks, strict=True), together(rows_of_ranks), strict=True):
        assert ids.count(MEDIA_TOKEN) == sum(frame.tokens for frame in frames)
        assert sum(row.stats.work.frames for row in rows) == sum(len(frame.indices) for frame in frames)
        if names[0].endswith("mp4"):
            assert [len(frame.indices) for frame in frames] == ([3, 2] if names[0] == "short.mp4" else [3, 3, 2])
            assert {frame.tokens for frame in frames} == {5}
            assert read_stamps(pixels) == [i for f in frames for i in f.indices]


def test_a_frame_that_becomes_another_number_of_squares_than_its_unit_has_tiles_ends_the_run(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(dataset, "pictures_of", lambda model: Pooled(3, 2, 5))
    told = "a frame became 1 squares, and its unit has 2 tiles"
    with Data(tmp_path, folder, GOOD).loader() as loader, pytest.raises(LoaderError, match=told):
        loader.rows(0)


def test_the_rows_of_a_step_are_dealt_to_the_replicas_in_turn(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    with data.loader(batch=6) as loader:
        whole = [contents(row) for step in range(3) for row in loader.rows(step)]
    assert [number for number, *_ in whole] == list(range(18))
    for dp_size in (2, 3):
        for dp_rank in range(dp_size):
            with data.loader(batch=6, dp_size=dp_size, dp_rank=dp_rank) as loader:
                mine = [contents(row) for step in range(3) for row in loader.rows(step)]
            assert mine == [row for row in whole if row[0] % 6 % dp_size == dp_rank]


REPLACED = ["a.mp4"] + ["b.mp4"] * 3 + ["c.mp4"] * 4 + ["white.png"] * 2


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_broken_video_is_replaced_on_every_rank_by_the_same_sample(tmp_path, folder, ranks, caplog):
    data = Data(tmp_path, folder, BROKEN)
    rows_of_ranks = data.block(ranks, steps=10, shuffle=False)
    loaded = list(together(rows_of_ranks))
    assert [content[1][0] for content, _ in loaded] == REPLACED * 2
    for (_, _, frames, *_), pixels in loaded:
        if frames[0].is_video:
            assert read_stamps(pixels) == [i for f in frames for i in f.indices]
    assert sum(row.stats.replaced_broken for row in rows_of_ranks[0]) == 2 * 6
    for name in ("cut.mp4", "middle.mp4", "empty.mp4", "text.mp4", "missing.mp4", "bad.png"):
        told = [m for m in caplog.messages if m.startswith(f"sample {name} is broken and replaced")]
        assert len(told) == ranks, "once a rank, in two epochs"
        assert str(folder / name) in told[0]


def test_only_the_rank_that_decodes_the_destroyed_frames_notices_and_all_ranks_replace_them(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("middle.mp4"), sample("a.mp4")])
    noticed = Counter()

    def spy(agreement, rank, reports):
        noticed[rank] += len(reports)
        return agreement(rank, reports)

    agreement = Agreement(4)

    def run(rank):
        with data.loader(rank, 4, lambda r: spy(agreement, rank, r), batch=1, shuffle=False, prefetch=0) as loader:
            return loader.rows(0)

    with ThreadPoolExecutor(4) as threads:
        rows_of_ranks = list(threads.map(run, range(4)))
    assert +noticed == Counter({2: 1}), "of 0 4 | 9 13 | 18 22 | 27 31 only frame 18 is destroyed"
    assert [content[1] for content, _ in together(rows_of_ranks)] == [("a.mp4",)]


def test_a_file_that_one_rank_cannot_see_is_replaced_on_all_ranks(tmp_path, folder):
    (tmp_path / "other_host").mkdir()
    for file in folder.iterdir():
        if file.name != "b.mp4":
            (tmp_path / "other_host" / file.name).symlink_to(file)
    data = Data(tmp_path, folder, [sample("a.mp4"), sample("b.mp4"), sample("c.mp4")])
    agreement = Agreement(2)

    def run(rank):
        more = {"folder": str(tmp_path / "other_host")} if rank else {}
        with data.loader(rank, 2, lambda r: agreement(rank, r), batch=3, shuffle=False, **more) as loader:
            return loader.rows(0)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, range(2))
    assert (
        [row.row.sample_ids[0] for row in first]
        == [row.row.sample_ids[0] for row in second]
        == ["a.mp4", "c.mp4", "c.mp4"]
    )
    for left, right in zip(first, second, strict=True):
        assert read_stamps(torch.cat([left.pixels, right.pixels])) == [i for f in left.row.frames for i in f.indices]


def test_a_packed_sample_that_one_rank_cannot_see_and_nothing_can_replace_is_left_out_on_all_ranks(tmp_path, folder):
    (tmp_path / "other_host").mkdir()
    (tmp_path / "other_host" / "a.mp4").symlink_to(folder / "a.mp4")
    data = Data(tmp_path, folder, [sample("white.png"), sample("a.mp4")])
    agreement = Agreement(2)

    def run(rank):
        more = {"folder": str(tmp_path / "other_host")} if rank else {}
        more |= {"lengths": np.array([30, 80]), "shuffle": False, "batch": 1}
        with data.loader(rank, 2, lambda r: agreement(rank, r), **more) as loader:
            return loader.rows(0)[0]

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, range(2))
    assert first.row.sample_ids == second.row.sample_ids == ("a.mp4",)
    assert first.stats.left_out == second.stats.left_out == 1


def test_when_every_sample_is_broken_all_ranks_end_with_the_reasons(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("middle.mp4"), sample("empty.mp4")])
    agreement = Agreement(2)

    def run(rank):
        with (
            data.loader(rank, 2, lambda reports: agreement(rank, reports)) as loader,
            pytest.raises(LoaderError, match=r"none of the 2 samples can be used: 2 are broken") as error,
        ):
            loader.rows(0)
        return str(error.value)

    with ThreadPoolExecutor(2) as threads:
        for message in threads.map(run, range(2)):
            assert "middle.mp4" in message and "empty.mp4" in message


def test_an_error_that_nobody_foresaw_on_one_rank_replaces_the_sample_on_all_ranks(tmp_path, folder):
    data = Data(tmp_path, folder, [sample("white.png"), sample("a.mp4")])
    agreement = Agreement(2)

    def run(rank):
        with data.loader(
            rank, 2, lambda reports: agreement(rank, reports), batch=1, shuffle=False, prefetch=0
        ) as loader:
            if rank:
                loader._dataset.probe = None  # this rank has lost what it looks at videos with
            (row,) = loader.rows(1)
            return row.row.sample_ids, loader.broken

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, range(2))
    assert first == second == (("white.png",), {1: "TypeError: 'NoneType' object is not callable"})


def test_held_out_samples_that_cannot_be_used_have_no_stand_in(tmp_path, folder):
    long_text = {"id": "long", "conversations": conversation("word " * 400)}
    bad = {"id": "bad", "conversations": conversation("\ud83d")}
    data = Data(tmp_path, folder, [sample("middle.mp4"), long_text, bad, sample("a.mp4")], skip_bad=True)
    rows_of_ranks = data.block(4, steps=4, batch=1, shuffle=False, replace_bad=False)
    for rows in rows_of_ranks:
        kinds = [[(left.index, left.kind) for left in row.left_out] for row in rows]
        assert kinds == [[(0, "broken")], [(1, "too_long")], [(2, "broken")], []]
        assert [isinstance(row, EmptyRow) for row in rows] == [True, True, True, False]
    assert "middle.mp4: " in rows_of_ranks[0][0].left_out[0].reason
    assert "text and images alone have" in rows_of_ranks[0][1].left_out[0].reason
    assert "is half of a character" in rows_of_ranks[0][2].left_out[0].reason


def test_an_unexpected_error_on_one_rank_ends_all_ranks(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    agreement = Agreement(2)

    def no_memory(turn, documents, local):
        raise MemoryError("out of memory")

    def run(rank):
        with data.loader(rank, 2, lambda reports: agreement(rank, reports), prefetch=0) as loader:
            if rank:
                loader._decoder.submit = no_memory
            with pytest.raises(LoaderError, match=r"MemoryError: out of memory \(samples of the row: ") as error:
                loader.rows(0)
            return error.value.__cause__

    with ThreadPoolExecutor(2) as threads:
        causes = list(threads.map(run, range(2)))
    assert causes[0] is None and isinstance(causes[1], MemoryError)


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.integers(1, 4),
    dp_size=st.sampled_from([1, 2]),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 5),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_layout_and_the_threads_do_not_change_the_rows(
    tmp_path_factory, folder, ranks, dp_size, workers, prefetch, packing, seed
):
    data = Data(tmp_path_factory.mktemp("run"), folder, BROKEN + GOOD, packing=packing)
    with data.loader(batch=2, seed=seed) as loader:
        truth = {row.number: (contents(row), row.pixels) for step in range(4) for row in loader.rows(step)}
    seen = set()
    for dp_rank in range(dp_size):
        options = {"dp_rank": dp_rank, "dp_size": dp_size, "workers": workers, "prefetch": prefetch, "seed": seed}
        for content, pixels in together(data.block(ranks, 4, **options)):
            assert content == truth[content[0]][0]
            assert torch.equal(pixels, truth[content[0]][1])
            seen.add(content[0])
    assert seen == set(truth)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumed_at_any_step_gets_the_same_rows(tmp_path, folder, packing):
    data = Data(tmp_path, folder, BROKEN + GOOD, packing=packing)
    with data.loader() as loader:
        whole = [[(contents(row), row.pixels) for row in loader.rows(step)] for step in range(12)]
        again = [[(contents(row), row.pixels) for row in loader.rows(step)] for step in (11, 2)]
    for step in (1, 5, 11):
        with data.loader() as loader:
            again.append([(contents(row), row.pixels) for row in loader.rows(step)])
    for step, rows in zip((11, 2, 1, 5, 11), again, strict=True):
        for (content, pixels), (known, known_pixels) in zip(rows, whole[step], strict=True):
            assert content == known
            assert torch.equal(pixels, known_pixels)


def test_packed_rows_are_full_and_stay_within_the_length_when_samples_turn_out_broken(tmp_path, folder):
    records = [TEXT, sample("middle.mp4"), TEXT, sample("a.mp4", 30), TEXT, sample("b.mp4"), sample("white.png")]
    data = Data(tmp_path, folder, records, packing=True)
    rows_of_ranks = data.block(2, steps=6)
    for (number, names, *_), pixels in together(rows_of_ranks):
        row = next(r for r in rows_of_ranks[0] if r.number == number)
        ends = row.row.cu_seqlens
        assert (ends % 2 == 0).all() and ends[-1] % 4 == 0
        assert (row.row.positions == 0).sum() == len(names), "positions start anew in each document"
        assert row.row.length <= SEQ_LENGTH + 4 * len(names) + 8
        assert "middle.mp4" not in names
        assert len(pixels) == len(row.row.frames)
    assert max(row.stats.documents for row in rows_of_ranks[0]) > 1
    assert sum(row.stats.replaced_broken for row in rows_of_ranks[0]) > 0


def test_a_packed_sample_that_nothing_can_replace_is_left_out(tmp_path, folder):
    records = [sample("bad.png"), sample("a.mp4")]
    data = Data(tmp_path, folder, records, packing=True)
    with data.loader(batch=1, shuffle=False) as loader:
        (row,) = loader.rows(0)
    assert row.row.sample_ids == ("a.mp4",)
    assert (row.stats.left_out, row.stats.documents) == (1, 1)


def test_what_happened_to_the_samples_is_counted_and_an_answerless_one_is_named_once(tmp_path, folder, caplog):
    silent = {"id": "silent", "conversations": conversation()[:1]}
    long_text = {"id": "long", "conversations": conversation("word " * 400)}
    many = {"id": "many", "video": "a.mp4", "conversations": conversation("What " * 50)}
    data = Data(tmp_path, folder, [silent, long_text, many, TEXT], num_frames=32)
    with data.loader(batch=4, shuffle=False) as loader:
        rows = [row for step in range(2) for row in loader.rows(step)]
    stats = [row.stats for row in rows[:4]]
    assert [row.row.sample_ids[0] for row in rows[:4]] == ["silent", "many", "many", "text"]
    assert [s.unsupervised for s in stats] == [1, 0, 0, 0]
    assert [s.replaced_too_long for s in stats] == [0, 1, 0, 0]
    assert [s.truncated for s in stats] == [0, 1, 1, 0]
    assert [s.replaced_broken for s in stats] == [0, 0, 0, 0]
    assert [s.work.frames for s in stats] == [len(row.pixels) for row in rows[:4]]
    assert 0 < stats[1].work.frames < 32
    assert all(s.wait_s >= 0 and s.work.decode_s >= 0 for s in stats)
    assert [m for m in caplog.messages if "silent" in m] == ["sample silent has no answer to learn: it trains nothing"]


def test_one_video_shown_twice_in_a_sample_is_decoded_twice(tmp_path, folder):
    record = {"id": "twice", "video": ["a.mp4", "a.mp4"], "conversations": conversation("<video> or <video>?")}
    data = Data(tmp_path, folder, [record], num_frames=4)
    with data.loader(batch=1) as loader:
        (row,) = loader.rows(0)
    assert read_stamps(row.pixels) == [0, 10, 21, 31] * 2


def test_closing_stops_the_threads(tmp_path, folder):
    data = Data(tmp_path, folder, GOOD)
    before = set(threading.enumerate())
    loader = data.loader(prefetch=20)
    loader.rows(0)
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before


def test_pixels_of_ranks_without_frames_are_empty(tmp_path, folder):
    data = Data(tmp_path, folder, [TEXT])
    grid = GridShape(tp=2, ulysses=2, pp=2)
    with data.loader(batch=1, grid=grid, rank=grid.rank(pp=1)) as loader:
        (row,) = loader.rows(0)
    assert row.pixels.shape == (0, 3, 32, 32) and row.plan.reshard is NO_PART
    assert np.array_equal(row.row.cu_seqlens % 8, [0, 0])


def test_the_plan_of_a_row_is_made_ahead_in_a_thread_of_the_loader(tmp_path, folder, monkeypatch):
    threads = []
    original = RowPlan.shard

    def noted(plan, rank):
        threads.append(threading.current_thread().name)
        return original(plan, rank)

    monkeypatch.setattr(RowPlan, "shard", noted)
    with Data(tmp_path, folder, GOOD).loader(batch=2, prefetch=2) as loader:
        rows = loader.rows(0)
    assert all(np.array_equal(row.plan.positions, row.row.positions) for row in rows)
    assert len(threads) >= 2 and all(name.startswith("build") for name in threads)
