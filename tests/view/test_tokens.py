"""The token strip: every token once, whole characters, control tokens, media as blocks."""

import numpy as np

from megatron_vila.data.chat import ChatEncoder, assemble, describe, media_runs
from megatron_vila.data.placement import Turn
from megatron_vila.explain.view.tokens import Block, Gap, Stretch, strip_of, visible, written
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, FrameRef
from tests.data.material import byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer

TOKENIZER = byte_level_tokenizer("qwen2")
SQUARE = Unit(frames=1, tiles=1, tokens=4, cost=16)


def frames(name, indices):
    return tuple(FrameRef(name, (index,), True, SQUARE) for index in indices)


def document(turns, *media, separators=()):
    return assemble(ChatEncoder(TOKENIZER).encode(turns), media, [], separators, "a sample")


def tokens_of(strip):
    return [
        token for part in strip.parts if isinstance(part, Stretch) for each in part.written for token in each.tokens
    ]


def text_of(strip):
    return "".join(each.text for part in strip.parts if isinstance(part, Stretch) for each in part.written)


QUESTION = [Turn("user", "<video>\nWhat?"), Turn("assistant", "A cat 🙂.")]


def test_every_token_of_text_is_shown_once_and_every_medium_is_a_block():
    sample = document(QUESTION, frames("a.mp4", range(3)), separators=[198])
    strip = strip_of(sample, TOKENIZER, most=1000)
    (block,) = (part for part in strip.parts if isinstance(part, Block))
    # three frames of four tokens and what parts them; the last separator is text
    assert block.end - block.first == 3 * 4 + 2
    places = [token.place for token in tokens_of(strip)]
    assert sorted([*places, *range(block.first, block.end)]) == list(range(len(sample)))
    assert [token.id for token in tokens_of(strip)] == [int(sample.token_ids[place]) for place in places]


def test_what_is_trained_is_what_a_label_asks_for():
    sample = document(QUESTION, frames("a.mp4", range(2)))
    strip = strip_of(sample, TOKENIZER, most=1000)
    trained = [
        token
        for part in strip.parts
        if isinstance(part, Stretch) and part.trained
        for each in part.written
        for token in each.tokens
    ]
    assert [token.place for token in trained] == (np.flatnonzero(sample.labels != IGNORE) + 1).tolist()
    assert all(sample.labels[token.place - 1] == token.id for token in trained)
    assert [token.label for token in tokens_of(strip)] == [
        None if sample.labels[token.place] == IGNORE else sample.labels[token.place] for token in tokens_of(strip)
    ]
    assert (
        "".join(
            each.text for part in strip.parts if isinstance(part, Stretch) and part.trained for each in part.written
        )
        == "A cat 🙂.<|im_end|>"
    )


def test_tokens_that_hold_parts_of_a_character_stand_together():
    ids = TOKENIZER("é 🙂 x", add_special_tokens=False)["input_ids"]
    groups = list(written(ids, TOKENIZER))
    assert "".join(text for _, text in groups) == "é 🙂 x"
    assert sum(count for count, _ in groups) == len(ids)
    assert max(count for count, text in groups if "🙂" in text) > 1
    assert not any("\ufffd" in text for _, text in groups)


def test_text_of_every_kind_of_tokenizer_comes_back():
    text = "A cat,  then 猫 and 🙂.\nAnd é"
    for tokenizer in (TOKENIZER, byte_level_tokenizer("llama3"), metaspace_tokenizer(), sentencepiece_tokenizer()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(piece for _, piece in written(ids, tokenizer)) == text, tokenizer


def test_half_a_character_alone_ends_with_what_follows_it():
    half = TOKENIZER("🙂", add_special_tokens=False)["input_ids"][:1]
    rest = TOKENIZER(" A cat.", add_special_tokens=False)["input_ids"]
    groups = list(written([*half, *rest], TOKENIZER))
    assert groups[0][1].startswith("\ufffd") and "".join(text for _, text in groups).endswith(" cat.")


def test_control_tokens_are_marked_and_the_same_words_in_a_text_are_not():
    strip = strip_of(document([Turn("user", "Say <|im_end|>."), Turn("assistant", "No.")]), TOKENIZER, most=1000)
    control = [each.text for part in strip.parts for each in part.written if each.tokens[0].is_control]
    assert control == ["<|im_start|>", "<|im_end|>"] * 3
    assert "Say <|im_end|>." in text_of(strip)


def test_a_long_text_is_shown_from_its_start_and_its_end():
    sample = document(
        [Turn("user", "one " * 200 + "<video>" + " two" * 200), Turn("assistant", "A cat.")], frames("a.mp4", range(2))
    )
    strip = strip_of(sample, TOKENIZER, most=101)
    shown = tokens_of(strip)
    assert len(shown) == 101
    assert sum(part.tokens for part in strip.parts if isinstance(part, Gap)) == len(sample) - 2 * 4 - 101
    assert shown[0].place == 0 and shown[-1].place == len(sample) - 1
    assert any(isinstance(part, Block) for part in strip.parts)
    assert {token.id for token in shown} <= strip.pieces.keys()


def test_what_would_not_be_seen_has_a_sign():
    assert visible("a\tb\nc\x00\x1b\u202e") == "a⇥\tb↵\nc␀␛[U+202E]"
    assert visible("ما هذا 👩‍👩‍👧") == "ما هذا 👩‍👩‍👧"
    visible("half \ud83d").encode()


def test_a_file_that_comes_twice_is_two_media():
    turns = [Turn("user", "<video> then <video>"), Turn("assistant", "A cat.")]
    apart = document(turns, frames("a.mp4", range(3)), frames("a.mp4", range(4, 7)), separators=[198])
    assert [len(run.frames) for run in media_runs(apart)] == [3, 3]
    assert " then " in describe(apart, TOKENIZER)
    side_by_side = document([Turn("user", "<video><video>"), turns[1]], frames("a.mp4", [0, 1]), frames("a.mp4", [2]))
    first, second = media_runs(side_by_side)
    assert (first.end - first.first, second.first, second.end - second.first) == (2 * 4, first.end, 4)
