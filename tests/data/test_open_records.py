"""Which source reads a path of ``data.train``."""

from dataclasses import replace

import pytest

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources import open as sources
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.open import Format, open_records
from tests.data.material import conversation, write_jsonl


@pytest.fixture
def folders(monkeypatch):
    """A second format: a folder holds the file ``all.jsonl``."""

    def opened(data, paths):
        return JsonFiles([f"{path}/all.jsonl" for path in paths], data.media_dir)

    format_ = Format("a folder", lambda path: path.endswith("/"), opened)
    monkeypatch.setattr(sources, "FORMATS", (format_, *sources.FORMATS))


def test_what_stands_under_a_path_says_which_source_reads_it(folders, tmp_path):
    for name in ("all", "more"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": f"{name}.png", "conversations": conversation()}])
    data = replace(DataConfig(), media_dir="/media")
    for paths, expected in (
        ([f"{tmp_path}/", f"{tmp_path}/"], ["all", "all"]),
        ([f"{tmp_path}/more.jsonl", f"{tmp_path}/all.jsonl"], ["more", "all"]),
    ):
        records = open_records(data, paths)
        media = [records.record(index).media[0].path for index in range(len(records))]
        assert media == [f"/media/{name}.png" for name in expected]


def test_paths_of_several_formats_are_refused_by_name(folders, tmp_path):
    write_jsonl(tmp_path / "all.jsonl", [{"conversations": conversation()}])
    with pytest.raises(RecordError, match=r"/ is a folder and .*all\.jsonl is a JSON or JSONL file; name paths of one kind"):
        open_records(DataConfig(), [f"{tmp_path}/", f"{tmp_path}/all.jsonl"])


def test_a_path_of_no_known_format_and_an_empty_list_say_what_is_expected(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(RecordError, match=r"the name must end in \.json"):
        open_records(DataConfig(), [str(tmp_path / "a.csv")])
    with pytest.raises(RecordError, match=r"set data\.train to at least one"):
        open_records(DataConfig(), [])
