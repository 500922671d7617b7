"""No file of a checkpoint runs code or opens anything outside of its folder, whichever door it comes in by."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_vila.checkpoint.save_load import load_checkpoint, newest_whole, save_checkpoint
from megatron_vila.checkpoint.tensors import ALLOWED
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.verify import verify, verify_files
from megatron_vila.errors import CheckpointError
from tests.checkpoint.damage import FORGED_INFO, FORGERIES, UNREAD, Attack, seal, seal_info
from tests.ranks import pool
from tests.training.small_run import build

SEEN_IN_TENSORS = {
    "code in a tensor file", "pickle in a tensor file", "other tensor", "other element type in a tensor file",
    "tensor without data", "piece named twice", "pieces that overlap", "table of three axes",
}  # fmt: skip
"""Forgeries that whoever reads no tensor lets pass."""
STATE_DOORS, ALL_DOORS = ("resume", "load", "newest_whole"), ("resume", "load", "newest_whole", "export", "verify", "compare")


def _read_all(folder: Path) -> None:
    model = StoredModel(folder)
    for name in model.infos:
        model.read(name)


def _verify(folder: Path) -> None:
    report = verify_files(folder)
    if not report.whole:
        raise ConversionError(str(folder), report.problems)


def _doors(run, folder: Path, good: Path) -> dict[str, Callable[[], object]]:
    return {
        "resume": lambda: load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler),
        "load": lambda: load_checkpoint(folder, [run.model]),
        "newest_whole": lambda: newest_whole(folder.parents[1]),
        "export": lambda: _read_all(folder),
        "verify": lambda: _verify(folder),
        "compare": lambda: verify(folder, good),
    }


def _saved(run, folder: Path) -> Path:
    return save_checkpoint(
        folder, 1, [run.ddp], run.optimizer, run.scheduler, {"step": 1}, info={"config": asdict(run.config), "model": "small"}
    )


def _then_seal(forge):
    return lambda folder: (forge(folder), seal(folder))


def _change_info(change):
    def forge(folder):
        info = json.loads((folder / "info.json").read_text())
        change(info)
        seal_info(folder, info)

    return forge


def every_forgery_at_every_door(rank, folder):
    """{(forgery, door): message, or None where the door let it pass}, and forgeries that ran."""
    run, found, ran = build((1, 1, 1, 1)), {}, []
    good = _saved(run, Path(folder) / "good")
    (Path(folder) / "outside").write_bytes(b"x")
    makers = {name: _then_seal(maker) for name, (maker, _) in FORGERIES.items()}
    makers |= {name: _then_seal(maker) for name, maker in UNREAD.items()}
    makers |= {name: _change_info(change) for name, (change, _) in FORGED_INFO.items()}
    for number, (name, forge) in enumerate(makers.items()):
        root = Path(folder) / str(number) / "checkpoints"
        copy = root / good.name
        shutil.copytree(good, copy)
        os.environ["ATTACK_MARK"] = str(root / "mark")
        forge(copy)
        for door, enter in _doors(run, copy, good).items():
            found[name, door] = None
            try:
                enter()
            except (CheckpointError, ConversionError) as error:
                found[name, door] = str(error)
            if (root / "mark").exists():
                ran.append((name, door))
                (root / "mark").rmdir()
    return found, ran


@pytest.fixture(scope="module")
def forged(tmp_path_factory):
    return pool.run(1, every_forgery_at_every_door, str(tmp_path_factory.mktemp("forged")))[0]


def test_no_forged_file_of_a_checkpoint_runs_code_at_any_door(forged):
    assert forged[1] == []


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_is_refused_with_what_is_wrong(forged, name):
    """By every door that reads the forged file: the state of the run is none of an export's business."""
    doors = STATE_DOORS if FORGERIES[name][1].startswith("state.pt ") else ALL_DOORS
    for door in doors:
        if name in SEEN_IN_TENSORS and door in ("newest_whole", "verify"):
            continue
        assert FORGERIES[name][1] in (forged[0][name, door] or ""), (door, forged[0][name, door])


