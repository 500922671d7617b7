"""Checkpoints with something wrong in them: damaged as disks do it, or forged by somebody who knows the format."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex


def flip_a_byte(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def seal(folder: Path) -> None:
    """Make sizes and checksums in info.json those of the files that are there, as a forger would. Files of less than a block."""
    path = folder / "info.json"
    info = json.loads(path.read_text())
    for name in info["files"]:
        if (folder / name).is_file() and not (folder / name).is_symlink():
            data = (folder / name).read_bytes()
            info["files"][name] = len(data)
            info["sums"]["files"][name] = [xxhash.xxh3_64_hexdigest(data)]
    seal_info(folder, info)


def seal_info(folder: Path, info: dict[str, Any]) -> None:
    info.pop("sum", None)
    if "sums" in info:
        info["sum"] = xxhash.xxh3_64_hexdigest(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())
    (folder / "info.json").write_text(json.dumps(info))


def without_sums(folder: Path) -> None:
    """What a version before checksums would have written."""
    info = json.loads((folder / "info.json").read_text())
    del info["sums"]
    seal_info(folder, info)


class Attack:
    """Unpickling it makes the folder that ATTACK_MARK names."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["ATTACK_MARK"],))


def first_tensor(folder: Path) -> tuple[Metadata, MetadataIndex]:
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    return metadata, min(metadata.storage_data, key=lambda index: index.fqn)


def _store(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _moved(file: str, begin: int = 0, length: int | None = None) -> Callable[[Path], None]:
    """The first tensor is said to lie elsewhere."""

    def forge(folder: Path) -> None:
        metadata, index = first_tensor(folder)
        place = metadata.storage_data[index]
        metadata.storage_data[index] = _StorageInfo(file or place.relative_path, begin, length or place.length)
        _store(folder, metadata)

    return forge


def _bytes_entry(folder: Path) -> None:
    """The published attack: a bytes entry with the size of a tensor, whose bytes torch unpickles without restriction."""
    metadata, index = first_tensor(folder)
    entry = BytesStorageMetadata()
    entry.size = metadata.state_dict_metadata[index.fqn].size
    metadata.state_dict_metadata[index.fqn] = entry
    torch.save(Attack(), folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(index.fqn)] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _attack_in_a_tensor_file(folder: Path) -> None:
    """Every tensor is said to lie where an object with code lies."""
    torch.save(Attack(), folder / "__0_0.distcp")
    _lengthen(folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size
    metadata, _ = first_tensor(folder)
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _plain_pickle_in_a_tensor_file(folder: Path) -> None:
    _attack_in_a_tensor_file(folder)
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Attack()))
    _lengthen(folder / "__0_0.distcp")
    metadata, _ = first_tensor(folder)
    length = (folder / "__0_0.distcp").stat().st_size
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _other_tensor(folder: Path) -> None:
    """A tensor of another shape where a tensor should lie."""
    torch.save(torch.zeros(1 << 13), folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size
    metadata, _ = first_tensor(folder)
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _in_place_of_the_first(make: Callable[[torch.Size], torch.Tensor]) -> Callable[[Path], None]:
    """Another tensor of the shape of the first one."""

    def forge(folder: Path) -> None:
        metadata, index = first_tensor(folder)
        shape = metadata.state_dict_metadata[index.fqn].chunks[0].sizes
        metadata.storage_data[index] = _appended(folder, make(shape))
        _store(folder, metadata)

    return forge


def _table(metadata: Metadata) -> tuple[str, Any]:
    return next((key, entry) for key, entry in metadata.state_dict_metadata.items() if key.endswith("word_embeddings.weight"))


def _halves_at(*rows: int) -> Callable[[Path], None]:
    """A table in two pieces of half its rows, in number right, that begin at ``rows`` and leave a hole."""

    def forge(folder: Path) -> None:
        metadata, _ = first_tensor(folder)
        key, entry = _table(metadata)
        half = torch.Size((entry.size[0] // 2, entry.size[1]))
        entry.chunks = [ChunkStorageMetadata(torch.Size((row, 0)), half) for row in rows]
        place = _appended(folder, torch.ones(half))
        metadata.storage_data |= {MetadataIndex(key, torch.Size((row, 0))): place for row in rows}
        _store(folder, metadata)

    return forge


def _huge_table(folder: Path) -> None:
    metadata, _ = first_tensor(folder)
    entry = _table(metadata)[1]
    entry.size = torch.Size((2**50, entry.size[1]))
    _store(folder, metadata)


def _huge_piece(folder: Path) -> None:
    metadata, _ = first_tensor(folder)
    entry = _table(metadata)[1]
    entry.size = entry.chunks[0].sizes = torch.Size((2**50, entry.size[1]))
    _store(folder, metadata)


def _table_of_three_axes(folder: Path) -> None:
    metadata, _ = first_tensor(folder)
    key, entry = _table(metadata)
    entry.size = torch.Size((*entry.size, 1))
    entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0, 0)), entry.size)]
    metadata.storage_data[MetadataIndex(key, torch.Size((0, 0, 0)))] = _appended(folder, torch.ones(entry.size))
    _store(folder, metadata)


