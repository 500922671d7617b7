"""Records of every public shape: each becomes the record that its LLaVA form is, or is refused with a cure."""

import base64

import pytest

from megatron_vila.config.text_rules import MEDIA_FORMATS
from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.formats.read import parse_record, record_of
from megatron_vila.data.placement import Turn
from megatron_vila.data.records import RecordRules

DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def read(record, rule="vila"):
    return parse_record(record, "a.jsonl, line 1", "a.jsonl#1", "/m", rule)


def says(*turns):
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": roles[role], "value": text} for role, text in turns]}


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def text(words):
    return {"type": "text", "text": words}


# What is written, and the same in LLaVA form.
SHAPES = {
    "ms-swift: markers in the text": (
        messages(("system", "Be brief."), ("user", "<image>What? <video>And?"), ("assistant", "A cat."))
        | {"images": ["a.png"], "videos": ["b.mp4"]},
        says(("system", "Be brief."), ("user", "<image>What? <video>And?"), ("assistant", "A cat."))
        | {"image": "a.png", "video": "b.mp4"},
    ),
    "ms-swift: media in a later turn": (
        messages(("user", "Hello"), ("assistant", "Hi"), ("user", "<image>\nWhat?"), ("assistant", "A cat."))
        | {"images": ["a.png"]},
        says(("user", "Hello"), ("assistant", "Hi"), ("user", "<image>\nWhat?"), ("assistant", "A cat."))
        | {"image": ["a.png"]},
    ),
    "ms-swift: a system text beside the messages": (
        messages(("user", "Hello"), ("assistant", "Hi")) | {"system": "Be brief."},
        says(("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi")),
    ),
    "ms-swift: an object for question and answer": (
        {"system": "S", "conversation": [{"human": "One?", "assistant": "1"}, {"human": "Two?", "assistant": "2"}]},
        says(("system", "S"), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")),
    ),
    "ShareGPT: a system turn and names of speakers": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"}, {"from": "bing", "value": "A"}]},
        says(("system", "S"), ("user", "Q"), ("assistant", "A")),
    ),
    "Qwen: parts": (
        messages(
            ("system", [text("Be brief.")]),
            ("user", [{"type": "image", "image": "file:///m/a.png", "max_pixels": 50176}, text("What?")]),
            ("assistant", [text("A "), text("cat.")]),
            ("user", [text("And here?"), {"type": "video", "video": "b.mp4", "fps": 1.0, "video_start": 2, "video_end": 5.5}]),
            ("assistant", "A dog."),
        ),
        says(
            ("system", "Be brief."), ("user", "<image>What?"), ("assistant", "A cat."), ("user", "And here?<video>"),
            ("assistant", "A dog."),
        )
        | {"image": "a.png", "video": "b.mp4", "start": 2, "end": 5.5},
    ),
    "Qwen: a video of pictures": (
        messages(
            ("user", [{"type": "video", "video": ["f/1.jpg", "f/2.jpg"], "sample_fps": 2.0}, text("What?")]), ("assistant", "A")
        ),
        says(("user", "<video>What?"), ("assistant", "A")) | {"video": ["f/1.jpg", "f/2.jpg"], "fps": 2},
    ),
    "Qwen: media fields that a table fills with nothing": (
        messages(
            ("user", [
                {"type": "image", "image": "a.png", "text": None, "video": None, "index": 0},
                {"type": "text", "text": "What?", "image": None, "video": None, "index": None},
            ]),
            ("assistant", [{"type": "text", "text": "A", "image": None}]),
        ),
        says(("user", "<image>What?"), ("assistant", "A")) | {"image": "a.png"},
    ),
    "transformers: parts stand for the files of the record": (
        messages(("user", [{"type": "image"}, text("or"), {"type": "image"}, text("?")]), ("assistant", "A"))
        | {"images": ["a.png", "b.png"]},
        says(("user", "<image>or<image>?"), ("assistant", "A")) | {"image": ["a.png", "b.png"]},
    ),
    "parts of text alone leave the markers to the files of the record": (
        messages(("user", [text("<image>"), text("What?")]), ("assistant", "A")) | {"images": ["a.png"]},
        says(("user", "<image>What?"), ("assistant", "A")) | {"image": "a.png"},
    ),
    "OpenAI: addresses of files": (
        messages(
            ("developer", "S"),
            ("user", [text("What?"), {"type": "image_url", "image_url": {"url": "file:///m/a.png", "detail": "low"}}]),
            ("assistant", "A"),
            ("user", [{"type": "video_url", "video_url": {"url": "b.mp4"}}, {"type": "input_text", "text": "And?"}]),
            ("assistant", [{"type": "output_text", "text": "B"}]),
        ),
        says(("system", "S"), ("user", "What?<image>"), ("assistant", "A"), ("user", "<video>And?"), ("assistant", "B"))
        | {"image": "a.png", "video": "b.mp4"},
    ),
    "markers in the text of parts are words": (
        messages(("user", [{"type": "image", "image": "a.png"}, text("Is <image> a tag?")]), ("assistant", "<image> is")),
        says(("user", "<image>Is \\<image> a tag?"), ("assistant", "<image> is")) | {"image": "a.png"},
    ),
    "ms-swift: query, response and history": (
        {"system": "S", "query": "<image>And?", "response": "B", "history": [["Q", "A"]], "images": ["a.png"]},
        says(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "<image>And?"), ("assistant", "B"))
        | {"image": "a.png"},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        says(("user", "Add.\n1, 2"), ("assistant", "3")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", MEDIA_FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_gives_the_same_record_in_every_shape(name, rule):
    written, llava = SHAPES[name]
    assert read({"id": 7} | written, rule) == read({"id": 7} | llava, rule)


OBELICS = {"texts": [None, "A <image> cat.", "It sleeps.", None], "images": ["a.png", None, None, "b.png"]}
MMC4 = {
    "text_list": ["Intro.", "A cat.", "A dog."],
    "image_info": [
        {"image_name": "dog.png", "matched_text_index": 2, "matched_sim": 0.3, "raw_url": "http://x.y/dog.jpg"},
        {"image_name": "cat.png", "matched_text_index": 1, "face_detections": None},
    ],
    "similarity_matrix": [[0.1, 0.2, 0.3]] * 2,
    "url": "http://x.y/pets.jpg",
}


@pytest.mark.parametrize("rule", MEDIA_FORMATS)
@pytest.mark.parametrize(
    ("record", "document", "media"),
    [
        ({"text": " As it is.\n"}, " As it is.\n", []),
        ({"text": "The <video> tag.", "url": "http://a.b"}, "The \\<video> tag.", []),
        ({"text": "One <image> and <image>.", "images": ["a.png", "b.png"]}, "One <image> and <image>.", ["a.png", "b.png"]),
        ({"text": "A cat.", "image": "a.png"}, "<image>A cat.", ["a.png"]),
        ({"text": "A cat.", "image": "a.png", "url": "http://x.y/a.jpg"}, "<image>A cat.", ["a.png"]),
        ({"caption": "A man runs.", "video": "b.mp4", "duration": 3.5}, "<video>A man runs.", ["b.mp4"]),
        ({"messages": [{"role": "assistant", "content": "I love music"}]}, "I love music", []),
        (
            {"messages": [{"role": "assistant", "content": "<image>is a puppy"}], "images": ["a.png"]},
            "<image>is a puppy",
            ["a.png"],
        ),
        (MMC4, "Intro.<image>A cat.<image>A dog.", ["cat.png", "dog.png"]),
        (MMC4 | {"image_info": []}, "Intro. A cat. A dog.", []),
        (OBELICS, "<image>A \\<image> cat.\n\nIt sleeps.<image>", ["a.png", "b.png"]),
    ],
)
def test_texts_captions_and_pictures_among_text_become_a_document(record, document, media, rule):
    found = read(record, rule)
    assert found.turns == (Turn("document", document),)
    assert [medium.path for medium in found.media] == [f"/m/{name}" for name in media]
    again = {"text": document, **{("video" if m.is_video else "image"): m.path for m in found.media[:1]}}
    if len(media) < 2:
        assert read(again, rule)[1:] == found[1:], "a record that is written again is the same"


def test_pictures_in_data_addresses_become_bytes():
    address = "data:image/png;base64," + base64.b64encode(DOT).decode()
    part = {"type": "image_url", "image_url": {"url": address}}
    record = read(messages(("user", [part, {"type": "input_image", "image_url": address}]), ("assistant", "A")))
    assert record.media == (Media(DOT, False), Media(DOT, False))
    assert read(messages(("user", "<image>"), ("assistant", "A")) | {"images": [address]}).media == (Media(DOT, False),)
    frames = read(messages(("user", "<video>"), ("assistant", "A")) | {"videos": [[address, address]]}).media
    assert frames == (Media(DOT, True, pictures=(DOT, DOT)),)


def test_files_and_bytes_of_a_table_are_read():
    listed = {"images": [{"bytes": DOT, "path": "a.png"}, {"bytes": None, "path": "b.png"}]}
    record = read(messages(("user", "<image><image>"), ("assistant", "A")) | listed)
    assert record.media == (Media(DOT, False), Media("/m/b.png", False))


ASKED = [{"role": "user", "content": "Q"}]
TALK = messages(("user", "Q"), ("assistant", "A"))
IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": []}, "field 'messages': must be a list of turns"),
        ({"question": "Q", "id": 1}, "nothing to train"),
        (TALK | says(("user", "Q")), "field 'messages': the record has 'conversations' as well"),
        ({"messages": [{"role": "user"}]}, "turn 1: 'content' must be text, found None"),
        ({"messages": [{"content": "x"}]}, "turn 1: must be an object with 'from' and 'value', or with 'role'"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}]}, "turn 2: a system turn"),
        ({"conversations": [{"from": "human", "value": [text("Q")]}]}, "turn 1: 'value' must be text"),
        ({"conversation": [{"human": "Q", "robot": "A"}]}, "turn 1: must be an object with"),
        ({"conversation": [{"human": "Q", "assistant": None}]}, "turn 1: 'assistant' must be text, found None"),
        (messages(("user", ["Q"])), "turn 1, part 1: must be an object with a 'type', found 'Q'"),
        (messages(("user", [{"type": "audio", "audio": "a.wav"}])), "part 1: 'type' must be one of text, input_text"),
        (messages(("user", [{"type": "text"}])), "part 1: 'text' must be text, found None"),
        (messages(("user", [{"type": "text", "text": "\ud83d"}])), r"part 1: \ud83d is half of a character"),
        (messages(("user", [{"type": "text", "text": "Q", "audio": "a.wav"}])), "part 1, field 'audio': holds the media"),
        (messages(("user", [IMAGE | {"image_url": "b.png"}])), "names its file in 'image' and in 'image_url'"),
        (messages(("user", [{"type": "image", "image": "b.mp4"}])), "'/m/b.mp4' is a video by its name"),
        (messages(("user", [{"type": "video", "video": ["a.mp4", "b.mp4"]}])), "part 1: names 2 files"),
        (messages(("user", [IMAGE])) | {"images": ["b.png"]}, "1 of 1 parts of the type image name their file, and the"),
        (messages(("user", [IMAGE, {"type": "image"}])), "1 of 2 parts of the type image name their file"),
        (messages(("user", [{"type": "image"}] * 2)) | {"images": ["b.png"]}, "2 parts of the type image for 1 files"),
        (messages(("user", [IMAGE])) | {"videos": ["b.mp4"]}, "0 parts of the type video for 1 files"),
        (messages(("user", "Q"), ("assistant", [IMAGE])), "turn 2: media in a turn of the role assistant"),
        (messages(("user", "Q"), ("tool", "{}")), "turn 2: 'role' is tool; calls of tools are not trained"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [1]}]}, "turn 2, field 'tool_calls'"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "A", "loss": False}]}, "turn 2, field 'loss': leaves"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "A", "weight": 0}]}, "turn 2, field 'weight': leaves"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "A", "reasoning_content": "B"}]}, "'reasoning_content'"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "A", "audio": {"id": "x"}}]}, "field 'audio': looks like"),
        (TALK | {"rejected_response": "B"}, "field 'rejected_response': belongs to a pair"),
        (TALK | {"tools": '[{"type": "function"}]'}, "field 'tools': defines tools"),
        (TALK | {"label": False}, "field 'label': says whether the answer is wanted"),
        (TALK | {"audios": ["a.wav"]}, "field 'audios': holds the media file 'a.wav'"),
        (TALK | {"sound": {"bytes": b"RIFF"}}, "field 'sound': holds the media file b'RIFF'"),
        (TALK | {"note": "data:image/png;base64,AAAA"}, "field 'note': holds the media file 'data:image"),
        (messages(("user", "<bbox>")) | {"objects": {"bbox": [[1, 2]]}}, "field 'objects': is what <bbox> and <ref-"),
        (TALK | {"images": ["https://a.b/c.png"]}, "'https://a.b/c.png' is an address (https) and nothing is downloaded"),
        (TALK | {"videos": ["s3://a/c.mp4"]}, "'s3://a/c.mp4' is an address (s3)"),
        (TALK | {"images": ["data:image/png;base64,?"]}, "is not base64"),
        (TALK | {"images": ["data:text/plain,x"]}, "is a data: address of another kind"),
        (TALK | {"videos": ["data:video/jpeg;base64,AAAA,AAAA"]}, "holds several pictures in one data: address"),
    ],
)
def test_what_cannot_be_used_is_named_by_place_and_field(record, complaint):
    with pytest.raises(RecordError) as error:
        read(record)
    assert str(error.value).startswith("a.jsonl, line 1")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"text": ""}, "field 'text': is empty, so nothing is learned"),
        ({"text": None, "video": "a.mp4"}, "field 'text': must be one text, found None"),
        ({"caption": " ", "video": "a.mp4"}, "field 'caption': is empty"),
        ({"caption": ["A", "B"], "video": "a.mp4"}, "field 'caption': must be one text, found ['A', 'B']"),
        ({"caption": "A cat."}, "field 'caption': a caption needs its 'image' or 'video'"),
        ({"caption": "A", "text": "B", "image": "a.png"}, "field 'caption': the record has 'text' as well"),
        ({"text": [151643, 9707]}, "field 'text': is a list of token ids"),
        ({"text": "A", "system": "S"}, "field 'text': a text that is trained as a whole has no system turn"),
        ({"text": "A cat.", "url": "http://a.b/c.jpg"}, "field 'url': holds the media file"),
        ({"text": "<image> <image>", "image": "a.png"}, "2 markers <image> for 1 files"),
        ({"text": "<image>\nA cat."}, "a marker stands for a file, and none is given"),
        ({"text": "\ud83d"}, r"field 'text': \ud83d is half of a character"),
        ({"query": "Q"}, "field 'response': must be text, found None"),
        ({"query": "Q", "response": "A", "history": [["Q"]]}, "field 'history', round 1: must be a list of a question"),
        ({"query": "Q", "response": "A", "history": "Q"}, "field 'history': must be a list of questions"),
        ({"query": "Q", "response": "A", "rejected_response": "B"}, "field 'rejected_response': belongs to a pair"),
        (MMC4 | {"image_info": [{"image_name": "a.png", "matched_text_index": 3}]}, "must be the number of a sentence, 0 to 2"),
        (MMC4 | {"image_info": [{"raw_url": "http://x.y", "matched_text_index": 0}]}, "image 1: has no 'image_name' and no"),
        (MMC4 | {"image_info": [{"image_base64": "?", "matched_text_index": 0}]}, "'image_base64' is not base64"),
        (MMC4 | {"text_list": "A"}, "field 'text_list': must be a list, found 'A'"),
        (MMC4 | {"text_list": ["", " "], "image_info": []}, "field 'text_list': holds no text to learn"),
        (OBELICS | {"images": ["a.png"]}, "4 texts and 1 images; both lists have one entry"),
        ({"texts": ["A", None], "images": [None, None]}, "block 2: must have a text or an image"),
        (OBELICS | {"video": "a.mp4"}, "field 'texts': the record has media beside those of its text"),
        ({"texts": [None], "images": ["http://a.b/c.png"]}, "is an address (http) and nothing is downloaded"),
    ],
)  # fmt: skip
def test_a_document_that_cannot_be_used_is_named_by_place_and_field(record, complaint):
    with pytest.raises(RecordError) as error:
        read(record)
    assert str(error.value).startswith("a.jsonl, line 1")
    assert complaint in str(error.value)


def test_a_conversation_comes_before_a_text_beside_it():
    assert read(TALK | {"text": "x", "caption": "y", "query": "z"}) == read(TALK)


def test_fields_that_say_nothing_do_no_harm():
    empty = {"tools": "[]", "objects": {}, "rejected_response": "", "label": "yes", "audios": [], "bbox": [1, 2, 3, 4]}
    assert read(TALK | empty) == read(TALK)
    weighed = {"messages": [*ASKED, {"role": "assistant", "content": "A", "weight": 1, "tool_calls": None, "name": "x"}]}
    assert read(weighed) == read(TALK)


def test_ignored_fields_are_not_looked_at_in_records_turns_and_parts():
    part = text("Q") | {"audio": "a.wav"}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A", "tool_calls": [1]}]}
    rules = RecordRules("/m", ignore_fields=frozenset({"audio", "tool_calls", "rejected", "text"}))
    assert record_of(record | {"rejected": "B"}, "x", "1", rules).turns == (Turn("user", "Q"), Turn("assistant", "A"))
