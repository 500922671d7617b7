"""What training does not read in place becomes shards that hold the same records, whatever the rule for media."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.config.text_rules import MEDIA_FORMATS
from megatron_vila.data.containers.open import open_sets
from megatron_vila.data.prepare.options import Options
from megatron_vila.data.prepare.run import Task, begin, do_parts
from megatron_vila.data.sources.open import open_records
from tests.data.material import write_jsonl

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A set of each format, and each of its records once more in a form of records."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("a", "b"):
        (folder / "media").mkdir(exist_ok=True)
        Image.new("RGB", (16, 12), "red" if name == "a" else "blue").save(folder / f"media/{name}.png")
    (folder / "media/a.txt").write_text("Rot.")
    (folder / "media/b.json").write_text(json.dumps({"messages": [{"role": "user", "content": "Q<image>"}]}))
    (folder / "text.txt").write_text("One <image>.\nZwei Bären.\n")
    picture = {"bytes": (folder / "media/a.png").read_bytes(), "path": "a.png"}
    rows = [{"id": "r", "image": picture, "conversations": [{"from": "human", "value": "<image>\nQ"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    parts = [{"type": "text", "text": "Is it <image>?"}, {"type": "image", "image": "media/a.png"}]
    lines = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]},
        {"texts": ["A", None, "B"], "images": [None, "media/b.png", None]},
        {"text": "No media."},
    ]
    write_jsonl(folder / "lines.jsonl", lines)
    return folder


def test_shards_hold_the_records_of_the_sets_that_they_were_made_of(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count = 0
    for name, format_name in (("media", ""), ("rows.parquet", ""), ("lines.jsonl", ""), ("text.txt", "text_lines")):
        out = tmp_path / name
        task = Task((str(sets / name),), str(out), Options(short_side=64), format=format_name)
        do_parts(task, *begin(task), [0], lambda: None)
        for rule in MEDIA_FORMATS:
            data = DataConfig(media_format=rule)
            before, after = open_sets(data, [str(sets / name)], format_name), open_records(data, [str(out)])
            assert len(after) == len(before) and not after.bad
            for index in range(len(before)):
                told, found = before.record(index), after.record(index)
                assert found.turns == told.turns and found.sample_id == told.sample_id
                assert [m.is_video for m in found.media] == [m.is_video for m in told.media]
                count += 1
    assert count == 16
    moved = replace(DataConfig(), media_dir=str(sets))
    assert open_sets(moved, [str(sets / "lines.jsonl")]).record(0).turns[0].text == "<image>Is it \\<image>?"