def _lengthen(path: Path) -> None:
    """As if there were room for any tensor."""
    with open(path, "ab") as file:
        file.write(bytes(1 << 15))


def _appended(folder: Path, tensor: torch.Tensor) -> _StorageInfo:
    path = folder / "__0_0.distcp"
    begin = path.stat().st_size
    with open(path, "ab") as file:
        torch.save(tensor, file)
    _lengthen(path)
    return _StorageInfo(path.name, begin, path.stat().st_size - begin)


def _negative_step(folder: Path) -> None:
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save(state | {"adam_step": -1}, folder / "state.pt")


def _torch_script(folder: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(folder / "state.pt"))


def _replaced(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return forge


def _listed(name: str) -> Callable[[Path], None]:
    """info.json names one more file."""

    def forge(folder: Path) -> None:
        info = json.loads((folder / "info.json").read_text())
        info["files"][name] = 1
        info["sums"]["files"][name] = ["0"]
        (folder / "info.json").write_text(json.dumps(info))

    return forge


_NO_FILE = "links, folders or devices in the place of plain files"
FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "metadata with code": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Attack())), "posix.mkdir"),
    "bytes entry": (_bytes_entry, "BytesStorageMetadata, which no checkpoint of ours holds"),
    "metadata of something else": (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "is not the metadata"),
    "metadata cut": (lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"), ".metadata is damaged"),
    "parent folder": (_moved("../outside.distcp"), "'../outside.distcp', which is not a file of this checkpoint"),
    "absolute path": (_moved("/etc/passwd"), "'/etc/passwd', which is not a file of this checkpoint"),
    "device": (_moved("/dev/zero"), "'/dev/zero', which is not a file of this checkpoint"),
    "unlisted file": (_moved("unlisted.distcp"), "'unlisted.distcp', which is not a file of this checkpoint"),
    "beyond the end": (_moved("", 1 << 40), "lies at bytes"),
    "before the begin": (_moved("", -5), "lies at bytes"),
    "longer than the file": (_moved("", 0, 1 << 40), "lies at bytes"),
    "code in a tensor file": (_attack_in_a_tensor_file, "holds more than tensors and plain values"),
    "pickle in a tensor file": (_plain_pickle_in_a_tensor_file, "holds more than tensors and plain values"),
    "other tensor": (_other_tensor, "holds something else in the place of"),
    "other element type in a tensor file": (
        _in_place_of_the_first(lambda shape: torch.ones(shape, dtype=torch.int8)),
        "holds something else in the place of",
    ),
    "tensor without data": (
        _in_place_of_the_first(lambda shape: torch.ones(shape, device="meta")),
        "holds something else in the place of",
    ),
    "piece named twice": (_halves_at(0, 0), "of the 2048 elements that are wanted"),
    "pieces that overlap": (_halves_at(0, 32), "of the 2048 elements that are wanted"),
    "table of three axes": (_table_of_three_axes, "word_embeddings.weight"),
    "more rows than pieces": (_huge_table, "'llm.embedding.word_embeddings.weight' hold 2048 of its"),
    "piece longer than its bytes": (_huge_piece, "are too few for a piece of 'llm.embedding.word_embeddings.weight'"),
    "negative step in state.pt": (_negative_step, "state.pt is damaged: adam_step is -1"),
    "code in state.pt": (lambda folder: torch.save({"extra": Attack()}, folder / "state.pt"), "state.pt holds more than tensors"),
    "pickle as state.pt": (
        lambda folder: (folder / "state.pt").write_bytes(pickle.dumps(Attack())),
        "state.pt holds more than tensors",
    ),
    "script as state.pt": (_torch_script, "state.pt holds more than tensors"),
    "list as state.pt": (lambda folder: torch.save([1], folder / "state.pt"), "state.pt holds no adam_step"),
    "pipe as state.pt": (_replaced("state.pt", os.mkfifo), f"{_NO_FILE}: state.pt"),
    "link as state.pt": (_replaced("state.pt", lambda path: path.symlink_to("/dev/zero")), f"{_NO_FILE}: state.pt"),
    "link as tensors": (
        _replaced("__0_0.distcp", lambda path: path.symlink_to(path.with_name("state.pt"))),
        f"{_NO_FILE}: __0_0.distcp",
    ),
    "parent folder listed": (_listed("../outside"), "names files that no checkpoint has: '../outside'"),
    "device listed": (_listed("/dev/zero"), "names files that no checkpoint has: '/dev/zero'"),
}
"""What a forger can write, and a part of the message that refuses it. Doors that do not read a file need not refuse it."""

