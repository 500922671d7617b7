"""Questions become the documents that training makes: the same tokens, places and frames, by every rule, with real files."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from megatron_vila.config.schema import Config
from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.media import MediaError
from megatron_vila.data.sources.open import open_records
from megatron_vila.errors import SettingError
from megatron_vila.generate.prompt import PromptError, Prompts, media_of, seconds
from megatron_vila.plan.chunks import prefix_tokens
from tests import samples
from tests.data.material import byte_level_tokenizer, cut_off, write_video

TOKENIZER = byte_level_tokenizer("qwen2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two videos (20 and 12 frames at 8 a second), two pictures, and a folder of three."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "long.mp4", 20)
    write_video(folder / "short.mp4", 12)
    (folder / "frames").mkdir()
    for number, name in enumerate(("a.png", "b.png", "frames/1.png", "frames/2.png", "frames/10.png")):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / name)
    return folder


def settings(**data) -> Config:
    config = samples.config()
    config.model.llm.vocab_size = len(TOKENIZER)
    config.data.num_frames, config.data.frame_separator_ids, config.data.image_separator_ids = 6, [5], [6, 7]
    config.train.seq_length = 4096
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def prompts(config: Config) -> Prompts:
    return Prompts(config, ChatEncoder(TOKENIZER, TextRules.of(config.data)))


def of(files, *names: str) -> list[str]:
    return [str(files / name) for name in names]


@pytest.mark.parametrize(
    ("rule", "question"),
    [
        ("vila", "What is shown?"),
        ("vila", " <video>\nWhat is <image> shown in the <image>? "),
        ("verbatim", "What is shown?"),
        ("verbatim", "Is <image> in <video>, and <image>? "),
    ],
)
def test_a_question_has_the_tokens_and_frames_that_training_gives_to_a_sample_with_it(files, tmp_path, rule, question):
    config = settings(media_format=rule)
    record = {
        "id": "s",
        "image": of(files, "a.png", "b.png"),
        "video": of(files, "long.mp4"),
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A red circle."}],
    }
    (tmp_path / "train.json").write_text(json.dumps([record]))
    config.data.train = [str(tmp_path / "train.json")]
    records = open_records(config.data, config.data.train, "training")
    trained = VilaDataset(records, TOKENIZER, config.data, config.model, 4096).build(0).document
    asking = prompts(config)
    document = asking.document(question, asking.choose(media_of(of(files, "a.png", "b.png"), of(files, "long.mp4"))))
    assert np.array_equal(document.token_ids, trained.token_ids[: len(document)])
    assert document.frames == trained.frames and document.media == trained.media
    assert np.array_equal(document.frame_starts, trained.frame_starts)
    # What training supervises first is what the model is to write first.
    (first, *_) = np.flatnonzero(trained.labels != -100)
    assert first == len(document) - 1 and (document.labels == -100).all()


def test_questions_about_the_same_media_share_all_up_to_the_last_frame(files):
    asking = prompts(settings())
    pictures = asking.choose(media_of([], of(files, "long.mp4", "short.mp4")))
    one, two = asking.document("Who?", pictures), asking.document("<video><video>\nWhat flashed, and when?", pictures)
    end = prefix_tokens(one)
    assert end == prefix_tokens(two) < len(one) < len(two)
    assert np.array_equal(one.token_ids[:end], two.token_ids[:end]) and one.frames == two.frames


@pytest.mark.parametrize("rule", ["vila", "verbatim"])
def test_markers_are_as_many_as_the_files_or_none_or_the_question_is_refused(files, rule):
    asking = prompts(settings(media_format=rule))
    files_of = {kind: of(files, *names) for kind, names in (("image", ("a.png", "b.png")), ("video", ("long.mp4", "short.mp4")))}
    for images, videos, i, v in product(range(3), repeat=4):
        pictures = asking.choose(media_of(files_of["image"][:images], files_of["video"][:videos]))
        question = "<image>" * i + " and " + "<video>" * v + " shown?"
        fits = (i, v) in {(0, 0), (images, videos)} or (not images and (i, v) == (videos, 0))
        if fits:
            assert len(asking.document(question, pictures).frames) == images + sum(map(len, pictures[images:]))
        else:
            told = f"holds {i} markers <image> and {v} markers <video>.*{images} images and {videos}"
            with pytest.raises(PromptError, match=told):
                asking.document(question, pictures)


def test_an_escaped_marker_is_the_word(files):
    asking = prompts(settings())
    document = asking.document(r"What does \<video> mean?", ())
    assert not document.frames and "What does <video> mean?" in TOKENIZER.decode(document.token_ids)


def test_frames_are_those_of_training_unless_a_number_or_a_rate_is_asked_for(files):
    asking, video = prompts(settings()), media_of([], of(files, "long.mp4"))

    def indices(**asked) -> list[int]:
        return [unit.indices[0] for unit in asking.choose(video, **asked)[0]]

    assert indices() == [0, 4, 8, 11, 15, 19]
    assert indices(num_frames=3) == [0, 10, 19]
    assert indices(num_frames=10_000) == list(range(20))
    assert len(indices(fps=2)) == 5  # 2.5 seconds
    assert len(indices(fps=2, num_frames=3)) == 3
    for bad, option in (({"num_frames": 0}, "--frames"), ({"fps": 0.0}, "--fps"), ({"fps": -1.0}, "--fps")):
        with pytest.raises(PromptError, match=option):
            indices(**bad)
    with pytest.raises(MediaError, match="not a regular file but a device"):
        asking.choose(media_of(["/dev/zero"], []))


def test_a_clip_takes_frames_between_its_start_and_its_end_alone(files):
    asking = prompts(settings())
    (units,) = asking.choose(media_of([], of(files, "long.mp4"), seconds("0:01"), seconds("2")), num_frames=100)
    assert [unit.indices[0] for unit in units] == list(range(8, 17))
    with pytest.raises(MediaError, match="the clip starts at 9 s"):
        asking.choose(media_of([], of(files, "long.mp4"), 9.0))


def test_a_folder_of_pictures_is_a_video(files):
    (units,) = prompts(settings()).choose(media_of([], of(files, "frames")))
    assert [unit.pictures[0].rpartition("/")[2] for unit in units] == ["1.png", "2.png", "10.png"]


@pytest.mark.parametrize("text", ["", "abc", "1:2:3:4", "-5", "1:30m", "1:99", "1:99:09", "1:09:60"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(PromptError, match=r"write seconds \(90\)"):
        seconds(text)


def test_times_are_seconds_minutes_or_hours():
    assert [seconds(text) for text in ("90", "1:30", "0:01:30.5", "2.25", "90:00")] == [90, 90, 90.5, 2.25, 5400]


def test_files_that_cannot_be_asked_about_are_refused_before_anything_is_decoded(files, tmp_path):
    video = of(files, "long.mp4")
    for arguments, words in (
        ((["none.png"], []), "none.png: no such file"),
        (([], ["none.mp4"]), "none.mp4: no such file"),
        (([str(files / "frames")], []), "is a folder: give it as a video"),
        (([], [], 1.0), "there are 0; give one video"),
        (([], video * 2, None, 1.0), "there are 2; give one video"),
        (([], video, 2.0, 1.0), "ends at 1 s, before it starts at 2 s"),
    ):
        with pytest.raises(PromptError, match=words):
            media_of(*arguments)
    (tmp_path / "text.mp4").write_text("no video")
    broken = cut_off(write_video(tmp_path / "broken.mp4", 4))
    for path in (tmp_path / "text.mp4", broken):
        with pytest.raises(MediaError, match=path.name):
            prompts(settings()).choose(media_of([], [str(path)]))


def test_a_tokenizer_of_another_model_is_refused(files):
    config = settings()
    config.model.llm.vocab_size = 100
    with pytest.raises(SettingError, match=r"vocab_size=100; use the tokenizer that belongs to the model"):
        prompts(config).document("What?", ())


def test_the_room_that_a_question_takes_counts_its_text_frames_separators_and_answer(files):
    asking = prompts(settings())
    document = asking.document("What?", asking.choose(media_of([], of(files, "long.mp4"))))
    wanted = asking.wanted(document, answer_tokens=10)
    assert wanted.tokens == len(document) + 10 and wanted.frames == 6 and wanted.separators == 1
    assert wanted.text_tokens == len(document) + 10 - 6 * (document.frames[0].tokens + 1)
