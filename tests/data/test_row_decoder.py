"""Rows decoded by many threads: the pixels of one thread, within a budget, the row that is needed first going first."""

import gc
import threading
import time
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, VideoReformatter
from PIL import Image

from megatron_vila.data import row_decoder, row_tasks
from megatron_vila.data.decode_pool import DecodePool, Job
from megatron_vila.data.failures import FailureReasons, MachineError
from megatron_vila.data.groups import slices
from megatron_vila.data.host_budget import HostBudget
from megatron_vila.data.images import load_image, preprocess
from megatron_vila.data.media import MediaError, open_video
from megatron_vila.data.pending_row import ClosedError, HostBudgetError
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.video import VideoReader, probe_video
from megatron_vila.data.video_engines import UNJUDGED_ROWS, Need, VideoEngineError, as_decoded
from megatron_vila.errors import SettingError
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import Document, FrameRef
from tests.data.stamped import write

SIZE = 32
ROW = 3 * SIZE**2
"""Bytes of a square."""

FRAMES = 60
AWKWARD = {
    "gops.mp4": {"gop": 12},
    "open.mp4": {"gop": 24, "params": "open-gop=1"},
    "open.mkv": {"gop": 24, "codec": "libx265", "params": "open-gop=1"},
    "refreshed.ts": {"params": "intra-refresh=1:keyint=20"},
    "variable.mp4": {"gop": 10, "pts_ms": np.cumsum(np.random.default_rng(0).integers(1, 400, FRAMES)).tolist()},
    "intra.mp4": {"gop": 1, "b_frames": 0},
    "one_group.mp4": {},
    "counted.avi": {"gop": 12},
    "v.webm": {"codec": "libvpx-vp9", "gop": 12, "b_frames": 0},
    "mpeg2.vob": {"codec": "mpeg2video", "gop": 12, "b_frames": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of noise that moves, so that a wrong reference changes every pixel; some joined, one damaged, and pictures."""
    folder = tmp_path_factory.mktemp("awkward")
    noise = np.random.default_rng(1).integers(0, 256, (64 + FRAMES, 64, 3), dtype=np.uint8)
    pictures = [noise[i : i + 64] for i in range(FRAMES)]
    for name, how in AWKWARD.items():
        write(folder / name, FRAMES, pictures=pictures, **how)
    for suffix in ("ts", "vob", "mkv"):
        halves = [write(folder / f"{n}.{suffix}", 30, gop=12, pictures=pictures[30 * n :]) for n in range(2)]
        (folder / f"joined.{suffix}").write_bytes(b"".join(Path(half).read_bytes() for half in halves))
    data = bytearray((folder / "gops.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    (folder / "damaged.mp4").write_bytes(data)
    for number in range(7):
        Image.fromarray(noise[number : number + 40]).save(folder / f"{number}.png")
    return folder


def video(folder, name, indices):
    refs = tuple(FrameRef(str(folder / name), (i,), True, Unit(1, 1, 1, 1)) for i in indices)
    return Document(np.zeros(1), np.zeros(1), refs, np.zeros(1), name)


def pictures(folder, count=7):
    refs = tuple(FrameRef(str(folder / f"{i}.png"), (0,), False, Unit(1, 1, 1, 1)) for i in range(count))
    return Document(np.zeros(1), np.zeros(1), refs, np.zeros(1), "pictures")


def decoder(**options):
    options = {"image_size": SIZE, "aspect": "resize", "workers": 3} | options
    return RowDecoder(lru_cache(probe_video), FailureReasons(), **options)


def by_one_thread(folder, name, indices):
    with VideoReader(probe_video(folder / name), indices) as reader:
        return preprocess([reader.frame(i) for i in indices], SIZE)


@pytest.fixture
def cut_small(monkeypatch):
    """Small videos are cut and given frame threads as large ones are."""
    monkeypatch.setattr(row_tasks, "SMALLEST_TASK", 1)
    monkeypatch.setattr(row_decoder, "LARGE_TASK", 1)


@pytest.mark.parametrize("name", [*AWKWARD, "joined.ts", "joined.vob", "joined.mkv"])
def test_frames_decoded_apart_by_many_threads_are_those_of_one_thread_to_the_bit(folder, cut_small, name):
    total = probe_video(folder / name).num_frames
    for indices in (range(total), range(0, total, 7), [11, 12, 13, 23, 24, total - 1], [total // 2]):
        truth = by_one_thread(folder, name, indices)
        for workers in (1, 5):
            with_threads = decoder(workers=workers)
            row = with_threads.submit(0, [video(folder, name, indices)], range(len(indices))).result()
            with_threads.close()
            assert row.undecodable == {}
            assert torch.equal(row.pixels, truth)
            assert row.work.frames == len(indices)


def test_the_parts_of_a_packed_row_lie_one_after_the_other(folder, cut_small):
    documents = [video(folder, "gops.mp4", range(0, 60, 4)), pictures(folder), video(folder, "open.mp4", [3, 50])]
    truth = torch.cat(
        [
            by_one_thread(folder, "gops.mp4", range(0, 60, 4)),
            preprocess([load_image(folder / f"{i}.png") for i in range(7)], SIZE),
            by_one_thread(folder, "open.mp4", [3, 50]),
        ]
    )
    rows = decoder()
    for local in (range(24), range(5, 20), range(15, 16), range(0)):
        row = rows.submit(0, documents, local).result()
        assert torch.equal(row.pixels, truth[local.start : local.stop])
    rows.close()


def test_the_reason_of_a_broken_sample_is_the_first_whoever_finds_it(folder, cut_small):
    documents = [video(folder, "damaged.mp4", range(0, 60, 3)), pictures(folder, 2), video(folder, "none.mp4", [1, 2])]
    found = []
    for workers in (1, 4, 4, 4):
        rows = decoder(workers=workers)
        found.append(rows.submit(0, documents, range(24)).result().undecodable)
        rows.close()
    assert all(undecodable == found[0] for undecodable in found)
    assert set(found[0]) == {0, 2} and "decoding frame" in found[0][0] and "no such file" in found[0][2]


def test_of_two_failures_of_a_document_the_first_counts_and_what_comes_before_it_is_still_tried(folder):
    rows = decoder(budget_bytes=5 * ROW)
    first = rows.submit(0, [pictures(folder, 5)], range(5))
    row = rows.submit(1, [pictures(folder, 5)], range(5))  # has not begun
    for number in (5, 2, 7):
        row.fault(0, number, MediaError("v.mp4", f"at {number}"))
    tasks = [row_tasks.Task(place, number, (), 0) for place, number in ((0, 1), (0, 3), (1, 3))]
    assert [row.wants(task) for task in tasks] == [True, False, True]
    first.cancel()
    assert row.result().undecodable == {0: "v.mp4: at 2"}
    rows.close()


def test_a_machine_at_its_end_ends_the_row(folder):
    def no_files(source):
        raise OSError(24, "Too many open files")

    rows = RowDecoder(no_files, FailureReasons(), image_size=SIZE, aspect="resize")
    with pytest.raises(MachineError, match=r"at sample gops\.mp4"):
        rows.submit(0, [video(folder, "gops.mp4", [1])], range(1)).result()
    rows.close()


def test_slices_cost_the_frames_on_the_way_and_hold_each_wanted_frame_once(folder):
    info = probe_video(folder / "gops.mp4")
    wanted = [2, 3, 13, 30, 59]
    apart = list(slices(info, wanted, 1))
    assert [(part.first, part.last, part.frames) for part in apart] == [(0, 2, 4), (2, 3, 2), (3, 4, 7), (4, 5, 12)]
    assert [(part.first, part.last) for part in slices(info, wanted, 10)] == [(0, 4), (4, 5)]
    assert [part.frames for part in slices(probe_video(folder / "counted.avi"), [5, 50], 1)] == [51]
    assert [part.frames for part in slices(probe_video(folder / "joined.mkv"), [5, 50], 1)] == [51]
    assert list(slices(info, [], 1)) == []


def test_rows_begin_as_far_as_the_budget_has_room_and_go_on_when_pixels_are_freed(folder):
    rows = decoder(budget_bytes=2 * 5 * ROW)
    pending = [rows.submit(turn, [pictures(folder, 5)], range(5)) for turn in range(4)]
    held = [pending[0].result(), pending[1].result()]
    with pytest.raises(HostBudgetError, match=r"the rows before it in the same step .* GiB as pixels: more than .*batch"):
        pending[2].result()
    assert rows._budget._held.keys() and len(rows._budget._held) == 2
    del held[0], pending[0]
    gc.collect()
    assert len(pending[-1].result().pixels) == 5
    rows.close()


def test_a_row_that_is_needed_again_does_not_wait_for_rows_behind_it(folder):
    rows = decoder(budget_bytes=2 * 5 * ROW)
    first = rows.submit(0, [pictures(folder, 5)], range(5))
    ahead = rows.submit(1, [pictures(folder, 5)], range(5))
    del first
    again = rows.submit(0, [pictures(folder, 7)], range(7))
    assert len(again.result().pixels) == 7
    assert len(ahead.result().pixels) == 5
    rows.close()


class Waits:
    """A row of ``size`` bytes; when its turn is asked for, what ``frees`` holds is freed."""

    def __init__(self, turn, size):
        self._turn, self.size, self.memory, self.frees = turn, size, None, None

    @property
    def turn(self):
        if self.frees is not None:
            self.frees.memory = None
        return self._turn

    def begin(self, memory):
        self.memory = memory


def test_room_that_comes_while_a_row_is_looked_after_is_given_to_the_next_one():
    budget = HostBudget(10)
    large, needed, after = Waits(1, 10), Waits(0, 5), Waits(2, 5)
    for row in (large, needed, after):
        budget.add(row)
    needed.frees = large
    assert budget.need(needed) is None and needed.memory is not None
    assert after.memory is not None


def test_a_row_for_which_the_machine_has_no_memory_fails_when_it_is_needed_and_no_other_does():
    budget = HostBudget(None)
    endless, before, behind = Waits(1, 2**60), Waits(0, 5), Waits(2, 5)
    for row in (endless, before, behind):
        budget.add(row)
    assert before.memory is not None and endless.memory is None
    with pytest.raises(MemoryError):
        budget.need(endless)
    assert budget.need(behind) is None and behind.memory is not None


def test_a_row_fits_where_another_thread_had_the_budget_when_room_came():
    budget = HostBudget(10)
    first, needed = Waits(0, 10), Waits(1, 10)
    budget.add(first)
    budget.add(needed)
    has_it, freed = threading.Event(), threading.Event()

    def hold():
        with budget._lock:
            has_it.set()
            freed.wait()
            budget._due = False
            freed.clear()
            while not budget._due:
                time.sleep(0.001)

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait()
    first.memory = None
    freed.set()
    while freed.is_set():
        time.sleep(0.001)
    assert budget.need(needed) is None
    thread.join()
    assert needed.memory is not None


def test_a_row_larger_than_the_budget_is_refused_with_sample_frames_setting_and_cure(folder):
    rows = decoder(budget_bytes=ROW * 10)
    small = rows.submit(0, [pictures(folder, 2)], range(2))
    documents = [pictures(folder, 2), video(folder, "gops.mp4", range(60))]
    large = rows.submit(1, documents, range(62))
    assert len(small.result().pixels) == 2
    told = r"the 60 frames of sample gops\.mp4 .* all of its row .* data\.host_memory_gib=.*raise it.*data\.num_frames.*ring"
    with pytest.raises(HostBudgetError, match=told):
        large.result()
    rows.close()


def test_rows_that_are_given_up_free_their_room(folder):
    rows = decoder(budget_bytes=5 * ROW)
    first, second = (rows.submit(turn, [pictures(folder, 5)], range(5)) for turn in range(2))
    first.cancel()
    with pytest.raises(ClosedError):
        first.result()
    assert len(second.result().pixels) == 5
    rows.close()
    with pytest.raises(ClosedError):
        rows.submit(2, [pictures(folder, 5)], range(5)).result()


def test_jobs_of_the_row_that_is_needed_first_go_first():
    done, gate = [], threading.Event()
    pool = DecodePool(1)
    pool.submit([Job(0, 0, lambda _: gate.wait())])
    pool.submit(Job(turn, place, lambda _, name=(turn, place): done.append(name)) for turn in (3, 1, 2) for place in (1, 0))
    last = threading.Event()
    pool.submit([Job(9, 0, lambda _: last.set())])
    gate.set()
    last.wait()
    pool.close()
    assert done == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


def test_idle_threads_are_lent_once_and_only_if_nothing_waits():
    lent, gates = [], [threading.Event() for _ in range(3)]
    pool = DecodePool(4)
    begun = threading.Semaphore(0)

    def job(number, **options):
        def run(chosen):
            lent.append((number, chosen.threads))
            begun.release()
            gates[number].wait()

        return Job(0, number, run, **options)

    pool.submit([job(0, uses_threads=True)])
    begun.acquire()
    pool.submit([job(1, uses_threads=True)])
    begun.acquire()
    assert sum(threads for _, threads in lent) <= 5  # four, and one that was lent before its own job came
    gates[0].set()
    pool.submit([job(2)])
    begun.acquire()
    assert lent[2] == (2, 1)
    for gate in gates:
        gate.set()
    pool.close()


def test_engines_stand_still_until_they_are_to_be_used_and_cores_stand_aside_then():
    names = []

    def jobs():
        return [Job(0, place, lambda _: names.append(threading.current_thread().name), for_engine=True) for place in range(9)]

    def done(count):
        while len(names) < count:
            pass
        return set(names)

    pool = DecodePool(3, engines=4)
    pool.submit(jobs())
    assert done(9) <= {"decode-0", "decode-1", "decode-2"}
    names.clear()
    pool.use_engines(True)
    pool.submit(jobs())
    assert not done(9) & {"decode-1", "decode-2"}
    pool.close()


def test_engines_are_needed_while_rows_are_late():
    need = Need()
    assert not any(need.note(late=True) for _ in range(UNJUDGED_ROWS))
    assert [need.note(late) for late in (True, False, True, True, True, False, False, False)] == [
        *(False, False, False, True, False, False, False),
        True,
    ]
    assert not need.is_there


def test_engines_take_only_what_they_can_do_and_cores_leave_it_to_them_if_asked():
    found = {}

    def job(place, for_engine):
        return Job(0, place, lambda chosen: found.setdefault(place, chosen.on_engine), for_engine=for_engine)

    pool = DecodePool(2, engines=2, cores_do_all=False)
    pool.use_engines(True)
    pool.submit(job(place, place % 2 == 0) for place in range(20))
    while len(found) < 20:
        pass
    pool.close()
    assert found == {place: place % 2 == 0 for place in range(20)}
    # Cores leave jobs to engines that are not in use yet, too.
    found.clear()
    pool = DecodePool(1, engines=1, cores_do_all=False)
    pool.submit([job(0, True), job(1, False)])
    while 1 not in found:
        pass
    assert 0 not in found
    pool.close()
    # Without engines cores do all.
    found.clear()
    pool = DecodePool(1, engines=0, cores_do_all=False)
    pool.submit([job(0, True)])
    while not found:
        pass
    pool.close()
    assert found == {0: False}


class Refusing:
    """In the place of video engines, which need a GPU: opens a video and gives up at its third frame."""

    def open_video(self, source):
        return open_video(source)

    def fetch(self, frame, size, reformatter):
        if frame.pts > 2 * frame.duration:
            raise VideoEngineError("enough")
        return as_decoded(reformatter.reformat(frame, format="nv12"), reformatter)


def test_what_an_engine_begins_and_gives_up_is_done_by_a_core_with_the_same_pixels(folder, cut_small, monkeypatch):
    monkeypatch.setattr(row_decoder, "engines_of", lambda name: Refusing())
    rows = decoder(workers=1, video_decoder="nvdec")
    row = rows.submit(0, [video(folder, "gops.mp4", range(20))], range(20)).result()
    assert torch.equal(row.pixels, by_one_thread(folder, "gops.mp4", range(20)))
    assert row.undecodable == {} and str(folder / "gops.mp4") in rows._unsuited
    rows.close()


@pytest.mark.parametrize("range_", [ColorRange.MPEG, ColorRange.JPEG])
def test_frames_as_engines_give_them_become_the_pictures_of_a_core(folder, range_):
    with av.open(str(folder / "gops.mp4")) as container:
        frame = next(container.decode(video=0))
    frame.color_range = range_
    as_nv12 = VideoReformatter().reformat(frame, format="nv12")
    by_engine, by_core = (
        VideoReformatter().reformat(each, format="rgb24").to_ndarray()
        for each in (as_decoded(as_nv12, VideoReformatter()), frame)
    )
    assert np.array_equal(by_engine, by_core)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be video engines")
def test_a_machine_without_video_engines_refuses_them_and_does_without_where_it_may():
    with pytest.raises(SettingError, match=r"data\.video_decoder=nvdec: .* use auto or cpu"):
        decoder(video_decoder="nvdec")
    decoder(video_decoder="auto").close()
