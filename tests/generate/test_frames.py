"""Frames of a prompt as tokens, with real files and a real tower: those of training, in every layout, encoded once."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from megatron_vila.config.schema import Config
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.data.images import preprocess
from megatron_vila.data.media import MediaError
from megatron_vila.data.video import decode_video_frames
from megatron_vila.generate.frames import ContentHashes, Embeddings, FrameSource, UnreadableError, document_key
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower, encode_frames
from megatron_vila.plan.chunks import cut, part, row_of
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import pictures_of
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, references
from megatron_vila.plan.row_plan import RowPlan, ShardPlan
from tests import samples
from tests.data.material import cut_off, write_video

FRAMES = 11
ALONE = GridShape()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("frames") / "video.mp4", FRAMES))


@pytest.fixture(scope="module")
def sight() -> tuple[VisionTower, nn.Module]:
    model = samples.model_config()
    torch.manual_seed(0)
    tower = VisionTower(model.vision, model.init_std)
    return tower, Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std)


@pytest.fixture
def source(sight):
    """Makes sources, and closes them."""
    made = []

    def make(kept_bytes: int = 1 << 20, weights: str = "w", **data) -> FrameSource:
        config = settings(**data)
        made.append(FrameSource(*sight, config, FrameChooser(config.data, config.model), weights, kept_bytes))
        return made[-1]

    yield make
    for each in made:
        each.close()


def settings(**data) -> Config:
    config = samples.config()
    config.data.workers, config.data.video_decoder = 2, "cpu"
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def prompt(path: str, frames: int = FRAMES, text: int = 3, tail: int = 2) -> Document:
    """``text`` tokens, the frames of a video, ``tail`` tokens."""
    units = pictures_of(samples.model_config()).units(frames, True)
    refs = references(path, range(frames), True, units)
    each = refs[0].tokens
    ids = np.array([1] * text + [MEDIA_TOKEN] * (each * frames) + [2] * tail, dtype=np.int64)
    starts = text + each * np.arange(frames)
    return Document(ids, np.full(len(ids), IGNORE), refs, starts, "a question", (frames,))


def plans(document: Document, grid: GridShape = ALONE, chunk_tokens: int = 20, rank: int = 0) -> list[ShardPlan]:
    chunks = cut(document, chunk_tokens)
    return [RowPlan.of(row_of([part(document, c)], [c.first], grid), grid).shard(rank) for c in chunks]


def through(source: FrameSource, of: list[ShardPlan]) -> torch.Tensor:
    """The tokens of all chunks, each begun before the one before is asked for."""
    made = []
    source.start(0, of[0])
    for number, plan in enumerate(of):
        if number + 1 < len(of):
            source.start(number + 1, of[number + 1])
        made.append(source.tokens(number, plan))
    return torch.cat(made)


def truth(sight, path: str, frames: int = FRAMES) -> torch.Tensor:
    pixels_F3HW = preprocess(decode_video_frames(path, range(frames)), samples.SIDE)
    with torch.no_grad():
        return encode_frames(*sight, pixels_F3HW).flatten(0, 1)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """But for rounding, since some processors round products of more rows differently."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_tokens_of_all_chunks_are_those_that_training_makes_of_the_frames(video, sight, source):
    assert_same(through(source(), plans(prompt(video))), truth(sight, video))


@pytest.mark.parametrize("grid", [GridShape(ulysses=2, ring=2), GridShape(tp=2, ring=2)])
def test_each_rank_makes_the_tokens_of_its_own_frames_and_all_ranks_together_make_all(video, sight, source, grid):
    document, wanted = prompt(video), truth(sight, video)
    each = document.frames[0].tokens
    made = {}
    for rank in range(grid.world_size):
        of = plans(document, grid, rank=rank)
        tokens_NH = through(source(), of)
        units = [unit for plan in of for unit in plan.row.frames[plan.frames.start : plan.frames.stop]]
        for unit, part_TH in zip(units, tokens_NH.split([unit.tokens for unit in units]), strict=True):
            made[unit.indices[0]] = part_TH
    assert sorted(made) == list(range(FRAMES))
    for index, tokens_TH in made.items():
        torch.testing.assert_close(tokens_TH, wanted[index * each : (index + 1) * each], rtol=1e-5, atol=1e-6)


