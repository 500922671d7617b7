"""Samples of shards: what becomes of their parts, what is told of bad ones, and what happens to a changed shard."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.images import load_image
from megatron_vila.data.media import Member, open_media
from megatron_vila.data.sources import sample_table
from megatron_vila.data.sources.open import open_records
from megatron_vila.data.sources.shards import Shards
from megatron_vila.data.sources.source import BadRecordsError, ChangedFileError
from tests.data.material import conversation
from tests.data.shard_files import index_shards, sample, write_shards, write_tar

DATA = replace(DataConfig(), media_format="verbatim")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "megatron_vila" / "shards"


def picture(number):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(stream, "png")
    return stream.getvalue()


def asked(markers):
    return conversation(f"{markers}What?")


def numbered(first, count, **parts):
    return [(f"{n:05d}", {"json": sample(n), **parts}) for n in range(first, first + count)]


def one(folder, parts, **settings):
    """The only sample of a new folder."""
    write_shards(folder, [[("k", parts)]])
    return Shards.of_energon(replace(DATA, **settings), str(folder)).record(0)


def contents(record):
    opened = []
    for medium in record.media:
        with open_media(medium.path) as file:
            opened.append(file.read())
    return opened


def test_samples_come_in_the_order_of_the_shards_by_number(tmp_path):
    write_shards(tmp_path, [numbered(0, 3), numbered(3, 2)])
    shards = Shards.of_energon(DATA, str(tmp_path))
    assert [shards.record(n).sample_id for n in (4, 0, 3, 1, 2)] == ["s4", "s0", "s3", "s1", "s2"]
    assert len(shards) == 5 and shards.bad == {} and shards.name(3) == f"{tmp_path}/000001.tar, sample 00003"
    with pytest.raises(IndexError):
        shards.record(5)


def test_media_of_a_sample_are_members_of_the_shard_and_nothing_is_unpacked(tmp_path):
    content = sample(0, image=["0.png", "2.png"], video="1.mp4", conversations=asked("<image><video><image>"))
    record = one(tmp_path, {"json": content, "0.png": picture(1), "1.mp4": b"video", "2.png": picture(2)})
    assert [medium.is_video for medium in record.media] == [False, True, False]
    assert all(isinstance(medium.path, Member) for medium in record.media)
    assert contents(record) == [picture(1), b"video", picture(2)]
    assert np.asarray(load_image(record.media[2].path))[0, 0, 0] == 2
    assert sorted(os.listdir(tmp_path)) == [".nv-meta", "000000.tar"]


def test_a_video_of_pictures_keeps_the_order_that_the_record_gives(tmp_path):
    content = sample(0, video=[["2.png", "0.png", "1.png"]], fps=2, conversations=asked("<video>"))
    record = one(tmp_path, {"json": content, **{f"{n}.png": picture(n) for n in range(3)}})
    (video,) = record.media
    assert (video.is_video, video.fps, [member.name for member in video.pictures]) == (
        True,
        2.0,
        ["k.2.png", "k.0.png", "k.1.png"],
    )
    assert isinstance(video.path, str) and "sample k" in video.path


@pytest.mark.parametrize("name", ["jpg", "k.jpg", "images/k.jpg", "coco/train/0815.jpg", "/etc/passwd", "../../x.jpg"])
def test_a_record_may_name_its_only_picture_as_it_likes_and_gets_the_one_of_its_sample(tmp_path, name):
    record = one(tmp_path, {"json": sample(0, image=name), "jpg": b"picture"})
    assert contents(record) == [b"picture"]


def test_media_that_a_record_does_not_name_are_taken_in_natural_order(tmp_path):
    parts = {f"{n}.jpg": b"%d" % n for n in (10, 9, 1)}
    assert contents(one(tmp_path, {"json": sample(0), **parts})) == [b"1", b"9", b"10"]


def test_a_caption_is_a_document_behind_its_medium(tmp_path):
    for number, parts in enumerate(
        (
            {"jpg": b"p", "txt": "Ein Bär.".encode()},
            {"jpg": b"p", "json": {"caption": "Ein Bär.", "url": "http://x.y/z.jpg"}},
            {"jpg": b"p", "json": {"url": "x"}, "txt": "Ein Bär.".encode()},
            {"img": b"p", "txt": "Ein Bär.".encode()},
        )
    ):
        record = one(tmp_path / str(number), parts)
        assert [(turn.role, turn.text) for turn in record.turns] == [("document", "<image>Ein Bär.")]
        assert record.sample_id == "k" and contents(record) == [b"p"]


def test_parts_and_documents_name_members_of_their_sample(tmp_path):
    members = {"0.jpg": b"0", "1.jpg": b"1"}
    turn = {"role": "user", "content": [{"type": "image", "image": "1.jpg"}, {"type": "image", "image": "0.jpg"}]}
    answer = {"role": "assistant", "content": "A"}
    assert contents(one(tmp_path / "parts", {"json": {"messages": [turn, answer]}, **members})) == [b"1", b"0"]
    blocks = {"texts": ["A", None, None], "images": [None, "1.jpg", "0.jpg"]}
    assert contents(one(tmp_path / "blocks", {"json": blocks, **members})) == [b"1", b"0"]
    text = {"text": "<image>A<image>B", "image": ["0.jpg", "1.jpg"]}
    assert contents(one(tmp_path / "text", {"json": text, **members})) == [b"0", b"1"]


BAD = [
    ({"0.jpg": b"x"}, "no part json with its record and no txt with a caption, but 0.jpg"),
    ({"pkl": b"cos\nsystem\n(S'touch owned'\ntR."}, "pkl may hold a pickled object, which is never read"),
    ({"json": b""}, "not JSON"),
    ({"json": b"\xff{}"}, "not UTF-8"),
    ({"json": b"[1]"}, "a record must be a JSON object"),
    ({"json": b'{"id": 1, "id": 2}'}, "stands twice in one object"),
    ({"txt": b"\xff", "jpg": b"x"}, "part txt: not UTF-8 text"),
    (
        {"json": sample(0, video="a.mp4", image=["0.jpg", "9.jpg"]), "0.jpg": b"x", "1.jpg": b"x"},
        "is called '9.jpg'; it has json",
    ),
    ({"json": sample(0, video="clip.mp4"), "0.jpg": b"x"}, "field 'video': no part of the sample is called 'clip.mp4'"),
    ({"json": sample(0, image="0.jpg"), "0.jpg": b"x", "1.wav": b"x"}, "the part '1.wav' of the sample is not named"),
    ({"json": sample(0), "wav": b"x"}, "the part 'wav' of the sample is not named"),
]


@pytest.mark.parametrize(("parts", "words"), BAD)
def test_a_bad_sample_is_told_with_shard_and_key_and_hides_no_other(tmp_path, parts, words):
    write_shards(tmp_path, [[("good", {"json": sample(1)}), ("k", parts), ("last", {"json": sample(2)})]])
    shards = Shards.of_energon(DATA, str(tmp_path))
    with pytest.raises(RecordError) as error:
        shards.record(1)
    assert str(error.value).startswith(f"{tmp_path}/000000.tar, sample k") and words in str(error.value)
    assert [shards.record(n).sample_id for n in (0, 2)] == ["s1", "s2"]
    assert not os.path.exists("owned")


def test_an_unnamed_medium_can_be_ignored_by_its_part(tmp_path):
    parts = {"json": sample(0, image="0.jpg"), "0.jpg": b"x", "1.wav": b"x"}
    assert contents(one(tmp_path, parts, ignore_fields=["1.wav"])) == [b"x"]


def test_a_zero_length_medium_is_a_broken_sample_when_it_is_opened(tmp_path):
    record = one(tmp_path, {"json": sample(0, image="0.jpg"), "0.jpg": b""})
    with pytest.raises(Exception, match="000000.tar, k.0.jpg: the file is empty"):
        open_media(record.media[0].path)


def test_a_link_in_a_shard_is_no_medium_and_no_record(tmp_path):
    (tmp_path / "secret").write_text("x")
    for part, words in (("json", "the part json is a link"), ("jpg", "the part jpg is a link")):
        write_tar(
            tmp_path / part / "000000.tar",
            [("k", {"json": sample(0, image="jpg")} if part == "jpg" else {"txt": b"t"})],
        )
        with tarfile.open(tmp_path / part / "000000.tar", "a") as shard:
            member = tarfile.TarInfo(f"k.{part}")
            member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
            shard.addfile(member)
        index_shards(tmp_path / part, ["000000.tar"])
        with pytest.raises(RecordError, match=words):
            Shards.of_energon(DATA, str(tmp_path / part)).record(0)


def test_a_part_that_stands_twice_is_refused(tmp_path):
    write_tar(tmp_path / "000000.tar", [("k", {"json": sample(0)}), ("k", {"json": sample(1)})])
    index_shards(tmp_path, ["000000.tar"])
    with pytest.raises(RecordError, match="sample k: the part 'json' stands twice"):
        Shards.of_energon(DATA, str(tmp_path)).record(0)


def test_samples_beyond_the_end_of_a_cut_shard_are_bad_and_counted_at_the_start(tmp_path):
    write_shards(tmp_path, [numbered(0, 3), numbered(3, 2)])
    whole = (tmp_path / "000000.tar").read_bytes()
    (tmp_path / "000000.tar").write_bytes(whole[:2500])
    shards = Shards.of_energon(DATA, str(tmp_path))
    assert (
        sorted(shards.bad) == [2]
        and "000000.tar, sample 00002: cut off: the index puts it before byte" in shards.bad[2]
    )
    assert shards.record(1).sample_id == "s1"
    with pytest.raises(RecordError, match="cut off"):
        shards.record(2)
    with pytest.raises(BadRecordsError, match="1 of 5 records cannot be used"):
        Shards.of_energon(replace(DATA, bad_records="stop"), str(tmp_path))


def test_a_shard_that_is_no_regular_file_is_refused_at_the_start(tmp_path):
    for number, make in enumerate((os.mkdir, os.mkfifo)):
        folder = tmp_path / str(number)
        write_shards(folder, [numbered(0, 3)])
        (folder / "000000.tar").unlink()
        make(folder / "000000.tar")
        with pytest.raises(RecordError, match="000000.tar: not a regular file; put the shard back"):
            Shards.of_energon(DATA, str(folder))


def test_an_index_of_other_shards_is_told_at_each_sample(tmp_path):
    write_shards(tmp_path, [numbered(0, 3)])
    write_tar(tmp_path / "000000.tar", numbered(1, 3))
    with pytest.raises(
        RecordError, match="sample 00000: a member of sample '00001' stands at byte 0; .*make the index anew"
    ):
        Shards.of_energon(DATA, str(tmp_path)).record(0)
    (tmp_path / "000000.tar").write_bytes(b"no tar file " * 1000)
    with pytest.raises(RecordError, match="at byte 0 stands no header of a tar file"):
        Shards.of_energon(DATA, str(tmp_path)).record(0)


def test_a_shard_that_changes_or_vanishes_during_a_run_ends_it_by_name(tmp_path):
    write_shards(tmp_path, [numbered(0, 3)])
    shards = Shards.of_energon(DATA, str(tmp_path))
    os.utime(tmp_path / "000000.tar", ns=(1, 1))
    assert shards.record(0).sample_id == "s0"
    with open(tmp_path / "000000.tar", "ab") as shard:
        shard.write(b"more")
    with pytest.raises(ChangedFileError, match="at sample 00000: .*000000.tar: the shard has .* bytes and had"):
        shards.record(0)
    os.unlink(tmp_path / "000000.tar")
    with pytest.raises(ChangedFileError, match="at sample 00001: .*000000.tar: the shard is gone"):
        shards.record(1)
    (tmp_path / "000000.tar").symlink_to("000000.tar")
    with pytest.raises(ChangedFileError, match="at sample 00001: .*: the shard cannot be read: Too many levels.*; mend that"):
        shards.record(1)


def test_parts_of_a_split_are_read_for_training_and_for_evaluation(tmp_path):
    names = [f"{n:06d}.tar" for n in range(4)]
    split = {"train": ["{000000..000001}.tar"], "val": ["{000002,000003}.tar"], "test": []}
    write_shards(tmp_path, [numbered(n, 1) for n in range(4)], split)
    for part, expected in (("train", ["s0", "s1"]), ("val", ["s2", "s3"])):
        shards = open_records(DATA, [str(tmp_path)], part)
        assert [shards.record(n).sample_id for n in range(len(shards))] == expected
    with pytest.raises(RecordError, match="no shard is in the part 'test'; parts with shards are train, val"):
        open_records(DATA, [str(tmp_path)], "test")
    index_shards(tmp_path, names, {"all": names})
    assert len(open_records(DATA, [str(tmp_path)], "val")) == 4
    with pytest.raises(RecordError, match="no shard is in the part 'other'; parts with shards are all"):
        open_records(DATA, [str(tmp_path)], "other")
    content = (
        (tmp_path / ".nv-meta/split.yaml").read_text().replace("exclude: []", "exclude: [000000.tar, 000001.tar/00001]")
    )
    (tmp_path / ".nv-meta/split.yaml").write_text(content)
    shards = open_records(DATA, [str(tmp_path)])
    assert [shards.record(n).sample_id for n in range(len(shards))] == ["s2", "s3"]


def _sql(*statements):
    def change(meta):
        (meta / "index.sqlite").unlink()
        with sqlite3.connect(meta / "index.sqlite") as database:
            for statement in statements:
                database.execute(statement)
        database.close()

    return change


_SAMPLES = "CREATE TABLE samples (tar_file_id, sample_key, sample_index, byte_offset, byte_size)"
BAD_INDEX = [
    (
        lambda meta: (meta / "index.sqlite").write_bytes(b"rubbish" * 1000),
        "index.sqlite: not an index that can be read",
    ),
    (lambda meta: (meta / "index.sqlite").write_bytes(b""), "has no table of samples"),
    (
        lambda meta: (meta / "index.sqlite").unlink(),
        "index.sqlite: cannot be read: No such file or directory; put it back, or prepare the folder again",
    ),
    (_sql("CREATE TABLE other (x)"), "has no table of samples"),
    (
        _sql("CREATE VIEW samples AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT x FROM r"),
        "no table of",
    ),
    (_sql("CREATE TABLE samples (other)"), "not an index that can be read: no such column"),
    (_sql(_SAMPLES, "INSERT INTO samples VALUES (0, '00000', 0, 'text', 1)"), "values that are not those of an index"),
    (_sql(_SAMPLES, "INSERT INTO samples VALUES (0, NULL, 0, 0, 1)"), "values that are not those of an index"),
    (_sql(_SAMPLES, "INSERT INTO samples VALUES (0, '00000', 0, -512, 1)"), "places that are none in a tar file"),
    (
        _sql(_SAMPLES, "INSERT INTO samples VALUES (0, '00000', 0, 512, 9223372036854775807)"),
        "places that are none in a tar",
    ),
    (_sql(_SAMPLES, "INSERT INTO samples VALUES (0, zeroblob(100000000), 0, 0, 512)"), "too big"),
    (
        _sql(_SAMPLES, "INSERT INTO samples VALUES (0, '00000', 0, 0, 1024)"),
        "has 1 samples of 000000.tar, and .info.json says 2",
    ),
    (lambda meta: (meta / ".info.json").write_text("{"), ".info.json: not what `energon prepare` writes"),
    (lambda meta: (meta / ".info.json").write_text('{"shard_counts": {"../../x.tar": 1}}'), "not the name of a shard"),
    (lambda meta: (meta / ".info.json").write_text('{"shard_counts": ["a"]}'), "names no shards"),
    (
        lambda meta: (meta / "split.yaml").write_text("!!python/object/apply:os.system ['touch owned']"),
        "split.yaml: not what",
    ),
    (
        lambda meta: (meta / "split.yaml").write_text("split_parts: {train: ['{0..99999999}.tar']}"),
        "more than 1,000,000",
    ),
    (
        lambda meta: (meta / "split.yaml").write_text("split_parts: {train: [other.tar]}"),
        "'other.tar' is not among the shards",
    ),
    (
        lambda meta: (meta / "dataset.yaml").write_text("__class__: VQAWebdataset"),
        "prepared as 'VQAWebdataset'; only Crude",
    ),
    (lambda meta: (meta.parent / "000000.tar").unlink(), "000000.tar: cannot be read: No such file"),
]


@pytest.mark.parametrize("number", range(len(BAD_INDEX)))
def test_an_index_that_cannot_be_trusted_is_refused_by_name_and_cure(tmp_path, number):
    write_shards(tmp_path, [numbered(0, 2)])
    change, words = BAD_INDEX[number]
    change(tmp_path / ".nv-meta")
    with pytest.raises(RecordError) as error:
        Shards.of_energon(DATA, str(tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value)
    assert not os.path.exists("owned")


def test_the_table_is_made_once_and_mapped_and_made_anew_when_shards_change(tmp_path, cache, monkeypatch):
    write_shards(tmp_path, [numbered(0, 3), numbered(3, 2)])
    first = Shards.of_energon(DATA, str(tmp_path))
    made = []
    monkeypatch.setattr(sample_table.SampleTable, "of", lambda *args: made.append(args))
    second = Shards.of_energon(DATA, str(tmp_path))
    assert not made and isinstance(second._table.places, np.memmap) and not second._table.places.flags.writeable
    assert second.digest == first.digest and [second.record(n).sample_id for n in range(5)] == [
        f"s{n}" for n in range(5)
    ]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    (file,) = cache.glob("*.table")
    whole = file.read_bytes()
    for damage in (
        whole[:100],
        whole[:-8],
        b"",
        b"{}\n",
        json.dumps({"note": {}, "arrays": {}, "bytes": 0}).encode() + b"\n",
    ):
        file.write_bytes(damage)
        assert Shards.of_energon(DATA, str(tmp_path)).digest == first.digest and file.read_bytes() == whole
    write_shards(tmp_path, [numbered(0, 3), numbered(3, 3)])
    assert len(Shards.of_energon(DATA, str(tmp_path))) == 6 and len(list(cache.glob("*.table"))) == 1


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_index_by_energon_itself_is_read(tmp_path, format):
    pytest.importorskip("megatron.energon")
    names = [f"{'long' * 40}-{n}" for n in range(4)]
    for shard in range(2):
        keys = names[2 * shard : 2 * shard + 2]
        samples = [(key, {"json": sample(names.index(key), image="0.png"), "0.png": picture(7)}) for key in keys]
        write_tar(tmp_path / f"{shard:06d}.tar", samples, format)
    command = "import sys; from megatron.energon.cli.main import main; sys.argv = ['energon', *sys.argv[1:]]; main()"
    arguments = [
        "prepare",
        str(tmp_path),
        "--non-interactive",
        "--split-ratio",
        "1,0,0",
        "--sample-type",
        "CrudeWebdataset",
    ]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, capture_output=True, timeout=120)
    shards = Shards.of_energon(DATA, str(tmp_path))
    assert [shards.record(n).sample_id for n in range(4)] == [f"s{n}" for n in range(4)]
    assert contents(shards.record(3)) == [picture(7)] and shards.name(1).endswith(names[1])
