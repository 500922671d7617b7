"""Sets of samples that are kept in other ways than in files of records: told apart, read by number, or refused with a cure."""

import csv
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.open import open_sets
from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.formats.detect import FORMATS, detect, files_under
from megatron_vila.data.media import Member, open_media
from megatron_vila.data.placement import Turn
from megatron_vila.data.sources.open import open_records
from tests.data.material import conversation, write_jsonl

VERBATIM = DataConfig(media_format="verbatim")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def fill(folder, **files):
    """``folder`` with empty media and with texts; ``__`` in a name is a slash, ``_`` before the ending a dot."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, BytesIO(content))
    return str(path)


def document(source, index):
    (turn,) = source.record(index).turns
    assert turn.role == "document"
    return turn.text


def reason(source, index):
    with pytest.raises(RecordError) as error:
        source.record(index)
    return str(error.value)


def test_what_stands_under_a_path_is_told_by_what_is_there(tmp_path):
    places = {
        "json": fill(tmp_path / "1", a_json="[]") + "/a.json",
        "jsonl": fill(tmp_path / "2", a_jsonl="{}") + "/a.jsonl",
        "energon": fill(tmp_path / "3", a_tar=b"") and str(tmp_path / "3"),
        "wids": fill(tmp_path / "4", a_tar=b""),
        "tar": fill(tmp_path / "5", sub__a_tar=b""),
        "parquet": fill(tmp_path / "6", data__train_parquet=b"", README_md=""),
        "folder": fill(tmp_path / "7", sub__a_mp4=b"", sub__a_txt="A."),
        "text_files": fill(tmp_path / "8", a_txt="A.", sub__b_txt="B."),
    }
    (tmp_path / "3/.nv-meta").mkdir()
    (tmp_path / "4/wids-meta.json").write_text("{}")
    assert {name: detect(path) for name, path in places.items()} == {name: name for name in places}
    assert set(places) | {"text_lines"} == set(FORMATS)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a_mp4": b"", "b_tar": b""}, "holds files of several formats; name the files, or say with --format"),
        ({"a_json": "[]"}, "holds files of records; name each of them"),
        ({"a_tar": b"", "sub__b_tar_gz": b""}, "a/sub/b.tar.gz: packed files are not read; unpack it"),
        ({"a_mp4": b"", "a_txt": "", "more_ZIP": b""}, "a/more.ZIP: packed files are not read; unpack it"),
        ({"a_doc": ""}, "holds no samples in a format that is known:\n  json: a JSON file"),
    ],
)
def test_a_folder_that_may_be_several_things_is_refused(tmp_path, files, said):
    with pytest.raises(RecordError) as error:
        detect(fill(tmp_path / "a", **files))
    assert said in str(error.value)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    for name in "ab":
        pack(Path(fill(tmp_path / name, note_md="")) / f"{name}.TAR", {f"{name}.txt": b"x"})
        for other in ("a", "b", "."):
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert list(files_under(str(tmp_path / "a"))) == ["a.TAR", "note.md", "to_b/b.TAR", "to_b/note.md"]
    assert len(open_records(VERBATIM, [str(tmp_path / "a")])) == 2


def test_training_refuses_what_it_does_not_read_in_place_with_the_line_that_converts_it(tmp_path):
    videos = fill(tmp_path / "my videos", a_mp4=b"", a_txt="A man runs.")
    line = f"python tools/prepare_data.py '{videos}' --out FOLDER --media-dir /m --ignore-fields audio"
    with pytest.raises(RecordError) as error:
        open_records(DataConfig(media_dir="/m", ignore_fields=["audio"]), [videos])
    assert f"`{line}`" in str(error.value) and "data.train=[FOLDER]" in str(error.value)
    text = fill(tmp_path / "b", a_txt="A.") + "/a.txt"
    with pytest.raises(RecordError) as error:
        open_records(DataConfig(), [text])
    for name in ("text_files", "text_lines"):
        assert f"`python tools/prepare_data.py {text} --out FOLDER --format {name}`" in str(error.value)
    with pytest.raises(RecordError, match="--format csv is unknown; use one of json, "):
        open_sets(VERBATIM, [text], "csv")


def test_a_format_that_is_not_that_of_the_set_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": conversation()}])
    for name in ("wids", "json", "energon", "tar"):
        with pytest.raises(RecordError, match=f"a.jsonl: has the format jsonl, not --format {name}; leave --format out"):
            open_sets(VERBATIM, [path], name)
    assert len(open_sets(VERBATIM, [path], "jsonl")) == 1


def test_the_format_chooses_among_those_of_a_folder(tmp_path):
    folder = fill(tmp_path / "a", a_mp4=b"", a_txt="A.")
    pack(tmp_path / "a/b.tar", {"1.txt": b"One.", "2.txt": b"Two."})
    tar = open_sets(VERBATIM, [folder], "tar")
    assert [document(tar, index) for index in range(len(tar))] == ["One.", "Two."]
    assert open_sets(VERBATIM, [folder], "folder").name(0) == f"{folder}/a.mp4"


def test_sets_of_all_kinds_are_read_one_after_the_other(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"conversations": conversation()}, {"id": 1}])
    texts = fill(tmp_path / "b", a_txt="One.\n", c__b_txt="Two.")
    source = open_sets(VERBATIM, [lines, texts])
    assert len(source) == 4 and list(source.bad) == [1]
    assert [document(source, index) for index in (2, 3)] == ["One.\n", "Two."]
    assert source.name(3) == f"{texts}/c/b.txt"


def test_lines_of_a_text_file_are_documents(tmp_path):
    path = fill(tmp_path / "b", a_txt="Ein Bär.\r\n\n  Zwei \nIt is \xff\n".encode("latin1")) + "/a.txt"
    source = open_sets(VERBATIM, [path], "text_lines")
    assert len(source) == 3 and document(source, 1) == "  Zwei "
    assert source.record(1).sample_id == "a.txt, line 3"
    assert f"{path}, line 1: not UTF-8 text" in reason(source, 0) and "iconv" in reason(source, 0)
    fill(tmp_path / "c", a_txt="\n \n")
    with pytest.raises(RecordError, match="holds no text"):
        open_sets(VERBATIM, [str(tmp_path / "c/a.txt")], "text_lines")


def test_media_in_a_folder_have_captions_of_the_same_name(tmp_path):
    talk = json.dumps({"id": "seven", "fps": 2, "conversations": conversation("<video>What?", "A.")})
    folder = fill(
        tmp_path / "a",
        **{"a_mp4": b"", "a_txt": "A man runs.", "b__c_png": b"", "b__c_txt": "Ein Bär."},
        **{"d__1_jpg": b"", "d__2_jpg": b"", "d_json": talk},
    )
    source = open_sets(VERBATIM, [folder])
    assert [source.record(n).media for n in range(3)] == [
        (Media(f"{folder}/a.mp4", True),),
        (Media(f"{folder}/b/c.png", False),),
        (Media(f"{folder}/d", True, fps=2.0),),
    ]
    assert [document(source, n) for n in (0, 1)] == ["<video>A man runs.", "<image>Ein Bär."]
    assert source.record(2).turns == (Turn("user", "<video>What?"), Turn("assistant", "A."))
    assert [source.record(n).sample_id for n in range(3)] == ["a", "b/c", "seven"]
    assert source.digest == open_sets(VERBATIM, [folder]).digest
    fill(tmp_path / "a", a_txt="A woman runs.")
    assert source.digest != open_sets(VERBATIM, [folder]).digest


def test_a_medium_without_its_own_caption_is_named(tmp_path):
    folder = fill(
        tmp_path / "a",
        **{"a_mp4": b"", "b_mp4": b"", "b_json": "[1]", "c_mp4": b"", "c_jpg": b"", "c_txt": "C"},
        **{"d_mp4": b"", "d_txt": b"\xff", "e_mp4": b"", "e_txt": " \n", "f_mp4": b"", "f_json": '{"video": "x.mp4"}'},
    )
    source = open_sets(VERBATIM, [folder])
    names = [source.name(index).rpartition("/")[2] for index in range(len(source))]
    assert names == ["a.mp4", "b.mp4", "c.jpg", "c.mp4", "d.mp4", "e.mp4", "f.mp4"]
    said = [reason(source, index) for index in range(len(source))]
    assert "a.mp4: no caption: write it into a.txt, or its record into a.json" in said[0]
    assert "b.mp4: a record must be a JSON object, found list" in said[1]
    assert "c.jpg and c.mp4 share one caption" in said[2] and "share one caption" in said[3]
    assert "d.txt: not UTF-8 text" in said[4] and "field 'text': is empty" in said[5]
    assert "f.mp4: names media itself" in said[6]
    with pytest.raises(RecordError, match=r"no medium has a caption: put a text beside each \(a.txt for a.mp4\)"):
        open_sets(VERBATIM, [fill(tmp_path / "b", a_mp4=b"", z_txt="Z")])


def test_captions_whose_media_are_missing_are_told_and_media_of_any_name_are_not_overlooked(tmp_path, caplog):
    talk = {"a_mp4": b"", "a_txt": "A.", "b_txt": "B.", "c_json": "{}", "d_rmvb": b"", "d_txt": "D."}
    source = open_sets(VERBATIM, [fill(tmp_path / "a", **talk)])
    assert [source.name(index).rpartition("/")[2] for index in range(len(source))] == ["a.mp4", "d.rmvb"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/a: b.txt has no medium of its name beside it and is not used; 1 more are like it"
    ]


def test_notes_of_a_downloader_beside_a_caption_are_not_its_record(tmp_path):
    notes = json.dumps({"caption": "shortened", "url": "http://x.y/z.jpg", "key": "000", "status": "success"})
    folder = fill(tmp_path / "a", **{"000_jpg": b"", "000_txt": "Ein Bär.", "000_json": notes})
    assert document(open_sets(VERBATIM, [folder]), 0) == "<image>Ein Bär."
    shards = fill(tmp_path / "b", **{"00000_parquet": b"", "stats_json": "{}"})
    pack(tmp_path / "b/00000.tar", {"000.jpg": b"1", "000.txt": b"A.", "000.json": notes.encode()})
    assert detect(shards) == "tar" and document(open_records(DataConfig(), [shards]), 0) == "<image>A."


def test_a_table_in_a_folder_names_media_and_gives_their_records(tmp_path):
    folder = fill(tmp_path / "a", sub__a_mp4=b"", b_png=b"", note_txt="x")
    with open(f"{folder}/metadata.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [["file_name", "text"], ["sub/a.mp4", 'Two\nlines, "quoted".'], ["b.png", "Ein Bär."], ["", "x"]]
        )
    source = open_sets(VERBATIM, [folder])
    assert [document(source, n) for n in (0, 1)] == ['<video>Two\nlines, "quoted".', "<image>Ein Bär."]
    assert source.record(0).media == (Media(f"{folder}/sub/a.mp4", True),)
    assert f"{folder}/metadata.csv, line 5, field 'file_name': must be the path" in reason(source, 2)
    lines = [{"file_name": "a.mp4", "messages": [{"role": "user", "content": "<video>Q"}]}, {"text": "x"}, 3]
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b/metadata.jsonl", lines)
    source = open_sets(VERBATIM, [str(tmp_path / "b")])
    assert source.record(0).turns == (Turn("user", "<video>Q"),)
    assert "line 2: the column file_name is missing" in reason(source, 1)
    assert "line 3: a record must be a JSON object" in reason(source, 2)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"file_name,text\n", "the table has no rows"),
        (b"file_name,text\na.mp4\n", "line 2: has another number of columns"),
        (b"file_name,text\na.mp4,\xff\n", "not UTF-8 text"),
        (b'file_name,text\na.mp4,"x\n', "not CSV"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, table, said):
    (tmp_path / "metadata.csv").write_bytes(table)
    with pytest.raises(RecordError, match=said):
        open_sets(VERBATIM, [str(tmp_path)])


def test_tar_files_without_an_index_are_read_in_place(tmp_path):
    first = pack(tmp_path / "0.tar", {"a.jpg": b"one", "a.txt": b"A.", "b.jpg": b"two", "b.txt": b"B."})
    pack(tmp_path / "1.tar", {"c.mp4": b"three", "c.json": json.dumps({"conversations": conversation("Q")}).encode()})
    source = open_records(DataConfig(), [str(tmp_path)])
    assert len(source) == 3
    assert [document(source, n) for n in (0, 1)] == ["<image>A.", "<image>B."]
    medium = source.record(2).media[0]
    assert isinstance(medium.path, Member) and medium.is_video
    with open_media(medium.path) as file:
        assert file.read() == b"three"
    alone = open_sets(VERBATIM, [first])
    assert len(alone) == 2 and alone.record(1) == open_records(VERBATIM, [str(tmp_path)]).record(1)
