"""Damage to a checkpoint's files is noticed before anything is loaded, named, and never passed over without a word."""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vila.checkpoint import files as checkpoint_files
from megatron_vila.checkpoint.save_load import latest_checkpoint, load_checkpoint, newest_whole, save_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.verify import verify_files
from megatron_vila.dry_run import describe_start
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.parallel.agreement import on_all_ranks
from tests.checkpoint.damage import flip_a_byte, seal_info, without_sums
from tests.ranks import pool
from tests.training.real_run import numbers, overrides, train
from tests.training.small_run import build
from tools.convert_checkpoint import main as convert

LAYOUT = (1, 1, 1, 1)


def save_steps(rank, folder, steps):
    run = build(LAYOUT)
    for step in steps:
        run.step(step)
        info = {"config": asdict(run.config), "model": "small"}
        save_checkpoint(folder, step, [run.ddp], run.optimizer, run.scheduler, {"step": step}, info=info)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pool.run(2, save_steps, str(folder), [1, 2])
    return folder


@pytest.fixture
def two_steps(tmp_path, saved):
    """A run's folder with the checkpoints of steps 1 and 2, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def load(rank, folder, weights_only=False):
    """The step that was loaded, or why nothing was."""
    run = build(LAYOUT)
    rest = [] if weights_only else [run.optimizer, run.scheduler]
    try:
        return load_checkpoint(folder, [run.model if weights_only else run.ddp], *rest)["step"]
    except CheckpointError as error:
        dist.barrier()
        return str(error)


def test_one_flipped_byte_of_a_tensor_is_named_on_all_ranks_with_the_way_on(two_steps):
    newest = latest_checkpoint(two_steps)
    flip_a_byte(newest / "__1_0.distcp", 2000)
    size = (newest / "__1_0.distcp").stat().st_size
    for text in pool.run(2, load, str(two_steps)):
        assert f"step-00000002: damaged files, whose content is not what was written: __1_0.distcp (bytes 0 to {size})" in text
        assert "checkpoint.resume=newest_whole (the next one is step-00000001)" in text
    for text in pool.run(2, load, str(two_steps), True):
        assert f"checkpoint.load={newest.with_name('step-00000001')}" in text


def test_a_file_of_an_older_step_in_the_place_of_a_newer_one_is_noticed(two_steps):
    old, new = two_steps / "checkpoints/step-00000001", two_steps / "checkpoints/step-00000002"
    assert (old / "__0_0.distcp").stat().st_size == (new / "__0_0.distcp").stat().st_size
    shutil.copy(old / "__0_0.distcp", new)
    for text in pool.run(2, load, str(two_steps)):
        assert "damaged files, whose content is not what was written: __0_0.distcp" in text


def load_with_each_file_damaged(rank, folder):
    run, found = build(LAYOUT), {}
    for path in sorted(latest_checkpoint(folder).iterdir()):
        flip_a_byte(path, len(path.read_bytes()) // 2)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)
        flip_a_byte(path, len(path.read_bytes()) // 2)
        found[path.name] = str(error.value)
    return found, load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)["step"]


def test_every_file_of_a_checkpoint_is_checked(two_steps):
    ((found, step),) = pool.run(1, load_with_each_file_damaged, str(two_steps))
    names = {"__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "common.pt", "state.pt", "info.json"}
    assert found.keys() == names and step == 2
    assert all(f": {name} (bytes" in text or name == "info.json" for name, text in found.items())
    assert "info.json is damaged" in found["info.json"]


def share_the_check(rank, folder):
    """The blocks that this rank reads, of small ones, and all there are."""
    read, damage = [], checkpoint_files.damage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "BLOCK", 1000)
        patch.setattr(checkpoint_files, "damage", lambda *given: read.extend(given[2]) or damage(*given))
        run = build(LAYOUT)
        save_checkpoint(folder, 1, [run.ddp], run.optimizer, run.scheduler, {"step": 1})
        info = checkpoint_files.read_info(latest_checkpoint(folder))
        assert load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler) == {"step": 1}
        dist.barrier()
        path = latest_checkpoint(folder) / "__0_0.distcp"
        if rank == 0:
            flip_a_byte(path, 2500)
        dist.barrier()
        with pytest.raises(CheckpointError, match=r"__0_0.distcp \(bytes 2000 to 3000\)"):
            load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)
        return read[: len(read) // 2], checkpoint_files.blocks_to_check(info)


def test_the_ranks_share_the_check_and_name_the_damaged_part_of_a_large_file(tmp_path):
    (first, blocks), (second, _) = pool.run(2, share_the_check, str(tmp_path))
    assert sorted(first + second) == sorted(blocks) and abs(len(first) - len(second)) <= 1 < len(blocks)


def resumed(rank, settings):
    """What the run says, or why it does not start."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("megatron_vila")
    logger.addHandler(handler)
    try:
        train(rank, settings)
    except CheckpointError as error:
        dist.barrier()
        return str(error)
    finally:
        logger.removeHandler(handler)
    return said


