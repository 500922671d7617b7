"""A medium is the same from a path, from its bytes and as a member of a tar file."""

import gc
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_vila.data import index_cache
from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaError, Member, open_media
from megatron_vila.data.video import decode_video_frames, probe_video
from tests.data.stamped import number_of, write

WANTED = [0, 7, 8, 31, 59]


def sources(folder, name):
    """The file ``name`` by its path, as bytes, and as the second member of a tar file."""
    (folder / "other").write_bytes(b"x" * 700)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        shard.add(folder / "other", "other")
        shard.add(folder / name, f"sample.{name}")
        shard.add(folder / "other", "another")
    with tarfile.open(folder / "shard.tar") as shard:
        found = shard.getmember(f"sample.{name}")
    member = Member(str(folder / "shard.tar"), found.offset_data, found.size, found.name)
    return [str(folder / name), (folder / name).read_bytes(), member]


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_is_the_same_from_a_path_from_bytes_and_from_a_shard(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    path, *others = (np.asarray(load_image(source)) for source in sources(tmp_path, name))
    assert path.shape == (40, 60, 3) and all(np.array_equal(path, other) for other in others)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_video_is_the_same_from_a_path_from_bytes_and_from_a_shard(tmp_path, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "SMALLEST_FILE", 0)
    write(tmp_path / name, 60, gop=12)
    for _ in range(2):  # the second time the table of the Matroska file is a kept one
        for source in sources(tmp_path, name):
            info = probe_video(source)
            assert info.source == source and info.num_frames == 60
            assert [number_of(picture) for picture in decode_video_frames(source, WANTED, info)] == WANTED


def test_damage_of_a_member_is_told_with_the_names_of_shard_and_member(tmp_path):
    write(tmp_path / "a.mp4", 10)
    path, content, member = sources(tmp_path, "a.mp4")
    cut = Member(member.path, member.offset, member.size // 2, member.name)
    for use in (probe_video, load_image):
        with pytest.raises(MediaError, match="shard.tar, sample.a.mp4: not a"):
            use(cut)
        with pytest.raises(MediaError, match=f"^{len(content) // 2} bytes in memory: not a"):
            use(content[: len(content) // 2])
        with pytest.raises(MediaError, match="sample.a.mp4: cut off: the file that holds it ends before"):
            use(Member(member.path, member.offset, 10**7, member.name))
        with pytest.raises(MediaError, match="the file is empty"):
            use(Member(member.path, member.offset, 0, member.name))
        with pytest.raises(MediaError, match="^0 bytes in memory: the file is empty"):
            use(b"")
        with pytest.raises(MediaError, match="gone.tar, x: no such file"):
            use(Member(str(tmp_path / "gone.tar"), 0, 1, "x"))


def test_a_member_gives_no_byte_of_its_neighbors_and_leaves_no_file_open(tmp_path):
    write(tmp_path / "a.mp4", 10)
    _, content, member = sources(tmp_path, "a.mp4")
    with open_media(member) as file:
        assert file.read() == content and file.read() == b""
        assert file.seek(-3, os.SEEK_END) == len(content) - 3 and file.read(100) == content[-3:]
    decode_video_frames(member, [0, 9])
    gc.collect()
    assert member.path not in [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
