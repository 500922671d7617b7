"""Checkpoints on real gloo ranks: exact resume, other layouts, the folder, and crashes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing

from megatron_vila.checkpoint.optimizer_shards import blocks_of_range
from megatron_vila.checkpoint.save_load import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_vila.errors import CheckpointError
from tests.ranks import pool
from tests.training.small_run import build, same

ONE = (1, (1, 1, 1, 1))
DP2, TP2, PP2, ULYSSES2, RING2 = (
    (2, (1, 1, 1, 1)),
    (2, (2, 1, 1, 1)),
    (2, (1, 2, 1, 1)),
    (2, (1, 1, 2, 1)),
    (2, (1, 1, 1, 2)),
)
TP2_RING2, TP2_PP2, PP2_DP2 = (4, (2, 1, 1, 2)), (4, (2, 2, 1, 1)), (4, (1, 2, 1, 1))


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_blocks_cover_a_flat_range_once_and_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    places = torch.arange(numel).view(shape)
    covered = []
    for offset, size, flat in blocks_of_range(shape, start, stop):
        block = places[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        assert tuple(block.shape) == size and int(block.flatten()[0]) == flat
        covered += block.flatten().tolist()
    assert covered == list(range(start, stop))


# ---------------------------------------------------------------------------------------------------------------------
# save, go on; load, go on


def save_and_go_on(rank, layout, folder, steps, options):
    run = build(layout, **options)
    for step in range(steps):
        run.step(step)
    extra = {"data": {"epoch": 3, "order": [1, 2]}, "rng": torch.arange(4)}
    save_checkpoint(
        folder, steps, [run.ddp], run.optimizer, run.scheduler, extra, info={"model": "small", "layout": layout}
    )
    norms = [run.step(step) for step in range(steps, steps + 3)]
    return norms, run.state()


def load_and_go_on(rank, layout, folder, steps, options):
    run = build(layout, train__seed=99, **options)
    extra = load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)
    assert extra["data"] == {"epoch": 3, "order": [1, 2]} and extra["rng"].tolist() == [0, 1, 2, 3]
    assert run.scheduler.num_steps == steps
    save_checkpoint(Path(folder) / "again", steps, [run.ddp], run.optimizer, run.scheduler)
    norms = [run.step(step) for step in range(steps, steps + 3)]
    return norms, run.state()


def content(rank, run_folder):
    """All tensors of a checkpoint, whole."""
    return dist_checkpointing.load_plain_tensors(str(latest_checkpoint(run_folder)))


def check(folder, saved_with, loaded_with, dtype=torch.float32, steps=3, **options):
    options["dtype"] = dtype
    truth = pool.run(saved_with[0], save_and_go_on, saved_with[1], str(folder), steps, options)
    (saved,) = pool.run(1, content, str(folder))
    for world_size, layout in loaded_with:
        results = pool.run(world_size, load_and_go_on, layout, str(folder), steps, options)
        (again,) = pool.run(1, content, str(folder / "again"))
        assert same(saved, again), f"{layout} did not load what {saved_with} saved"
        if (world_size, layout) == saved_with:
            assert all(same(list(a), list(b)) for a, b in zip(results, truth, strict=True)), (
                "going on is not bitwise equal"
            )
        assert results[0][0] == pytest.approx(truth[0][0], rel=1e-5)


@pytest.mark.parametrize("layout", [ONE, DP2, TP2, PP2, RING2, TP2_RING2], ids=str)
def test_going_on_after_a_resume_is_bitwise_the_same_in_the_same_layout(tmp_path, layout):
    check(tmp_path, layout, [layout])


@pytest.mark.parametrize("tied", [False, True], ids=["own_output", "tied_output"])
def test_a_checkpoint_of_one_process_loads_exactly_under_every_layout(tmp_path, tied):
    check(tmp_path, ONE, [DP2, TP2, PP2, ULYSSES2, TP2_RING2, TP2_PP2, PP2_DP2], tied=tied)


@pytest.mark.parametrize("saved_with", [DP2, TP2, PP2, RING2, TP2_RING2, TP2_PP2], ids=str)
def test_a_checkpoint_of_any_layout_loads_exactly_under_another(tmp_path, saved_with):
    others = {DP2: TP2_PP2, TP2: PP2, PP2: TP2_RING2, RING2: TP2, TP2_RING2: PP2_DP2, TP2_PP2: RING2}
    check(tmp_path, saved_with, [others[saved_with], ONE], tied=saved_with == PP2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_bfloat16_with_main_copies_and_float64_resume_bitwise_and_reshard(tmp_path, dtype):
    check(tmp_path, TP2, [TP2, ONE, RING2], dtype=dtype)


def test_frozen_parts_are_saved_without_optimizer_state(tmp_path):
    frozen = {"optim__vision__trainable": False, "optim__projector__trainable": False}
    check(tmp_path, PP2, [PP2, DP2], **frozen)
    (tensors,) = pool.run(1, content, str(tmp_path))
    assert any(key.startswith("vision.") for key in tensors)
    assert {key.split(".")[2] for key in tensors if key.startswith("optimizer.")} == {"llm"}


def test_a_checkpoint_before_the_first_step_resumes_bitwise(tmp_path):
    check(tmp_path, DP2, [DP2, TP2], steps=0)


def weights_of_a_new_run(rank, layout, folder, dtype):
    run = build(layout, dtype, train__seed=99)
    load_checkpoint(folder, [run.model])
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_weights_alone_start_a_new_run_in_another_precision(tmp_path):
    ((_, before),) = pool.run(1, save_weights, str(tmp_path))
    ((weights),) = pool.run(1, weights_of_a_new_run, ONE[1], str(tmp_path), torch.bfloat16)
    assert same(weights, {name: p.bfloat16() for name, p in before.items()})


def save_weights(rank, folder):
    run = build(ONE[1])
    run.step(0)
    path = save_checkpoint(folder, 1, [run.model])
    return str(path), run.state()["weights"]


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def saves(rank, layout, folder, steps, keep):
    run = build(layout)
    for step in steps:
        run.scheduler.num_steps = step
        extra = {"step": step}
        save_checkpoint(folder, step, [run.ddp], run.optimizer, run.scheduler, extra, keep=keep, info={"model": "small"})


def names(folder) -> list[str]:
    return sorted(entry.name for entry in (Path(folder) / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_later_steps_are_left_alone(tmp_path):
    pool.run(2, saves, TP2[1], str(tmp_path), [50, 10, 20, 30], 2)
    assert names(tmp_path) == ["latest", "step-00000020", "step-00000030", "step-00000050"]
    assert latest_checkpoint(tmp_path).name == "step-00000030"


def test_half_written_checkpoints_are_ignored_and_removed_by_the_next_save(tmp_path):
    pool.run(1, saves, ONE[1], str(tmp_path), [10], 0)
    root = tmp_path / "checkpoints"
    (root / ".step-00000020.partial").mkdir()
    (root / ".step-00000020.partial" / "__0_0.distcp").write_bytes(b"half")
    (root / "step-00000030").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    pool.run(1, saves, ONE[1], str(tmp_path), [40], 0)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000030", "step-00000040"]
    assert latest_checkpoint(tmp_path).name == "step-00000040"


def test_names_that_are_not_exactly_ours_are_neither_loaded_nor_counted_nor_deleted(tmp_path):
    pool.run(1, saves, ONE[1], str(tmp_path), [10], 1)
    root = tmp_path / "checkpoints"
    foreign = ["step-00000010-best", "step-00000099.bak", "step-99", "step-00000010-01", "step-0000x010", "step-00000010-2 copy"]
    foreign += [".step-00000010.partial.bak", ".step-mine.partial", "best"]
    for name in foreign:
        shutil.copytree(root / "step-00000010", root / name)
    (root / "step-00000011.txt").write_text("notes")
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    pool.run(1, saves, ONE[1], str(tmp_path), [10, 20, 20], 1)
    assert names(tmp_path) == sorted([*foreign, "latest", "step-00000011.txt", "step-00000020-1"])
    assert latest_checkpoint(tmp_path).name == "step-00000020-1"
    # A copy is a checkpoint for whoever names it.
    assert pool.run(1, load_whatever_there_is, ONE[1], str(root / "step-00000010-best")) == [10]


def test_latest_falls_back_to_the_last_finished_step_when_the_pointer_is_lost_or_stale(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    pool.run(1, saves, ONE[1], str(tmp_path), [10, 200], 0)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text("step-00000010\n")
    assert latest_checkpoint(tmp_path).name == "step-00000010"
    for text in ("step-00000999\n", ""):
        pointer.write_text(text)
        assert latest_checkpoint(tmp_path).name == "step-00000200"
    pointer.unlink()
    assert latest_checkpoint(tmp_path).name == "step-00000200"


def test_a_second_save_of_a_step_takes_the_place_of_the_first(tmp_path):
    pool.run(2, saves, DP2[1], str(tmp_path), [5, 10, 10, 10], 2)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010-2"]
    assert latest_checkpoint(tmp_path).name == "step-00000010-2"


def test_info_tells_a_human_what_the_checkpoint_is(tmp_path):
    pool.run(2, saves, DP2[1], str(tmp_path), [7], 0)
    info = json.loads((latest_checkpoint(tmp_path) / "info.json").read_text())
    assert (info["format"], info["step"], info["model"], info["world_size"]) == (1, 7, "small", 2)
    assert info["versions"]["torch"] and info["versions"]["megatron-core"]
    assert "__0_0.distcp" in info["files"] and "state.pt" in info["files"]


def test_extra_with_anything_but_plain_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"extra\['data'\]\[1\] is a PosixPath; a checkpoint holds plain"):
        save_checkpoint(tmp_path, 1, [], extra={"data": [1, Path("x")]})
    assert not (tmp_path / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------------------
# crashes

SAVE_FOR_EVER = """
import sys
import torch
torch.set_num_threads(1)
from megatron_vila import accelerator, processes
accelerator.prepare()
processes.init_distributed()
from megatron_vila.checkpoint.save_load import save_checkpoint
from tests.training.small_run import build
run = build((1, 1, 1, 1))
step = 0
while True:
    run.step(step)
    step += 1
    save_checkpoint(sys.argv[1], step, [run.ddp], run.optimizer, run.scheduler, {"step": step}, keep=2)
    print(step, flush=True)