def test_newest_whole_passes_over_damaged_checkpoints_with_a_line_and_sets_them_aside(videos, tmp_path):
    output = tmp_path / "run"
    root = output / "checkpoints"
    settings = overrides(videos, output, "train.steps=3", "checkpoint.save_every=1", "checkpoint.keep=0")
    pool.run(1, train, settings)
    unbroken = numbers(output)
    flip_a_byte(root / "step-00000003/__0_0.distcp", 5000)
    (root / "step-00000002/state.pt").unlink()
    (refused,) = pool.run(1, resumed, settings)
    assert "step-00000003" in refused and "checkpoint.resume=newest_whole (the next one is step-00000002)" in refused
    (said,) = pool.run(1, resumed, [*settings, "checkpoint.resume=newest_whole"])
    passed = [line for line in said if line.startswith("damaged and passed over, now called")]
    assert ["step-00000003.damaged" in passed[0], "step-00000002.damaged" in passed[1]] == [True, True]
    assert "__0_0.distcp (bytes" in passed[0] and "missing or truncated files: state.pt" in passed[1]
    assert any(line.startswith(f"continuing from {root / 'step-00000001'}") for line in said)
    # The steps are taken and saved again under their own names; what is damaged stays for people to look at.
    names = {path.name for path in root.iterdir()}
    steps = {f"step-0000000{step}" for step in (1, 2, 3)}
    assert names == {"latest", *steps, "step-00000002.damaged", "step-00000003.damaged"}
    assert (root / "latest").read_text() == "step-00000003\n" and numbers(output) == unbroken
    # Nothing is left to say.
    (said,) = pool.run(1, resumed, settings)
    assert not [line for line in said if "damaged" in line]


def choose(rank, folder):
    try:
        found, passed = newest_whole(folder)
    except CheckpointError as error:
        return str(error)
    return found.name if found else None, [path.name for path in passed]


def test_newest_whole_without_a_whole_checkpoint_starts_nothing_anew(two_steps):
    assert pool.run(2, choose, str(two_steps / "nowhere")) == [(None, [])] * 2
    for step in (1, 2):
        flip_a_byte(two_steps / f"checkpoints/step-0000000{step}/.metadata")
    for text in pool.run(2, choose, str(two_steps)):
        assert "no checkpoint of " in text and "step-00000002: damaged" in text and "step-00000001: damaged" in text


def test_newest_whole_renames_nothing_and_ends_where_it_cannot_tell_whether_a_checkpoint_is_whole(two_steps):
    newest = two_steps / "checkpoints/step-00000002"
    info = json.loads((newest / "info.json").read_text())
    seal_info(newest, info | {"format": 2})
    for text in pool.run(2, choose, str(two_steps)):
        assert f"checkpoint.resume=newest_whole cannot tell whether {newest} is whole" in text
        assert "update megatron_vila; nothing was renamed: " in text
    config = Config()
    config.train.output, config.checkpoint.resume = str(two_steps), "newest_whole"
    with pytest.raises(CheckpointError, match="cannot tell whether .*step-00000002 is whole: .*update megatron_vila"):
        describe_start(config)
    seal_info(newest, info)
    assert pool.run(2, choose, str(two_steps)) == [("step-00000002", [])] * 2


@pytest.mark.parametrize("name", ["info.json", "__1_0.distcp", ".metadata", "state.pt"])
def test_a_file_that_the_system_does_not_let_read_is_not_taken_for_damage(saved, name):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(saved, Path(folder) / "run"))
        for path in (Path(folder), run):
            path.chmod(0o755)
        (run / "checkpoints/step-00000002" / name).chmod(0)
        for text in pool.run(2, choose_as_another_user, str(run)):
            assert "cannot tell whether" in text and "Permission denied" in text and "nothing was renamed" in text


def choose_as_another_user(rank, folder):
    if os.geteuid() != 0:
        return choose(rank, folder)
    os.seteuid(65534)
    try:
        return choose(rank, folder)
    finally:
        os.seteuid(0)


def test_an_input_output_error_in_the_middle_of_a_file_is_not_taken_for_damage():
    with open("/proc/self/mem", "rb") as file, pytest.raises(CheckpointError, match="state.pt cannot be read: OSError") as caught:
        checkpoint_files.load_plain(file, "state.pt")
    assert not isinstance(caught.value, DamagedError) and "Input/output error" in str(caught.value)


