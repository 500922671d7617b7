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
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex


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
    length = (folder / "__0_0.distcp").stat().st_size
    metadata, _ = first_tensor(folder)
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _plain_pickle_in_a_tensor_file(folder: Path) -> None:
    _attack_in_a_tensor_file(folder)
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Attack()))
    metadata, _ = first_tensor(folder)
    length = (folder / "__0_0.distcp").stat().st_size
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


def _other_tensor(folder: Path) -> None:
    """A tensor of another shape where a tensor should lie."""
    torch.save(torch.zeros(3), folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size
    metadata, _ = first_tensor(folder)
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 0, length)
    _store(folder, metadata)


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
    "parent folder": (_moved("../outside.distcp"), "'../outside.distcp', which is no file of this checkpoint"),
    "absolute path": (_moved("/etc/passwd"), "'/etc/passwd', which is no file of this checkpoint"),
    "device": (_moved("/dev/zero"), "'/dev/zero', which is no file of this checkpoint"),
    "unlisted file": (_moved("unlisted.distcp"), "'unlisted.distcp', which is no file of this checkpoint"),
    "beyond the end": (_moved("", 1 << 40), "lies at bytes"),
    "before the begin": (_moved("", -5), "lies at bytes"),
    "longer than the file": (_moved("", 0, 1 << 40), "lies at bytes"),
    "code in a tensor file": (_attack_in_a_tensor_file, "holds more than tensors and plain values"),
    "pickle in a tensor file": (_plain_pickle_in_a_tensor_file, "holds more than tensors and plain values"),
    "other tensor": (_other_tensor, "holds something else in the place of"),
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

UNREAD: dict[str, Callable[[Path], None]] = {
    "code in common.pt": lambda folder: torch.save({"extra": Attack()}, folder / "common.pt"),
    "pickle as common.pt": lambda folder: (folder / "common.pt").write_bytes(pickle.dumps(Attack())),
    "another backend": lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "more": 1}'),
    "no JSON": lambda folder: (folder / "metadata.json").write_text("{"),
}
"""Files for Megatron-Core alone: no door of ours reads them."""
