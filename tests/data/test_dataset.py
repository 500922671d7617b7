"""Documents from records: token counts, the over-long policy, samples that cannot be used, the order of an epoch."""

import base64
import contextlib
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vila.config.schema import DataConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.data import frame_chooser
from megatron_vila.data.chat import describe
from megatron_vila.data.check import problem_of
from megatron_vila.data.dataset import (
    BrokenSampleError,
    NoUsableSampleError,
    TooLongError,
    VilaDataset,
    fit_frames,
    share_frames,
)
from megatron_vila.data.failures import MachineError
from megatron_vila.data.formats.read import parse_record
from megatron_vila.data.order import epoch_order
from megatron_vila.data.placement import Turn
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.source import ChangedFileError
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN
from tests.data.material import byte_level_tokenizer, conversation, cut_off, write_jsonl, write_video
from tests.samples import Pooled

MODEL = ModelConfig(
    vision=VisionConfig(image_size=56, patch_size=14),
    projector=ProjectorConfig(type="mlp_downsample"),
    llm=LanguageConfig(vocab_size=1000),
)
TOKENIZER = byte_level_tokenizer("qwen2")
quick = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with good and bad media; a record names them by file name."""
    folder = tmp_path_factory.mktemp("media")
    for name, frames in (("short.mp4", 3), ("long.mp4", 64), ("other.mp4", 24)):
        write_video(folder / name, frames)
    Image.new("RGB", (40, 30), (200, 0, 0)).save(folder / "red.png")
    cut_off(write_video(folder / "cut.mp4", 24))
    (folder / "empty.mp4").touch()
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    return folder


def make(media, tmp_path, records, seq_length=512, model=MODEL, **data):
    path = write_jsonl(tmp_path / "train.jsonl", records)
    files = JsonFiles([path], media_dir=str(media))
    return VilaDataset(files, TOKENIZER, DataConfig(**{"num_frames": 8, **data}), model, seq_length)


def video(name, **more):
    return {"id": name, "video": name, "conversations": conversation("<video>\nWhat?"), **more}


TEXT = {"id": "text", "conversations": conversation()}


def test_a_video_becomes_the_sampled_frames_each_followed_by_its_separators(media, tmp_path):
    document = make(media, tmp_path, [video("long.mp4")], frame_separator_ids=[7, 9]).build(0).document
    assert [i for f in document.frames for i in f.indices] == [0, 9, 18, 27, 36, 45, 54, 63]
    assert {(f.source, f.tokens, f.cost, f.is_video) for f in document.frames} == {
        (str(media / "long.mp4"), 4, 16, True)
    }
    assert (document.token_ids == MEDIA_TOKEN).sum() == 8 * 4
    assert np.diff(document.frame_starts).tolist() == [6] * 7
    assert document.token_ids[document.frame_starts + 4].tolist() == [7] * 8


def test_a_short_video_gives_all_its_frames_and_fps_limits_a_long_one(media, tmp_path):
    assert len(make(media, tmp_path, [video("short.mp4")]).build(0).document.frames) == 3
    assert len(make(media, tmp_path, [video("long.mp4")], fps=0.5).build(0).document.frames) == 4
    first = make(media, tmp_path, [video("long.mp4")], num_frames=3, fps=2.0, fps_rule="first").build(0).document
    assert [i for frame in first.frames for i in frame.indices] == [0, 4, 8]


def test_images_and_text_alone_are_samples_too(media, tmp_path):
    records = [{"image": "red.png", "conversations": conversation("<image> What?")}, TEXT]
    dataset = make(media, tmp_path, records, image_separator_ids=[5])
    image, text = dataset.build(0).document, dataset.build(1).document
    assert [(f.indices, f.is_video) for f in image.frames] == [((0,), False)]
    assert image.token_ids[image.frame_starts[0] + 4] == 5
    assert text.frames == () and text.frame_starts.shape == (0,)


def test_media_that_a_record_carries_are_used_like_files(media, tmp_path):
    def address(kind, name):
        return f"data:{kind};base64," + base64.b64encode((media / name).read_bytes()).decode()

    asked = [{"role": "user", "content": "<image><video>What?"}, {"role": "assistant", "content": "A."}]
    named = {"id": "x", "messages": asked, "images": ["red.png"], "videos": ["short.mp4"]}
    carried = named | {"images": [address("image/png", "red.png")], "videos": [address("video/mp4", "short.mp4")]}
    broken = carried | {"id": "broken", "images": [address("image/png", "text.mp4")]}
    dataset = make(media, tmp_path, [named, carried, broken])
    files, contents = (dataset.build(index).document for index in (0, 1))
    assert contents.token_ids.tolist() == files.token_ids.tolist()
    assert [frame.indices for frame in contents.frames] == [frame.indices for frame in files.frames]
    assert all(isinstance(frame.source, bytes) for frame in contents.frames)
    assert "bytes in memory" in describe(contents, TOKENIZER) and len(describe(contents, TOKENIZER)) < 1000
    assert [problem_of(dataset, index, decode=True) for index in (0, 1)] == [None, None]
    problem = problem_of(dataset, 2, decode=True)
    assert problem.kind == "broken" and "2000 bytes in memory" in problem.reason
    assert problem.place.endswith("train.jsonl, line 3")


def test_documents_and_conversations_stand_in_one_file(media, tmp_path):
    records = [{"text": "Two <image> words.", "image": "red.png"}, video("short.mp4"), {"text": "word " * 600}]
    dataset = make(media, tmp_path, records, image_separator_ids=[7])
    text = dataset.build(0).document
    assert (text.labels != IGNORE).sum() == len(text) - 4 - 1 - 1, "not the picture, its separator and the first word"
    assert text.token_ids[-1] == TOKENIZER.eos_token_id
    with pytest.raises(TooLongError, match="text and images alone"):
        dataset.build(2)


def test_the_documents_of_real_model_shapes_have_the_published_token_counts(media, tmp_path):
    for size, kind, expected in (
        (384, "mlp_downsample", 196),
        (448, "mlp_downsample_2x2_fix", 256),
        (448, "mlp_downsample_3x3_fix", 121),
        (384, "mlp_downsample_3x3_fix", 81),
        (384, "linear", 729),
    ):
        model = ModelConfig(
            vision=VisionConfig(image_size=size),
            projector=ProjectorConfig(type=kind),
            llm=LanguageConfig(vocab_size=1000),
        )
        document = make(media, tmp_path, [video("long.mp4")], model=model, seq_length=10_000).build(0).document
        assert document.frames[0].tokens == expected
        assert document.frames[0].cost == (size // 14) ** 2


@pytest.mark.parametrize("room", range(8))
def test_an_over_long_video_keeps_as_many_frames_as_fit_spread_evenly(media, tmp_path, room):
    whole = make(media, tmp_path, [video("long.mp4"), TEXT], frame_separator_ids=[7]).build(0).document
    seq_length = len(whole) - 8 * 5 + room * 5 + 4
    dataset = make(media, tmp_path, [video("long.mp4"), TEXT], seq_length=seq_length, frame_separator_ids=[7])
    if room == 0:
        with pytest.raises(TooLongError, match="room for 0 frames"):
            dataset.build(0)
        return
    choice = dataset.build(0)
    assert (choice.index, choice.dropped_frames) == (0, 8 - room)
    assert len(choice.document.frames) == room
    assert seq_length - 5 < len(choice.document) <= seq_length
    gaps = np.diff([0, *(f.indices[0] for f in choice.document.frames[1:])])
    assert choice.document.frames[0].indices == (0,)
    assert room == 1 or (choice.document.frames[-1].indices == (63,) and gaps.max() - gaps[gaps > 0].min() <= 1)


@pytest.mark.parametrize("room", range(1, 4))
def test_an_over_long_video_of_pooled_frames_keeps_the_frames_of_the_units_that_fit(media, tmp_path, monkeypatch, room):
    monkeypatch.setattr(frame_chooser, "pictures_of", lambda model: Pooled(3, 1, 5))
    whole = make(media, tmp_path, [video("long.mp4"), TEXT], frame_separator_ids=[7]).build(0).document
    assert [frame.unit.frames for frame in whole.frames] == [3, 3, 2]
    assert np.diff(whole.frame_starts).tolist() == [6, 6] and (whole.token_ids == MEDIA_TOKEN).sum() == 15
    seq_length = len(whole) - 3 * 6 + room * 6 + 5
    choice = make(media, tmp_path, [video("long.mp4"), TEXT], seq_length=seq_length, frame_separator_ids=[7]).build(0)
    assert sum(frame.unit.frames for frame in choice.document.frames) == min(3 * room, 8)
    assert choice.dropped_frames == 8 - min(3 * room, 8) and len(choice.document) <= seq_length
    assert f"{min(3 * room, 8)} frames in {room} unit" in describe(choice.document, TOKENIZER)


def test_videos_of_pooled_frames_share_the_room_that_their_units_take():
    places = lambda frames: 5 * -(-frames // 3)  # noqa: E731
    assert fit_frames([8, 8], 30, [places] * 2) == [8, 8]
    assert fit_frames([8, 2], 14, [places] * 2) == [3, 1]
    assert fit_frames([8, 2], 15, [places] * 2) == [6, 2]
    with pytest.raises(TooLongError, match="room for 1 frames, not for one of each of its 2 videos"):
        fit_frames([8, 2], 9, [places] * 2)


def test_over_long_samples_are_refused_where_the_policy_is_drop(media, tmp_path):
    records = [video("long.mp4"), video("short.mp4")]
    length = len(make(media, tmp_path, records).build(1).document)
    dataset = make(media, tmp_path, records, seq_length=length, over_long="drop")
    with pytest.raises(TooLongError, match="do not fit .* and data.over_long=drop"):
        dataset.build(0)
    assert dataset.build(1).dropped_frames == 0


def test_text_that_is_too_long_is_never_cut(media, tmp_path):
    dataset = make(media, tmp_path, [{"conversations": conversation("word " * 400)}, TEXT], seq_length=100)
    with pytest.raises(TooLongError, match="text and images alone have [0-9]+ tokens, train.seq_length=100"):
        dataset.build(0)


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 200))
def test_frames_are_shared_between_videos_in_proportion_and_fill_the_room(counts, room):
    if room < len(counts):
        with pytest.raises(TooLongError):
            share_frames(counts, room)
        return
    kept = share_frames(counts, room)
    assert sum(kept) == min(room, sum(counts))
    assert all(1 <= k <= n for k, n in zip(kept, counts, strict=True))
    if room < sum(counts):
        assert all(
            a <= b + 1
            for (m, a) in zip(counts, kept, strict=True)
            for (n, b) in zip(counts, kept, strict=True)
            if m <= n
        )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (video("missing.mp4"), "no such file"),
        (video("empty.mp4"), "empty"),
        (video("text.mp4"), "text.mp4"),
        (video("cut.mp4"), "cut.mp4"),
        ({"image": "empty.png", "conversations": conversation()}, "empty"),
        ({"image": "missing.png", "conversations": conversation()}, "No such file"),
    ],
)
def test_a_broken_sample_says_what_is_wrong_and_the_next_good_one_is_shown(media, tmp_path, record, reason):
    dataset = make(media, tmp_path, [TEXT, record, video("empty.mp4"), video("long.mp4")])
    with pytest.raises(BrokenSampleError, match=reason):
        dataset.build(1)
    assert dataset.first_usable(1).document.sample_id == "long.mp4"
    assert dataset.first_usable(1, {3: "known"}).index == 0, "after the last record comes the first"


def test_the_error_when_no_sample_is_left_tells_the_reasons(media, tmp_path):
    records = [video("missing.mp4"), {"conversations": conversation("word " * 400)}]
    with pytest.raises(NoUsableSampleError, match=r"1 are broken, 1 do not fit train.seq_length=64\n.*no such file"):
        make(media, tmp_path, records, seq_length=64).first_usable(0)


def test_whatever_a_template_raises_makes_one_sample_broken(media, tmp_path):
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = "{{ 1 % 0 if 'zero' in messages[0]['content'] else '' }}" + tokenizer.chat_template
    records = [{"id": f"zero {n}", "conversations": conversation("zero")} for n in range(2)] + [TEXT]
    files = JsonFiles([write_jsonl(tmp_path / "train.jsonl", records)])
    dataset = VilaDataset(files, tokenizer, DataConfig(), MODEL, 512)
    with pytest.raises(BrokenSampleError, match="^the chat template raises ZeroDivisionError: integer modulo by zero$"):
        dataset.build(0)
    assert dataset.first_usable(0).index == 2


class WithNumbers(JsonFiles):
    """Records 0 and 1 have a number for a text, which no reading of a file lets through."""

    def record(self, index):
        record = super().record(index)
        return record._replace(turns=(Turn("user", 3), *record.turns[1:])) if index < 2 else record


def test_an_error_that_nobody_foresaw_makes_one_sample_broken_and_is_traced_once(media, tmp_path, caplog):
    records = [{"id": f"odd {n}", "conversations": conversation()} for n in range(2)] + [TEXT]
    files = WithNumbers([write_jsonl(tmp_path / "train.jsonl", records)])
    dataset = VilaDataset(files, TOKENIZER, DataConfig(), MODEL, 512)
    for index in range(2):
        with pytest.raises(BrokenSampleError, match="^AttributeError: "):
            dataset.build(index)
    (told,) = [record for record in caplog.records if record.exc_info]
    assert told.getMessage() == "sample odd 0 fails in a way that nobody foresaw:"


def test_a_file_of_records_that_changes_is_no_fault_of_a_sample(media, tmp_path):
    dataset = make(media, tmp_path, [{"id": "first", "conversations": conversation()}, TEXT])
    path = tmp_path / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"circle", b"square", 1))
    with pytest.raises(ChangedFileError, match="line 1: not what it was"):
        dataset.build(0)
    assert dataset.build(1).index == 1, "a record that is the same is used"


class Known:
    """A source beside files: two texts."""

    bad, digest = {}, "known"

    def __len__(self):
        return 2

    def record(self, index):
        return parse_record({"conversations": conversation()}, self.name(index), str(index), "")

    def name(self, index):
        return f"known {index}"


def test_a_source_of_another_kind_is_read_like_files():
    dataset = VilaDataset(Known(), TOKENIZER, DataConfig(), MODEL, 2000)
    assert [dataset.build(index).document.sample_id for index in range(2)] == ["0", "1"]


def test_a_bad_record_is_a_broken_sample_from_the_start(media, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"id": "bad"}, TEXT])
    dataset = VilaDataset(JsonFiles([path], skip_bad=True), TOKENIZER, DataConfig(), MODEL, 512)
    with pytest.raises(BrokenSampleError, match="line 1"):
        dataset.build(0)
    assert dataset.first_usable(0).index == 1


def test_too_many_open_files_are_no_fault_of_a_sample(media, tmp_path):
    dataset = make(media, tmp_path, [video("long.mp4"), TEXT])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(open(os.devnull))  # noqa: SIM115
        with pytest.raises(MachineError, match="at sample .*line 1: OSError.*Too many open files"):
            dataset.build(0)
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_sample_without_an_answer_is_not_supervised(media, tmp_path):
    dataset = make(media, tmp_path, [{"conversations": conversation()[:1]}, TEXT])
    assert [dataset.build(i).supervised for i in range(2)] == [False, True]


def test_token_ids_outside_the_vocabulary_are_refused(media, tmp_path):
    small = ModelConfig(vision=MODEL.vision, projector=MODEL.projector, llm=LanguageConfig(vocab_size=20))
    with pytest.raises(ValueError, match=r"data.frame_separator_ids holds token id 25, but model.llm.vocab_size=20"):
        make(media, tmp_path, [TEXT], model=small, frame_separator_ids=[25])
    with pytest.raises(BrokenSampleError, match=r"sample text holds token id \d+, but model.llm.vocab_size=20"):
        make(media, tmp_path, [TEXT], model=small).build(0)


@quick
@given(st.integers(1, 300), st.integers(-5, 2**40), st.integers(0, 50))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(samples, seed, epoch):
    order = epoch_order(samples, seed, epoch, shuffle=True)
    assert sorted(order) == list(range(samples))
    assert (order == epoch_order(samples, seed, epoch, shuffle=True)).all()
    assert (epoch_order(samples, seed, epoch, shuffle=False) == np.arange(samples)).all()


def test_epochs_and_seeds_differ_and_the_order_is_the_same_for_ever():
    assert epoch_order(10, 1234, 0, True).tolist() == [9, 2, 7, 6, 1, 3, 0, 8, 5, 4]
    orders = {tuple(epoch_order(50, seed, epoch, True)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    first = np.stack([epoch_order(8, seed, 0, True) for seed in range(4000)])
    counts = np.stack([(first == i).sum(axis=0) for i in range(8)])
    assert abs(counts - 500).max() < 120, "each sample comes at each place equally often"
