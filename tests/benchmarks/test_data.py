"""The benchmark of loading."""

import csv
from pathlib import Path

from benchmarks import data, recording
from megatron_vila.data.video import decode_video_frames
from tests.data.stamped import write


def test_loaders_are_measured_on_the_same_file(tmp_path):
    video, table = write(tmp_path / "small.mp4", 40, gop=10), tmp_path / "data.csv"
    arguments = ["loaders", "--cases", "ours", "--file", video, "--frames", "8", "--steps", "2", "--out", str(table)]
    assert data.main(arguments) == 0 and data.main(arguments) == 0  # a second run takes the place of the first
    (row,) = csv.DictReader(table.open())
    assert tuple(row) == data.COLUMNS
    assert (row["case"], row["source"], row["frames"]) == ("ours", "small", "8")
    assert float(row["sampled_frames_per_s"]) > 0 and "av 1" in row["versions"]


def test_a_made_up_recording_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "WIDTH", 256)
    monkeypatch.setattr(recording, "HEIGHT", 192)
    one, two = (recording.write_recording(tmp_path / name, 1) for name in ("one.mp4", "two.mp4"))
    assert decode_video_frames(one, [0, 17, 29])[1].tobytes() == decode_video_frames(two, [0, 17, 29])[1].tobytes()
    assert decode_video_frames(one, [0])[0].tobytes() != decode_video_frames(one, [17])[0].tobytes()


def test_the_published_table_has_every_column_and_names_hardware_versions_and_command():
    with (Path(__file__).parents[2] / "docs/benchmarks/data.csv").open() as table:
        for row in csv.DictReader(table):
            assert tuple(row) == data.COLUMNS
            assert row["hardware"] and "torch 2" in row["versions"] and row["command"].startswith("python -m benchmarks.data ")
