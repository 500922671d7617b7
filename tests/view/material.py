"""A small set with samples of every fate, and the command that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vila.explain.view.command import main
from tests.data.material import byte_level_tokenizer, conversation, destroy_frames, write_jsonl, write_video

HOSTILE = "</i></script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
ARABIC = "ما هذا؟"
TURNED = "turned \u202eback"
PLAIN, MIXED, GONE, RECORD, LONG, SILENT, DESTROYED, TWICE = range(8)
SETTINGS = (
    *("tiny", "data.num_frames=8", "model.llm.vocab_size=1000", "data.media_format=verbatim"),
    *("train.seq_length=512", "data.frame_separator_ids=[198]"),
)


def write_set(folder: Path) -> Path:
    """``samples.jsonl``, ``eval.jsonl``, their media and ``tokenizer`` in ``folder``."""
    write_video(folder / "good.mp4", 32)
    destroy_frames(write_video(folder / "bad.mp4", 32), 14, 18)
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(folder / "wide.png")
    byte_level_tokenizer("qwen2").save_pretrained(folder / "tokenizer")
    good = {"video": "good.mp4", "conversations": conversation("<video>\nWhat?", "A cat.")}
    records = {
        PLAIN: good | {"id": "plain"},
        MIXED: {
            "id": HOSTILE,
            "image": "wide.png",
            "conversations": conversation(f"<image>{HOSTILE} {ARABIC} {TURNED}", "🙂!"),
        },
        GONE: good | {"id": "gone", "video": "gone.mp4"},
        RECORD: {"id": "record", "video": "good.mp4"},
        LONG: {"id": "long", "conversations": conversation("word " * 600, "A cat.")},
        SILENT: {"id": "silent", "conversations": conversation("What?")[:1]},
        DESTROYED: good | {"id": "destroyed", "video": "bad.mp4"},
        TWICE: {
            "id": "twice",
            "video": ["good.mp4", "good.mp4"],
            "start": [0, 2],
            "end": [1, 3],
            "conversations": conversation("<video> then <video> What changed?", "A lot."),
        },
    }
    write_jsonl(folder / "samples.jsonl", [records[place] for place in sorted(records)])
    write_jsonl(folder / "eval.jsonl", [good | {"id": "held out"}])
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.train=[{folder / 'samples.jsonl'}]", f"data.tokenizer={folder / 'tokenizer'}", *more]


def show(folder: Path, out: Path, *arguments: str) -> int:
    return main([*settings(folder), *arguments, "--out", str(out)])