@pytest.mark.parametrize("name", FORGED_INFO)
def test_what_info_json_cannot_say_is_refused_with_what_is_wrong(forged, name):
    """The configuration of a checkpoint is an export's business alone."""
    of_the_model = ("configuration", "unknown projector", "files of Hugging Face", "file of Hugging Face")
    for door in ("export", "compare") if name.startswith(of_the_model) else ALL_DOORS:
        assert FORGED_INFO[name][1] in (forged[0][name, door] or ""), (door, forged[0][name, door])


@pytest.mark.parametrize("name", UNREAD)
def test_files_for_megatron_core_alone_are_not_read(forged, name):
    assert {door: forged[0][name, door] for door in ALL_DOORS} == dict.fromkeys(ALL_DOORS)


NAMED: set[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if NAMED is not None and event == "pickle.find_class":
        NAMED.add(".".join(arguments))


@contextmanager
def everything_that_is_unpickled():
    """Names that pickle, or torch's restricted unpickler, looks up meanwhile."""
    global NAMED
    sys.addaudithook(_watch)
    restricted = torch._weights_only_unpickler
    allowed = restricted._get_allowed_globals

    class Recorded(dict):
        def __contains__(self, name):
            NAMED.add(name)
            return super().__contains__(name)

    NAMED = set()
    restricted._get_allowed_globals = lambda: Recorded(allowed())
    try:
        yield NAMED
    finally:
        restricted._get_allowed_globals = allowed
        NAMED = None


def load_at_every_door(rank, folder):
    run = build((1, 1, 1, 1))
    good = _saved(run, Path(folder))
    with everything_that_is_unpickled() as names:
        for enter in _doors(run, good, good).values():
            enter()
        found = set(names)
        # The recorder sees what it should see.
        pickle.loads(pickle.dumps(shutil.copytree))
        assert "shutil.copytree" in names
    return found


def test_nothing_beyond_an_explicit_list_is_unpickled(tmp_path):
    (names,) = pool.run(1, load_at_every_door, str(tmp_path))
    metadata = {".".join(entry) for entry in ALLOWED} | {"torch.float32"}
    tensors = {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"}
    assert names <= metadata | tensors
    assert tensors <= names and "torch.distributed.checkpoint.metadata.Metadata" in names


# ---------------------------------------------------------------------------------------------------------------------
# folders of Hugging Face models


def _pickled_weights(folder: Path) -> None:
    torch.save(Attack(), folder / "pytorch_model.bin")


def _pickle_called_safetensors(folder: Path) -> None:
    torch.save(Attack(), folder / "model.safetensors")


def _pipe_called_safetensors(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def _device_called_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _index_that_leaves_the_folder(folder: Path) -> None:
    torch.save(Attack(), folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"llm.x": "../outside.safetensors"}}')


def _pipe_called_config(folder: Path) -> None:
    os.mkfifo(folder.parent / "config.json")


@pytest.mark.parametrize(
    "forge, message",
    [
        (_pickled_weights, "pickled weights only"),
        (_pickle_called_safetensors, "truncated or damaged"),
        (_pipe_called_safetensors, "not a plain file"),
        (_device_called_safetensors, "not a plain file"),
        (_index_that_leaves_the_folder, "names files outside of its folder"),
        (_pipe_called_config, "config.json"),
    ],
)
def test_a_forged_model_folder_is_refused_and_not_run(tmp_path, monkeypatch, forge, message):
    monkeypatch.setenv("ATTACK_MARK", str(tmp_path / "mark"))
    source = tmp_path / "source" / "llm"
    source.mkdir(parents=True)
    forge(source)
    for folder in (source.parent,) if forge is _pipe_called_config else (source, source.parent):
        with pytest.raises(ConversionError, match=message):
            import_checkpoint(folder, tmp_path / "out")
    with pytest.raises(ConversionError, match=message):
        verify(source.parent, source.parent)
    assert not (tmp_path / "mark").exists()
