"""Members of a tar file are where tarfile says; hostile headers are told, and no name is a path."""

import io
import os
import tarfile

import pytest

from megatron_vila.data.sources.tar import TarError, members, split_name

NAMES = [
    "a.json",
    "a.0.mp4",
    "folder/b.json",
    "n" * 95 + ".json",
    "long/" * 50 + "c.json",
    "é" * 70 + ".json",
    "../../up.json",
]


def archive(names=NAMES, format=tarfile.PAX_FORMAT, content=b"x" * 700):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def found(content, start=0, end=None):
    return list(
        members(lambda offset, size: content[offset : offset + size], start, len(content) if end is None else end)
    )


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_stand_where_tarfile_finds_them_whatever_the_format(format):
    names = NAMES[:4] if format == tarfile.USTAR_FORMAT else NAMES
    content = archive(names, format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size, "") for m in tar.getmembers()]
    assert [tuple(member) for member in found(content)] == expected


def test_reading_begins_at_any_member_and_ends_before_the_next_sample():
    content = archive()
    whole = found(content)
    assert found(content, whole[2].start, whole[3].start) == [whole[2]]


def test_links_folders_devices_and_files_with_holes_are_no_regular_files(tmp_path):
    os.symlink("/etc/passwd", tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{}")
    os.link(tmp_path / "b.json", tmp_path / "b.mp4")
    os.mkfifo(tmp_path / "c.mp4")
    os.mkdir(tmp_path / "d.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.json", "b.json", "b.mp4", "c.mp4", "d.png"):
            tar.add(tmp_path / name, name)
    kinds = [(member.name, member.kind) for member in found((tmp_path / "x.tar").read_bytes())]
    assert kinds == [
        ("a.json", "a link"),
        ("b.json", ""),
        ("b.mp4", "a link"),
        ("c.mp4", "a pipe"),
        ("d.png", "a folder"),
    ]


def _pax(field, length=0):
    """A pax header with ``field`` before a member of three bytes; the record may lie about its length."""
    length = length or next(n for n in range(99) if n == len(f"{n} ") + len(field) + 1)
    record = b"%d %s\n" % (length, field)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    member = tarfile.TarInfo("a.json")
    member.size = 3
    return (
        header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + member.tobuf(tarfile.USTAR_FORMAT) + bytes(512)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive(NAMES[:2])[:1000], "more than there are"),
        (archive(NAMES[:2])[:1600], "cut off: the file ends at byte 1,600, within a header"),
        (archive(NAMES[:1])[:300], "cut off: the file ends at byte 300, within a header"),
        (b"rubbish!" * 100, "at byte 0 stands no header of a tar file"),
        (_pax(b"size=-512"), "by its header, more than there are"),
        (_pax(b"size=9999999999999999"), "by its header, more than there are"),
        (_pax(b"size=99999999999999999999999999"), "by its header, more than there are"),
        (_pax(b"path=b.json", 9999), "the pax header before byte 1,024 is damaged"),
        (_pax(b"path=b.json", 1), "the pax header before byte 1,024 is damaged"),
        (_pax(b"no value"), "the pax header before byte 1,024 is damaged"),
        (_pax(b"path=b.json")[:1024], "cut off: the file ends at byte 1,024"),
        (_pax(b"path=b.json")[:1024] + bytes(1024), "the header of a member is missing that an earlier one announces"),
    ],
)
def test_damaged_and_hostile_headers_are_told_with_their_place(content, words):
    with pytest.raises(TarError, match=words):
        found(content)


def test_headers_that_go_on_beyond_a_sample_are_told():
    with pytest.raises(TarError, match="the headers that begin at byte 0 have no end"):
        found(_pax(b"path=b.json"), 0, 1024)


def test_a_header_that_asks_for_more_memory_than_a_name_needs_is_refused():
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**40
    with pytest.raises(TarError, match="a header of 1,099,511,627,776 bytes"):
        found(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_names_that_are_not_text_are_written_with_backslashes():
    content = archive(["aXbY.json"], tarfile.USTAR_FORMAT)
    header = bytearray(content[:512].replace(b"X", b"\xff").replace(b"Y", b"\n"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert [member.name for member in found(bytes(header) + content[512:])] == [r"a\xffb\n.json"]


def test_key_and_part_are_those_of_webdataset():
    assert split_name("a/b.c/key.0.mp4") == ("a/b.c/key", "0.mp4")
    assert split_name("./key.json") == ("./key", "json")
    assert [split_name(name) for name in ("__meta__/x.json", "no ending", ".hidden", "a/")] == [None] * 4
