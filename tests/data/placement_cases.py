"""Conversations with media in every place, for training and for the processor alike."""

from __future__ import annotations

from tests.data.material import conversation

IMAGE, CLEAR, LONG, SHORT = "wide.png", "clear.png", "long.mp4", "short.mp4"

RECORDS = {
    "no media": {"conversations": conversation(" What? ", " This. ")},
    "marker first": {"video": LONG, "conversations": conversation("<video>\nWhat is shown?", " A cat. ")},
    "marker last": {"video": LONG, "conversations": conversation("What is shown?\n<video>")},
    "marker amid a line": {"image": IMAGE, "conversations": conversation("Is <image> a cat?")},
    "marker between lines": {"image": IMAGE, "conversations": conversation("Look:\n<image>\nA cat?")},
    "marker before a line": {"image": IMAGE, "conversations": conversation("Look.\n<image> A cat?")},
    "no marker": {"image": IMAGE, "video": SHORT, "conversations": conversation("What?\n\nSay it.")},
    "two images": {"image": [IMAGE, CLEAR], "conversations": conversation("<image>\n<image>\nCompare.")},
    "two images in a sentence": {
        "image": [IMAGE, CLEAR],
        "conversations": conversation("One <image>, two <image>: which?"),
    },
    "several files and one marker": {"image": [IMAGE, CLEAR], "conversations": conversation("<image>\nCompare.")},
    "videos called images": {"video": [SHORT, LONG], "conversations": conversation("<image><image>\nWhich?")},
    "video before image": {
        "image": CLEAR,
        "video": SHORT,
        "conversations": [
            {"from": "system", "value": " Be brief.\n"},
            *conversation("Look: <video>\nand <image>"),
            *conversation("And now?", "The same.\n"),
        ],
    },
    "media in later turns": {
        "image": [IMAGE, CLEAR],
        "conversations": [
            *conversation("Hello.", "Hi."),
            *conversation("<image>\nWhat?"),
            *conversation("And <image>?"),
        ],
    },
    "white space around": {
        "image": IMAGE,
        "conversations": conversation(" \n <image> \n\n What is it?  \n", "\tA.\n\n"),
    },
    "carriage returns": {"image": IMAGE, "conversations": conversation("<image>\r\nWhat?\r\nSay it.\r\n", "A.\r\n")},
    "nothing but a marker": {"image": IMAGE, "conversations": conversation("<image>")},
    "words escaped": {
        "video": SHORT,
        "conversations": conversation("<video>\nIs \\<video> said, or \\<image>?", "A \\<video>."),
    },
    "words in answers": {
        "video": SHORT,
        "conversations": conversation("<video>\nWhich tag?", "She adds a <video> tag."),
    },
    "words in a system text": {
        "video": SHORT,
        "conversations": [{"from": "system", "value": "Speak of <image> tags."}, *conversation("<video>\nWhat?")],
    },
    "words without media": {"conversations": conversation("What is a <video> tag?", "The <video> element.\n<image>")},
    "escapes without media": {"conversations": conversation("\\<video>\n<source>\n</video>: \\\\<image>, <image>")},
}
"""Records of which every rule makes a sample; their media are those of ``tests/hf/test_processing.py``."""