_NO_SUMS = "info.json is damaged: its checksums name no files"
_FEW_SUMS = "info.json is damaged: files without a checksum for each of their blocks: state.pt"
FORGED_INFO: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "checksums a text": (lambda info: info.update(sums="x"), _NO_SUMS),
    "checksums nothing": (lambda info: info.update(sums=None), _NO_SUMS),
    "checksums without files": (lambda info: info["sums"].pop("files"), _NO_SUMS),
    "checksums of another kind": (lambda info: info["sums"].update(algorithm="md5"), "that this version does not know"),
    "checksum a number": (lambda info: info["sums"]["files"].update({"state.pt": 5}), _FEW_SUMS),
    "checksum missing": (lambda info: info["sums"]["files"].pop("state.pt"), _FEW_SUMS),
    "size of an exabyte": (lambda info: info["files"].update({"state.pt": 2**60}), _FEW_SUMS),
    "name that no file has": (lambda info: info["files"].update({"\ud800": 1}), "names files that no checkpoint has"),
    "negative step": (lambda info: info.update(step=-1), "it holds no step"),
    "configuration a list": (lambda info: info.update(config=[1]), "config is not a group of settings"),
    "configuration of a billion layers": (
        lambda info: info["config"]["model"]["llm"].update(num_layers=10**9),
        "model.llm.num_layers=1000000000 must be a mistake",
    ),
    "unknown projector": (
        lambda info: info["config"]["model"]["projector"].update(type="x"),
        "model.projector.type=x is not known",
    ),
    "files of Hugging Face a list": (lambda info: info.update(hugging_face=[1]), "holds no JSON objects"),
    "file of Hugging Face a text": (lambda info: info.update(hugging_face={"llm": "x"}), "holds no JSON objects"),
}
"""What info.json can say, with the right checksum of itself, and a part of the message that refuses it."""

UNREAD: dict[str, Callable[[Path], None]] = {
    "code in common.pt": lambda folder: torch.save({"extra": Attack()}, folder / "common.pt"),
    "pickle as common.pt": lambda folder: (folder / "common.pt").write_bytes(pickle.dumps(Attack())),
    "another backend": lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "more": 1}'),
    "no JSON": lambda folder: (folder / "metadata.json").write_text("{"),
}
"""Files for Megatron-Core alone: no door of ours reads them."""
