"""Where media stand in a conversation, against what VILA's own code makes of the same record."""

import pytest

from megatron_vila.config.text_rules import MEDIA_FORMATS
from megatron_vila.data.chat import ChatEncoder, assemble
from megatron_vila.data.formats.read import parse_record
from megatron_vila.data.placement import (
    MARKER,
    PlacementError,
    Turn,
    escape,
    place_media,
    unescape,
)
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import MEDIA_TOKEN, FrameRef
from tests.data.material import byte_level_tokenizer
from tests.data.placement_cases import RECORDS

every_rule = pytest.mark.parametrize("rule", MEDIA_FORMATS)


def official(record):
    """The texts of a record's turns by ``LLaVADataset`` of VILA's main branch, written anew from its source."""
    texts = [turn["value"] for turn in record["conversations"] if turn["from"] != "system"]
    for token in ("<image>", "<video>"):
        texts = [t.replace(token + "\n", "").replace("\n" + token, "").replace(token, "") for t in texts]
    images, videos = (
        len([value] if isinstance(value, str) else value)
        for value in (record.get("image", []), record.get("video", []))
    )
    texts = [text.strip() for text in texts]
    return ["<image>" * images + "<video>" * videos + texts[0], *texts[1:]]


def placed(record, rule):
    return [turn.text for turn in parse_record(record, "here", "id", "", rule).turns if turn.role != "system"]


@pytest.mark.parametrize("name", [name for name in RECORDS if "word" not in name and "escape" not in name])
def test_media_stand_where_the_official_code_puts_them_and_its_text_is_left(name):
    assert placed(RECORDS[name], "vila") == official(RECORDS[name])


def shown(question, answer="A cat.", images=0, videos=0, rule="vila"):
    """The tokens of one conversation as text: <M> for a picture, a line break after each, three frames for a video."""
    tokenizer = byte_level_tokenizer("qwen2")
    turns, markers = place_media([Turn("user", question), Turn("assistant", answer)], images, videos, rule)
    (newline,) = tokenizer("\n")["input_ids"]
    pictures = [
        tuple(FrameRef("m", (i,), marker == "<video>", Unit(1, 1, 1, 1)) for i in range(3 if marker == "<video>" else 1))
        for marker in markers
    ]
    document = assemble(ChatEncoder(tokenizer).encode(turns), pictures, [newline], [newline], "s")
    text = "".join("<M>" if i == MEDIA_TOKEN else tokenizer.decode([i]) for i in document.token_ids.tolist())
    return text.partition("<|im_start|>user\n")[2].partition("<|im_end|>\n<|im_start|>assistant\n")


def test_the_usual_records_give_the_official_tokens():
    assert shown("<video>\nWhat is shown?", videos=1)[0] == "<M>\n<M>\n<M>\nWhat is shown?"
    assert shown("<image>\n<image>\nCompare.", images=2)[0] == "<M>\n<M>\nCompare."
    assert shown("What is shown?\n<video>", videos=1)[0] == "<M>\n<M>\n<M>\nWhat is shown?"
    assert shown("<video>\nWhat is shown?", " A cat. ", videos=1)[2] == "A cat.<|im_end|>\n"


def test_verbatim_leaves_every_character_and_each_medium_at_its_marker():
    assert shown("<video>\nWhat is shown?", " A cat. ", videos=1, rule="verbatim") == (
        "<M>\n<M>\n<M>\n\nWhat is shown?", "<|im_end|>\n<|im_start|>assistant\n", " A cat. <|im_end|>\n"
    )  # fmt: skip
    assert shown("One <image>, two <image>?", images=2, rule="verbatim")[0] == "One <M>\n, two <M>\n?"
    assert placed(RECORDS["video before image"], "verbatim")[0] == "Look: <video>\nand <image>"
    assert placed(RECORDS["several files and one marker"], "verbatim")[0] == "<image><image>\nCompare."
    assert placed(RECORDS["no marker"], "verbatim")[0] == "<image><video>What?\n\nSay it."


def test_media_come_in_the_order_of_their_markers():
    record = RECORDS["video before image"]
    for rule, kinds in (("vila", [False, True]), ("verbatim", [True, False])):
        assert [medium.is_video for medium in parse_record(record, "here", "id", "", rule).media] == kinds


@every_rule
def test_words_are_text_where_they_are_escaped_in_answers_and_without_media(rule):
    question, _, answer = shown(
        "<video>\nIs \\<video> said, or \\<image>?", "A \\<video>, a <video>.", videos=1, rule=rule
    )
    assert question.endswith("\nIs <video> said, or <image>?")
    assert answer == "A \\<video>, a <video>.<|im_end|>\n"
    assert shown("What is a <video> tag?", "The <video> element.", rule=rule)[::2] == (
        "What is a <video> tag?",
        "The <video> element.<|im_end|>\n",
    )
    assert shown("\\<video>\n<source>, \\\\<image>, <image>!", rule=rule)[0] == "<video>\n<source>, \\<image>, <image>!"


@every_rule
@pytest.mark.parametrize("name", RECORDS)
def test_placing_twice_changes_nothing(name, rule):
    record = parse_record(RECORDS[name], "here", "id", "", rule)
    images = sum(not medium.is_video for medium in record.media)
    turns, markers = place_media(record.turns, images, len(record.media) - images, rule)
    assert turns == record.turns
    assert markers == tuple(m for turn in turns if turn.role == "user" for m in MARKER.findall(turn.text))


def test_what_is_escaped_comes_back():
    for text in ("a <video>", "a \\<video> b", "\\\\<image><video>"):
        assert unescape(escape(text)) == text
        assert not MARKER.search(escape(text))


@every_rule
@pytest.mark.parametrize(
    ("question", "files", "complaint"),
    [
        ("<video>\nWhat?", {}, "a marker stands for a file, and none is given; add the file, or write \\<video>"),
        ("What?\n <image> \n", {}, "none is given"),
        ("<video>", {"video": ""}, "none is given"),
        ("<video>\nWhat is a <video> tag?", {"video": "a.mp4"}, "2 markers"),
        ("Is <image> like <image>?", {"image": "a.png"}, "2 markers"),
        ("What is \ufdd2?", {}, "U+FDD2, which is not a character"),
    ],
)
def test_markers_that_do_not_fit_are_refused_with_both_cures(question, files, complaint, rule):
    turns = [Turn("user", question), Turn("assistant", "x")]
    with pytest.raises(PlacementError) as error:
        place_media(turns, "image" in files, bool(files.get("video")), rule)
    assert complaint in str(error.value)


def test_markers_beyond_the_files_are_taken_out_where_they_stand_alone():
    assert shown("<video>\n<video>\nWhat?\n<image>", videos=1)[0] == "<M>\n<M>\n<M>\nWhat?"


@every_rule
@pytest.mark.parametrize(
    ("question", "videos"),
    [(" " * 10**6 + "x", 0), ("a\n<video>" + " " * 10**6 + "x", 0), ("<video>\n" + "<video>" * 10**5 + " x", 1)],
    ids=["spaces", "spaces behind a marker", "markers in a line"],
)
def test_long_runs_cost_no_more_than_their_length(question, videos, rule):
    if videos and rule == "verbatim":
        with pytest.raises(PlacementError, match="100001 markers"):
            place_media([Turn("user", question)], 0, videos, rule)
    else:
        turns, _ = place_media([Turn("user", question)], 0, videos, rule)  # days where time grows with the square
        assert turns[0].text.endswith("x")


def test_media_need_a_human_turn():
    with pytest.raises(PlacementError, match="no human turn to put them before"):
        place_media([Turn("assistant", "x")], 1, 0, "vila")
