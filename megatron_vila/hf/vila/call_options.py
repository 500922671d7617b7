"""The keywords of a processor's call: those of transformers, flat or in its groups; every other keyword is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# The keywords that transformers groups under these names.
_GROUPS = {
    "text_kwargs": (
        *("padding", "padding_side", "max_length", "truncation", "pad_to_multiple_of", "add_special_tokens", "return_tensors"),
    ),
    "images_kwargs": ("return_tensors",),
    "videos_kwargs": ("num_frames", "fps", "do_sample_frames", "return_tensors"),
    "common_kwargs": ("return_tensors",),
}
# Switched off, they change nothing; switched on, they ask for what this processor does not have.
_OFF = (
    *("return_assistant_tokens_mask", "load_audio_from_video", "sanitize_control_tokens", "return_mm_token_type_ids"),
    *("return_token_type_ids", "return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask"),
)
_PADDING = {True: "longest", "longest": "longest", "max_length": "max_length", False: "", "do_not_pad": "", None: ""}
_TRUNCATION = {True: True, "longest_first": True, "only_first": True, False: False, "do_not_truncate": False, None: None}


@dataclass(frozen=True)
class CallOptions:
    """What a call of the processor is asked for.

    ``do_sample_frames`` is true for videos in files, false for given frames. ``padding`` is true or ``longest`` (to the longest
    text), ``max_length``, or false; ``padding_side`` is left or right. ``truncation`` cuts texts to ``max_length`` tokens.
    ``add_special_tokens`` may only be false: a text starts as in training.
    """

    num_frames: int | None = None
    fps: float | None = None
    do_sample_frames: bool | None = None
    padding: bool | str | None = True
    padding_side: str | None = None
    max_length: int | None = None
    truncation: bool | str | None = None
    pad_to_multiple_of: int | None = None
    add_special_tokens: bool | None = None
    return_tensors: str | None = "pt"

    def __post_init__(self) -> None:
        for name, known in (
            ("padding", _PADDING),
            ("truncation", _TRUNCATION),
            ("padding_side", (None, "left", "right")),
            ("add_special_tokens", (None, False)),
            ("return_tensors", (None, "pt", "auto")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, known))}")
        for name in ("num_frames", "max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; give at least 1")
        if self.max_length is None and (self.truncates or self.pads_to == "max_length"):
            raise ValueError(f"truncation={self.truncation!r}, padding={self.padding!r} need a length; give max_length")
        if self.max_length is not None and self.truncates is None and self.pads_to != "max_length":
            raise ValueError(f"max_length={self.max_length} does nothing alone; set truncation=True or padding='max_length'")

    @classmethod
    def of(cls, caller: str, given: Mapping[str, Any]) -> CallOptions:
        """From the keywords of the function ``caller``. Raises ``TypeError`` for one that is not known or is given twice."""
        found: dict[str, Any] = {}
        for name, value, known in _flat(caller, given):
            if name in _OFF and not value:
                continue
            if name in _OFF:
                raise TypeError(f"{caller} got {name}={value!r}, which VILA's processor does not support; leave it out")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                raise TypeError(f"{caller} got {name}={value!r}, which neither the processor nor a chat template reads; {hint}")
            if name in found and found[name] != value:
                raise TypeError(f"{caller} got {name} twice, as {found[name]!r} and {value!r}; give it once")
            found[name] = value
        return cls(**found)

    @property
    def pads_to(self) -> str:
        """``longest``, ``max_length``, or empty for no padding."""
        return _PADDING[self.padding]

    @property
    def truncates(self) -> bool | None:
        """Whether texts are cut; None if nothing is said about it."""
        return _TRUNCATION[self.truncation]


_NAMES = tuple(option.name for option in fields(CallOptions))


def _flat(caller: str, given: Mapping[str, Any]) -> list[tuple[str, Any, tuple[str, ...]]]:
    """Every keyword with its value and the names that are known in its place."""
    found = []
    for name, value in given.items():
        if name not in _GROUPS:
            found.append((name, value, (*_NAMES, *_GROUPS)))
        elif isinstance(value, Mapping):
            found += [(inner, content, _GROUPS[name]) for inner, content in value.items()]
        elif value is not None:
            raise TypeError(f"{caller} got {name}={value!r}; give a mapping of {', '.join(_GROUPS[name])}")
    return found
