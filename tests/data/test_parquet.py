"""Parquet files with the columns of public sets."""

import os
import sys

import pytest

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.open import open_sets
from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.placement import Turn
from tests.data.material import conversation

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DATA = DataConfig(media_format="verbatim", media_dir="/m")


def write(path, rows, schema=None, group=2):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=group)
    return str(path)


def test_rows_of_longvila_sft_and_llava_video_are_conversations_about_videos(tmp_path):
    rows = [{"id": f"v{n}", "video": f"{n}.mp4", "conversations": conversation("<video>\nQ", str(n))} for n in range(5)]
    first = write(tmp_path / "data/train-0.parquet", rows)
    write(tmp_path / "data/train-1.parquet", [row | {"data_source": "0_30_s_academic_v0_1"} for row in rows[:3]])
    source = open_sets(DATA, [str(tmp_path / "data")])
    assert len(source) == 8
    for index in (4, 0, 7, 2, 5):  # whatever the order, and over the borders of row groups
        number = index if index < 5 else index - 5
        record = source.record(index)
        assert (record.sample_id, record.media) == (f"v{number}", (Media(f"/m/{number}.mp4", True),))
        assert record.turns == (Turn("user", "<video>\nQ"), Turn("assistant", str(number)))
    assert source.name(4) == f"{first}, row 5" and source.name(5).endswith("train-1.parquet, row 1")
    assert len(open_sets(DATA, [first])) == 5


def test_pictures_in_columns_are_bytes(tmp_path):
    rows = [
        {"id": "a", "image": {"bytes": b"PNG", "path": "a.png"}, "conversations": conversation("<image>\nQ")},
        {"id": "b", "image": None, "conversations": conversation("Q")},
    ]
    source = open_sets(DATA, [write(tmp_path / "one/a.parquet", rows)])
    assert [source.record(n).media for n in (0, 1)] == [(Media(b"PNG", False),), ()]
    rounds = [{"user": "Q1", "assistant": "A1", "source": "vqa"}, {"user": "Q2", "assistant": "A2", "source": "vqa"}]
    rows = [{"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}], "texts": rounds}]
    record = open_sets(DATA, [write(tmp_path / "cauldron/a.parquet", rows)]).record(0)
    assert [turn.text for turn in record.turns] == ["<image><image>Q1", "A1", "Q2", "A2"]
    assert record.media == (Media(b"1", False), Media(b"2", False))


def test_columns_of_obelics_and_of_plain_text_are_documents(tmp_path):
    rows = [{"images": ["a.png", None], "texts": [None, "A cat."], "metadata": "[]", "general_metadata": "{}"}]
    record = open_sets(DATA, [write(tmp_path / "obelics/a.parquet", rows)]).record(0)
    assert record.turns == (Turn("document", "<image>A cat."),) and record.media == (Media("/m/a.png", False),)
    source = open_sets(DATA, [write(tmp_path / "text/a.parquet", [{"text": "A"}, {"text": ""}, {"text": None}])])
    assert source.record(0).turns == (Turn("document", "A"),) and source.record(0).sample_id == "a.parquet#1"
    for index, said in ((1, "row 2, field 'text': is empty"), (2, "row 3, field 'text': must be one text")):
        with pytest.raises(RecordError, match=said):
            source.record(index)


def test_parts_of_messages_have_empty_columns_for_what_they_are_not(tmp_path):
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "Q", "index": None}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[1] | {"text": "A"}]}]
    rows = [{"messages": said, "images": [{"bytes": b"1", "path": None}]}]
    record = open_sets(DATA, [write(tmp_path / "a/a.parquet", rows)]).record(0)
    assert record.turns == (Turn("user", "<image>Q"), Turn("assistant", "A")) and record.media == (Media(b"1", False),)


def test_a_column_of_bytes_that_is_not_known_is_not_overlooked(tmp_path):
    rows = [{"recording": b"RIFF", "conversations": conversation()}]
    path = write(tmp_path / "a/a.parquet", rows)
    with pytest.raises(RecordError, match="row 1, field 'recording': holds the media file"):
        open_sets(DATA, [path]).record(0)
    assert open_sets(DataConfig(ignore_fields=["recording"]), [path]).record(0).media == ()


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a/a.parquet", [{"text": "A"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RecordError, match=r"needs pyarrow: pip install 'megatron-vila\[prepare\]'"):
        open_sets(DATA, [path])


def test_text_that_is_not_utf_8_makes_its_row_bad(tmp_path):
    raw = pyarrow.array([b"A", b"\xff"], pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(2, *raw.buffers()[1:])
    (tmp_path / "a").mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a/a.parquet")
    source = open_sets(DATA, [str(tmp_path / "a")])
    assert source.record(0).turns == (Turn("document", "A"),)
    with pytest.raises(RecordError, match="row 2: not UTF-8 text"):
        source.record(1)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RecordError, match="a.parquet: not a parquet file that can be read"):
        open_sets(DATA, [str(tmp_path / "a.parquet")])
    with pytest.raises(RecordError, match="the table has no rows"):
        empty = pyarrow.schema([("text", pyarrow.string())])
        open_sets(DATA, [write(tmp_path / "b/a.parquet", [], empty)])
    path = write(tmp_path / "c/a.parquet", [{"text": os.urandom(5000).hex()} for _ in range(4)])
    with open(path, "r+b") as stream:
        stream.write(b"\xff" * 3000)
    source = open_sets(DATA, [path])
    with pytest.raises(RecordError, match="row 1: cannot be read"):
        source.record(0)
