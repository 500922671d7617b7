"""What the user decides about a preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import av
import PIL

from megatron_vila.errors import SettingError

POOR = ("report", "original")
"""What becomes of a video that the encoder did not render well enough: it is only told, or its file is taken as it is."""

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


_OTHERWISE = {"shard_bytes": "--shard-mib", "parts": "the number of parts"}


@dataclass(frozen=True)
class Options:
    """What becomes of media, and how shards are cut.

    ``short_side`` and ``picture_side`` are pixels, of a video's short side and a picture's long one; ``fps`` frames of a second
    of video (0: every frame); ``key_distance`` frames from one key frame to the next; ``crf`` x264's quality (smaller is
    better) and ``preset`` its speed; ``min_psnr`` dB that the worst of the frames that are checked must reach, and ``poor`` what
    follows if not; ``picture_quality`` that of JPEG; ``shard_bytes`` the largest shard; ``parts`` the tasks that share the work.

    Raises ``SettingError`` for a value that cannot be used.
    """

    short_side: int = 384
    fps: float = 2.0
    key_distance: int = 1
    crf: int = 20
    preset: str = "veryfast"
    min_psnr: float = 30.0
    poor: str = "report"
    picture_side: int = 2048
    picture_quality: int = 95
    shard_bytes: int = 2**29
    parts: int = 1

    def __post_init__(self) -> None:
        bounds = {
            "short_side": (16, 4096), "fps": (0, 1000), "key_distance": (1, 10_000), "crf": (0, 51), "min_psnr": (0, 100),
            "picture_side": (16, 65_535), "picture_quality": (1, 100), "shard_bytes": (1, 2**40), "parts": (1, 99_999),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise SettingError(f"{option(name)} {given(name, getattr(self, name))} is out of range; use {least} to {most}")
        for name, known in (("poor", POOR), ("preset", PRESETS)):
            if getattr(self, name) not in known:
                raise SettingError(f"{option(name)} {getattr(self, name)} is unknown; use one of {', '.join(known)}")

    def difference(self, other: dict[str, Any]) -> str:
        """The options in which ``other``, from the plan of a preparation, differs: "" if there is none."""
        mine = asdict(self)
        return ", ".join(
            f"{option(name)} {given(name, other.get(name))} (now {given(name, mine[name])})"
            for name in mine
            if other.get(name) != mine[name]
        )


def option(name: str) -> str:
    """What a field is called on the command line."""
    return _OTHERWISE.get(name) or "--" + name.replace("_", "-")


def given(name: str, value: Any) -> str:
    """The ``value`` of a field as it is given on the command line."""
    return f"{value / 2**20:g}" if name == "shard_bytes" and value is not None else str(value)


def versions() -> dict[str, Any]:
    """What else the bytes of prepared media depend on."""
    return {"av": av.__version__, "ffmpeg": str(av.ffmpeg_version_info), "pillow": PIL.__version__}


@dataclass(frozen=True)
class Outcome:
    """What became of one medium. ``kind`` is "video" (encoded anew), "original" (a video whose file was taken as it is),
    "pictures" (a video of pictures without a rate) or "image"; ``files`` are (ending, path of a staged file) in the order of the
    medium's parts. ``frames`` and ``seconds`` say what is left of it, ``read`` and ``written`` the bytes before and after;
    ``width`` x ``height`` are its pixels now. ``psnr`` is that of the worst frame that was checked, in dB, None where pixels are
    those of the source. ``poor`` says that this is below ``Options.min_psnr``."""

    kind: str
    files: tuple[tuple[str, str], ...]
    frames: int
    seconds: float
    read: int
    written: int
    width: int
    height: int
    psnr: float | None = None
    poor: bool = False
