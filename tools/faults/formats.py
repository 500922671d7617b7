"""Faults of the shapes of records and of the sets that keep them."""

from .fault import Fault

SHAPES = ("tests/data/test_shapes.py",)
CONTAINERS = ("tests/data/test_containers.py",)

FAULTS = [
    Fault(
        "a word in the text of a part is taken for a medium",
        "megatron_vila/data/formats/conversation.py",
        "hide = escape if role in MARKED else str",
        "hide = str",
        SHAPES,
    ),
    Fault(
        "media in an answer are moved to the question",
        "megatron_vila/data/formats/conversation.py",
        'if role != "user" and any(part.kind in KINDS for part in parts):',
        "if False:",
        SHAPES,
    ),
    Fault(
        "media of parts and of the record need not agree",
        "megatron_vila/data/formats/conversation.py",
        "if own and (listed or len(own) < len(places)):",
        "if False:",
        SHAPES,
    ),
    Fault(
        "an unwanted answer is trained",
        "megatron_vila/data/formats/unfit.py",
        "unfit = isinstance(value, bool)",
        "unfit = False",
        SHAPES,
    ),
    Fault(
        "an address is taken for a path",
        "megatron_vila/data/addresses.py",
        "if not value.startswith(_FILE):",
        "if False:",
        SHAPES,
    ),
    Fault(
        "the images of a document have the order of the list",
        "megatron_vila/data/formats/document.py",
        "[image for images in before for image in images]",
        "[image for images in reversed(before) for image in images]",
        SHAPES,
    ),
    Fault(
        "the end of a document is not learned",
        "megatron_vila/data/chat.py",
        "dtype=np.int64), np.ones(1, dtype=bool))",
        "dtype=np.int64), np.zeros(1, dtype=bool))",
        ("tests/data/test_chat.py",),
    ),
    Fault(
        "media of a document move before its text",
        "megatron_vila/data/placement.py",
        'moves = rule == "vila" and DOCUMENT not in roles',
        'moves = rule == "vila"',
        SHAPES,
    ),
    Fault(
        "a row of another row group is given",
        "megatron_vila/data/containers/parquet.py",
        "if self._kept[0] != number:",
        "if self._kept[0] < 0:",
        ("tests/data/test_parquet.py",),
    ),
    Fault(
        "notes beside a caption are taken for its record",
        "megatron_vila/data/formats/read.py",
        "if caption is None or content.keys() & FIELDS - set(document.WRITTEN):",
        "if caption is None or content:",
        CONTAINERS,
    ),
    Fault(
        "a folder that may be several things is taken for the first",
        "megatron_vila/data/formats/detect.py",
        "if len(found) == 1:",
        "if found:",
        CONTAINERS,
    ),
]
