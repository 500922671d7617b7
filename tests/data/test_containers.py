"""Sets of samples: which format stands under a path, and its samples by number."""

import json

import pytest

from megatron_vila.data.containers.samples import open_samples, part_of
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import detect
from megatron_vila.data.records import RecordRules
from tests.data.material import conversation

RULES = RecordRules("")


def test_json_files_are_read_by_number_with_what_is_wrong_with_bad_ones(tmp_path):
    good = {"image": "a.png", "conversations": conversation()}
    records = [good, {"messages": []}, {"messages": [{"role": "user", "content": "Q"}]}, good]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(json.dumps(record).encode() for record in records) + b"\n\xff\n")
    for name, count, word in (("a.json", 4, "record"), ("a.jsonl", 5, "line")):
        path = str(tmp_path / name)
        assert detect(path) == name.rpartition(".")[2]
        samples = open_samples(path, RULES)
        assert len(samples) == count
        first, bad, third = samples.read(0, 3)
        assert first[0] == f"{path}, {word} 1" and first[1].media[0].path == str(tmp_path / "a.png")
        assert isinstance(bad[1], RecordError) and f"{path}, {word} 2, field 'messages'" in str(bad[1])
        assert third[1].sample_id == f"{name}#3"
        assert [name for name, _ in samples.read(3, 4)] == [f"{path}, {word} 4"]
    assert "not UTF-8" in str(next(samples.read(4, 5))[1])
    assert next(open_samples(path, RecordRules("/m")).read(0, 1))[1].media[0].path == "/m/a.png"


def test_what_is_no_set_is_refused(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(RecordError, match=r"notes.doc: none of the formats that are known: json \("):
        detect(str(tmp_path / "notes.doc"))
    with pytest.raises(RecordError, match="missing: there is no such file or folder"):
        detect(str(tmp_path / "missing"))
    with pytest.raises(RecordError, match="the format csv is unknown; use one of json, jsonl"):
        open_samples(str(tmp_path / "notes.doc"), RULES, "csv")


def test_parts_cover_all_samples_once_and_evenly():
    for count in (0, 1, 7, 100):
        for parts in (1, 2, 3, 8):
            covered = [list(part_of(count, part, parts)) for part in range(parts)]
            assert sum(covered, []) == list(range(count))
            assert max(map(len, covered)) - min(map(len, covered)) <= 1
    with pytest.raises(ValueError, match="no part 3 of 3"):
        part_of(5, 3, 3)
