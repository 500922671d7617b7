"""Many tensors as one file: every byte comes back, and nothing that was not written does."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from megatron_vila.errors import DamagedError
from megatron_vila.generate import raw_tensors
from megatron_vila.generate.raw_tensors import file_bytes, read_tensors, write_tensors

SHAPES = [
    ((3, 5), torch.int64),
    ((0, 4), torch.float32),
    ((997, 7, 3), torch.bfloat16),
    ((4001, 13), torch.float8_e4m3fn),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(raw_tensors, "BLOCK", 1 << 13)


def _tensors() -> list[torch.Tensor]:
    """As ``SHAPES``, of all bytes that there are; together no whole number of blocks or pages."""
    torch.manual_seed(1)
    return [
        torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0] for shape, dtype in SHAPES
    ]


def _empty() -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in SHAPES]


def _bytes(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)


def test_all_bytes_of_all_dtypes_come_back_and_the_file_holds_them_in_their_order(tmp_path):
    tensors, back = [x.contiguous() for x in _tensors()], _empty()
    sums = write_tensors(tmp_path / "a", tensors)
    read_tensors(tmp_path / "a", back, sums)
    assert _bytes(back) == _bytes(tensors)
    stored = (tmp_path / "a").read_bytes()
    assert stored.rstrip(b"\0") == _bytes(tensors).rstrip(b"\0")
    assert len(stored) == file_bytes(tensors) and len(stored) % 4096 == 0
    assert len(sums) == -(-len(stored) // raw_tensors.BLOCK) > raw_tensors.THREADS


def test_tensors_of_inference_mode_are_written_and_filled_too(tmp_path):
    with torch.inference_mode():
        tensors, back = [x.contiguous() for x in _tensors()], _empty()
        read_tensors(tmp_path / "a", back, write_tensors(tmp_path / "a", tensors))
        assert _bytes(back) == _bytes(tensors)


def test_nothing_is_a_file_of_nothing(tmp_path):
    assert write_tensors(tmp_path / "a", []) == []
    assert (tmp_path / "a").stat().st_size == 0
    read_tensors(tmp_path / "a", [], [])


def test_a_file_system_that_does_not_go_past_the_page_cache_is_used_through_it(tmp_path, monkeypatch):
    """The real calls, which then refuse a descriptor that was opened with O_DIRECT, as some network file systems do."""
    direct = []

    def refusing(call):
        def refused(descriptor, buffers, offset):
            import fcntl

            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                direct.append(descriptor)
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(descriptor, buffers, offset)

        return refused

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwritev", refusing(os.pwritev))
    tensors, back = [x.contiguous() for x in _tensors()], _empty()
    read_tensors(tmp_path / "a", back, write_tensors(tmp_path / "a", tensors))
    assert _bytes(back) == _bytes(tensors)


def test_every_block_that_was_changed_is_refused(tmp_path):
    tensors = [x.contiguous() for x in _tensors()]
    sums = write_tensors(tmp_path / "a", tensors)
    whole = (tmp_path / "a").read_bytes()
    for place in (0, raw_tensors.BLOCK, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match="a is damaged: bytes .* are not what was written"):
            read_tensors(tmp_path / "a", _empty(), sums)


@pytest.mark.parametrize("change", ["cut", "longer", "gone", "link"])
def test_a_file_of_another_size_or_kind_is_refused(tmp_path, change):
    tensors, file = [x.contiguous() for x in _tensors()], tmp_path / "a"
    sums = write_tensors(file, tensors)
    if change in ("cut", "longer"):
        os.truncate(file, file.stat().st_size + (4096 if change == "longer" else -4096))
    else:
        file.rename(tmp_path / "b")
    if change == "link":
        file.symlink_to(tmp_path / "b")
    with pytest.raises(DamagedError, match="a has .* bytes instead of|a cannot be opened as a plain file"):
        read_tensors(file, _empty(), sums)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", _tensors()[:1])
    assert (tmp_path / "a").read_text() == "mine"