def fails_in_two_ways(rank):
    def fail():
        raise DamagedError("a hole") if rank == 0 else OSError(5, "Input/output error")

    with pytest.raises(CheckpointError, match=r"cannot load: OSError: .*Input/output error") as caught:
        on_all_ranks(fail, "cannot load")
    dist.barrier()
    return type(caught.value) is CheckpointError


def test_what_one_rank_cannot_read_is_not_damaged_because_another_rank_says_so():
    assert pool.run(2, fails_in_two_ways) == [True, True]


def test_a_run_whose_checkpoints_lost_their_info_or_their_folders_does_not_start_anew(videos, two_steps):
    root = two_steps / "checkpoints"
    (root / "latest").unlink()
    for step in (1, 2):
        (root / f"step-0000000{step}/info.json").unlink()
    settings = overrides(videos, two_steps, "train.steps=3")
    (text,) = pool.run(1, resumed, settings)
    assert "cannot load checkpoint" in text and "step-00000002: info.json cannot be opened as a plain file" in text
    for text in pool.run(2, choose, str(two_steps)):
        assert "no checkpoint of " in text and "step-00000002: info.json" in text and "step-00000001: info.json" in text
    for step in (1, 2):
        shutil.rmtree(root / f"step-0000000{step}")
    (root / "latest").write_text("step-00000002\n")
    words = "latest tells of a checkpoint, and none is there any more; restore it from a copy, or remove that file"
    for more in ("true", "newest_whole"):
        (text,) = pool.run(1, resumed, [*settings, f"checkpoint.resume={more}"])
        assert words in text
    with pytest.raises(CheckpointError, match=words):
        describe_start(load_config("tiny", settings))


def test_a_folder_or_a_pipe_in_the_place_of_latest_ends_the_start(videos, two_steps):
    root = two_steps / "checkpoints"
    settings = overrides(videos, two_steps, "train.steps=3")
    for make in (os.mkdir, os.mkfifo):
        (root / "latest").unlink(missing_ok=True)
        make(root / "latest")
        (text,) = pool.run(1, resumed, settings)
        assert f"{root / 'latest'}: latest is not a plain file; remove it" in text
        (root / "latest").rmdir() if make is os.mkdir else (root / "latest").unlink()


def test_later_steps_than_latest_says_are_no_candidates_and_a_checkpoint_without_info_is_damaged(two_steps):
    (two_steps / "checkpoints/latest").write_text("step-00000001\n")
    assert pool.run(1, choose, str(two_steps)) == [("step-00000001", [])]
    (two_steps / "checkpoints/latest").write_text("step-00000002\n")
    (two_steps / "checkpoints/step-00000002/info.json").unlink()
    assert pool.run(1, choose, str(two_steps)) == [("step-00000001", ["step-00000002"])]


def test_checkpoints_without_checksums_load_with_one_line_that_says_so(two_steps, caplog):
    for step in (1, 2):
        without_sums(two_steps / f"checkpoints/step-0000000{step}")
    assert pool.run(2, load_and_listen, str(two_steps)) == [1, 0]
    with caplog.at_level(logging.WARNING):
        StoredModel(two_steps)
    assert caplog.text.count("was saved by a version without checksums: the content of its files is unchecked") == 1
    assert str(verify_files(two_steps)).startswith("unchecked: ")


def load_and_listen(rank, folder):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_vila").addHandler(handler)
    assert load(rank, folder) == 2
    logging.getLogger("megatron_vila").removeHandler(handler)
    return sum("was saved by a version without checksums" in line for line in said)


def test_the_tool_verifies_one_checkpoint_and_names_what_is_damaged(two_steps, capsys):
    assert convert(["verify", str(two_steps)]) == 0
    assert f"whole: {two_steps / 'checkpoints/step-00000002'} (6 files" in capsys.readouterr().out
    flip_a_byte(two_steps / "checkpoints/step-00000002/__1_0.distcp", 99)
    (two_steps / "checkpoints/step-00000002/common.pt").unlink()
    assert convert(["verify", str(two_steps)]) == 1
    said = capsys.readouterr().out
    assert "damaged: " in said and "- missing or truncated files: common.pt" in said and "__1_0.distcp (bytes 0 to" in said
    assert convert(["verify", str(two_steps / "checkpoints/step-00000001")]) == 0
    assert convert(["verify", str(Path(two_steps) / "nowhere")]) == 2
    assert "no finished checkpoint there" in capsys.readouterr().err
    assert json.loads((two_steps / "checkpoints/step-00000001/info.json").read_text())["sums"]["algorithm"] == "xxh3_64"
