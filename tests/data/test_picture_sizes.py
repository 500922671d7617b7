"""Units that depend on the size of a picture, from the file of a medium to what ``explain`` prints."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vila.config.schema import DataConfig, ModelConfig
from megatron_vila.data import frame_chooser
from megatron_vila.data.dataset import TooLongError, VilaDataset, fit_frames
from megatron_vila.data.images import load_image, picture_size
from megatron_vila.data.media import MediaError
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.video import decode_video_frames, probe_video, shown_size
from megatron_vila.explain.__main__ import main
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import Squares, Unit, most_frames
from megatron_vila.plan.row import MEDIA_TOKEN, pack
from megatron_vila.plan.row_plan import RowPlan
from tests.data.material import byte_level_tokenizer, conversation, write_jsonl
from tests.samples import Tiled

TOKENIZER = byte_level_tokenizer("qwen2")


def write_wide_video(path: Path, frames: int, quarter_turns: bool = False) -> str:
    """A video of 96 x 32 pixels as stored; shown upright, 32 x 96, with ``quarter_turns``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv420p"
        if quarter_turns:
            stream.set_display_matrix([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30])
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 96, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    write_wide_video(folder / "wide.mp4", 6)
    write_wide_video(folder / "tall.mp4", 6, quarter_turns=True)
    for name, size in (("large.png", (64, 70)), ("a.png", (33, 20)), ("b.png", (20, 20))):
        Image.new("RGB", size).save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (96, 40)).save(folder / "turned.jpg", exif=turned)
    return folder


RECORDS = [
    {"id": "video", "video": "wide.mp4", "conversations": conversation("<video>\nWhat?")},
    {"id": "images", "images": ["large.png", "b.png"], "conversations": conversation("<image>\n<image>\nWhat?")},
    {"id": "folder", "video": ["a.png", "b.png"], "conversations": conversation("<video>\nWhat?")},
    {"id": "both", "videos": ["tall.mp4", "wide.mp4"], "conversations": conversation("<video>\n<video>\nWhat?")},
]


@pytest.fixture
def make(folder, tmp_path, monkeypatch):
    def made(mode=Tiled(32, 9), seq_length=4096):  # noqa: B008
        monkeypatch.setattr(frame_chooser, "pictures_of", lambda model: mode)
        records = JsonFiles([write_jsonl(tmp_path / "train.jsonl", RECORDS)], media_dir=str(folder))
        return VilaDataset(records, TOKENIZER, DataConfig(num_frames=4), ModelConfig(), seq_length)

    return made


@pytest.mark.parametrize("name", ["large.png", "turned.jpg"])
def test_the_size_of_a_picture_is_that_of_the_picture_as_it_is_shown(folder, name):
    assert picture_size(folder / name) == load_image(folder / name).size


def test_the_size_of_a_video_is_that_of_its_frames_as_they_are_shown(folder):
    for name, size in (("wide.mp4", (96, 32)), ("tall.mp4", (32, 96))):
        assert shown_size(probe_video(str(folder / name))) == size
        assert decode_video_frames(str(folder / name), [2])[0].size == size


def test_a_picture_without_a_size_that_can_be_read_is_refused(folder, tmp_path):
    (tmp_path / "no.png").write_text("nothing")
    with pytest.raises(MediaError, match="not an image that can be read"):
        picture_size(tmp_path / "no.png")


def test_units_follow_from_the_sizes_of_pictures_and_videos_through_dataset_and_row_plan(make):
    dataset = make()
    tiles = {"video": [3] * 4, "images": [6, 1], "folder": [2, 2], "both": [3] * 8}
    documents = [dataset.build(index).document for index in range(4)]
    for document in documents:
        expected = tiles[document.sample_id]
        assert [frame.unit for frame in document.frames] == [Unit(1, n, 3 * n, 16 * n) for n in expected]
        assert (document.token_ids == MEDIA_TOKEN).sum() == 3 * sum(expected)
    grid = GridShape.of(2, ring=2)
    plan = RowPlan.of(pack(documents, grid.document_multiple, grid.row_multiple), grid)
    first, second = (sum(plan.row.units[i].tiles for i in plan.shard(rank).frames) for rank in range(2))
    assert first + second == 47 and abs(first - second) <= 3, "dealt by cost"
    assert plan.reshard.traffic.sum() == 3 * sum(map(sum, tiles.values()))


def test_a_long_video_is_cut_by_the_tokens_of_its_own_frames(make):
    text = len(make().build(0).document) - 4 * 9
    dataset = make(seq_length=text + 3 * 9 + 8)
    choice = dataset.build(0)
    assert (len(choice.document.frames), choice.dropped_frames) == (3, 1)


def test_images_fit_by_the_tokens_of_their_own_size(make):
    length = len(make().build(1).document)
    assert make(seq_length=length).build(1).index == 1
    with pytest.raises(TooLongError):
        make(seq_length=length - 1).build(1)


def test_videos_of_several_sizes_share_the_room_by_the_tokens_of_each():
    wide, narrow = (lambda frames: 9 * frames), (lambda frames: 3 * frames)
    assert fit_frames([4, 4], 48, [wide, narrow]) == [4, 4]
    assert fit_frames([4, 4], 36, [wide, narrow]) == [3, 3]
    assert fit_frames([4, 4], 12, [wide, narrow]) == [1, 1]


def test_no_size_is_read_where_nothing_depends_on_it(make, monkeypatch):
    def refused(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(frame_chooser, "picture_size", refused)
    monkeypatch.setattr(frame_chooser, "shown_size", refused)
    dataset = make(Squares(Unit(1, 1, 4, 16)))
    assert [len(dataset.build(index).document.frames) for index in range(4)] == [4, 2, 2, 8]


def test_without_a_size_the_most_that_there_may_be_is_planned():
    assert most_frames(Tiled(32, 9), 270) == 10


def test_explain_shows_the_tokens_of_each_size(make, folder, tmp_path, capsys):
    make()
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    settings = [f"data.train=[{tmp_path / 'train.jsonl'}]", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    settings += [f"data.media_dir={folder}", "data.num_frames=4"]
    assert main(["tiny", "sample=1", *settings]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(21 visual of 2 frames)" in text
    assert re.search(r"the picture 18 .*the picture 3 ", text)