"""


def load_whatever_there_is(rank, layout, folder):
    run = build(layout)
    extra = load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)
    assert run.scheduler.num_steps == extra["step"]
    assert math.isfinite(run.step(extra["step"]))
    return extra["step"]


def test_kill_9_while_saving_leaves_the_last_finished_checkpoint_loadable(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    done = 0
    try:
        for done in range(3):
            assert int(process.stdout.readline()) == done + 1
        # Wait for the middle of a save, then kill without warning.
        while not list((tmp_path / "checkpoints").glob(".step-*.partial/*")):
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    (step,) = pool.run(1, load_whatever_there_is, ONE[1], str(tmp_path))
    assert step >= 3
    assert pool.run(2, load_whatever_there_is, DP2[1], str(tmp_path)) == [step, step]


def test_a_crash_between_any_two_file_operations_leaves_a_loadable_checkpoint(tmp_path):
    pool.run(1, crash_points, str(tmp_path))


class Crash(BaseException):
    pass


class CrashAt:
    """An audit hook that, once armed with a number, lets so many file operations pass and stops at every later one."""

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.left is not None and event in ("os.rename", "shutil.rmtree", "os.rmdir", "os.remove", "os.mkdir"):
            self.left -= 1
            if self.left < 0:
                raise Crash


def crash_points(rank, folder):
    """Stop a save at each rename, delete and pointer update in turn; each time the folder must still load."""
    run, crash = build(ONE[1]), CrashAt()
    point, finished = 0, False
    while not finished:
        place = Path(folder) / str(point)
        for step in (1, 2):
            save_checkpoint(place, step, [run.ddp], run.optimizer, run.scheduler, {"step": step}, keep=1)
        crash.left = point
        try:
            save_checkpoint(place, 2, [run.ddp], run.optimizer, run.scheduler, {"step": 2}, keep=1)
            finished = True
        except (Crash, CheckpointError):  # torch turns a crash inside its writer into an error
            pass
        crash.left = None
        assert load_whatever_there_is_in(run, place) == 2, f"crash point {point}"
        save_checkpoint(place, 3, [run.ddp], run.optimizer, run.scheduler, {"step": 3}, keep=1)
        assert names(place) == ["latest", "step-00000003"], f"crash point {point}"
        point += 1
    assert point > 4


def load_whatever_there_is_in(run, folder):
    return load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)["step"]