def test_another_question_about_the_same_video_encodes_nothing_and_reads_no_pixel(video, source):
    first = source()
    before = through(first, plans(prompt(video)))
    assert (first.counts.encoded, first.counts.reused) == (FRAMES, 0)
    first._decoder.close()  # whatever is decoded from now on fails
    again = through(first, plans(prompt(video, text=9, tail=30), chunk_tokens=31))
    assert torch.equal(again, before)
    assert (first.counts.encoded, first.counts.reused) == (FRAMES, FRAMES)


def test_a_copy_of_the_video_is_known_by_its_content_and_a_changed_file_is_not(video, source, tmp_path):
    first = source()
    path = str(shutil.copy(video, tmp_path / "copy.mp4"))
    through(first, plans(prompt(video)))
    through(first, plans(prompt(path)))
    assert first.counts.encoded == FRAMES
    write_video(tmp_path / "copy.mp4", FRAMES, gop=2)
    through(first, plans(prompt(path)))
    assert first.counts.encoded == 2 * FRAMES


def test_only_the_frames_that_are_not_kept_are_encoded_and_all_come_in_their_order(video, sight, source):
    first = source()
    through(first, plans(prompt(video, frames=4)))
    assert torch.allclose(through(first, plans(prompt(video))), truth(sight, video), rtol=1e-5, atol=1e-6)
    assert (first.counts.encoded, first.counts.reused) == (FRAMES, 4)


def test_other_weights_or_another_preparation_of_pictures_are_other_embeddings(source):
    assert len({source(weights="w")._settings, source(weights="v")._settings, source(image_aspect="pad")._settings}) == 3


def test_memory_for_embeddings_is_kept_to_and_a_video_larger_than_it_is_kept_in_part(video, source):
    tokens = prompt(video).frames[0].tokens * samples.model_config().llm.hidden_size * 4
    small, none = source(kept_bytes=3 * tokens), source(kept_bytes=0)
    for _ in range(2):
        through(small, plans(prompt(video)))
        through(none, plans(prompt(video)))
    assert len(small.embeddings) == 3 and small.counts.reused == 3
    assert len(none.embeddings) == 0 and none.counts.reused == 0


def test_embeddings_of_earlier_prompts_make_room_the_longest_unused_first():
    kept, one = Embeddings(budget_bytes=3 * 16), torch.zeros(1, 4)
    for key in "abc":
        kept.put(key, one)
    kept.put("d", one)
    assert kept.get("d") is None  # those of the present prompt stay
    kept.next_prompt()
    assert kept.get("a") is not None
    kept.put("d", one)
    assert [key for key in "abcd" if kept.get(key) is not None] == ["a", "c", "d"]
    kept.put("too large", torch.zeros(100, 4))
    assert len(kept) <= 3 and kept.get("too large") is None


def test_frames_that_cannot_be_decoded_are_told_with_their_file(video, source, tmp_path):
    path = str(cut_off(shutil.copy(video, tmp_path / "half.mp4")))
    with pytest.raises(UnreadableError, match=r"half\.mp4.*ask without this file"):
        through(source(), plans(prompt(path)))


def test_a_document_that_is_given_up_leaves_nothing_behind_for_the_next(video, sight, source):
    first, of = source(), plans(prompt(video))
    for number, plan in enumerate(of[:3]):
        first.start(number, plan)
    first.next_prompt()
    assert_same(through(first, of), truth(sight, video))


def test_a_document_that_ended_before_its_first_chunk_was_asked_for_is_not_taken_for_the_next(video, sight, source, tmp_path):
    first, gone = source(), write_video(tmp_path / "gone.mp4", FRAMES, gop=2)
    other = plans(prompt(str(gone), frames=7))
    first.start(0, other[0])
    gone.unlink()
    with pytest.raises(MediaError, match=r"gone\.mp4"):
        first.start(1, other[1])
    assert_same(through(first, plans(prompt(video))), truth(sight, video))


def test_the_key_of_a_document_depends_on_text_frames_and_weights_and_not_on_where_the_file_lies(video, tmp_path):
    hashes = ContentHashes()
    key = document_key(prompt(video), hashes, "w")
    copy = str(shutil.copy(video, tmp_path / "elsewhere.mp4"))
    assert key == document_key(prompt(copy), hashes, "w")
    other = str(write_video(tmp_path / "other.mp4", FRAMES, gop=2))
    changed = [(prompt(other), "w"), (prompt(video), "v"), (prompt(video, text=4), "w"), (prompt(video, frames=10, tail=6), "w")]
    assert len({key, *(document_key(document, hashes, weights) for document, weights in changed)}) == 5
