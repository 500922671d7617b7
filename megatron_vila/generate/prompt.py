"""A question about media as the document that training would make of it, up to where the answer begins.

Everything is that of the model's training run: where media stand, the chat template, separators, which frames are taken of a
video, how texts are tokenized. So the model reads exactly what it has learned to answer.

Legend: F units of all media.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vila.config.schema import Config
from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.chat import ChatEncoder, assemble
from megatron_vila.data.fields import Media
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.data.placement import IMAGE, MARKER, VIDEO, PlacementError, Turn, escape, place_media
from megatron_vila.errors import SettingError, UserError
from megatron_vila.plan.cache_memory import Wanted
from megatron_vila.plan.row import Document, FrameRef

_MOST_FRAMES = 10**9
"""Frames of a video where only a rate is asked for: all that the rate gives."""
_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")

Pictures = Sequence[Sequence[FrameRef]]
"""The chosen units of each medium."""


class PromptError(UserError, ValueError):
    """A question that cannot be asked; the text says why, and how to ask it."""


def seconds(text: str) -> float:
    """Seconds of ``90``, ``1:30`` or ``0:01:30.5``. Raises ``PromptError``."""
    found = _TIME.fullmatch(text.strip())
    hours, minutes, rest = (float(part or 0) for part in found.groups()) if found is not None else (0.0, 0.0, 0.0)
    # Only the first number may be large: 90:00 are minutes, 1:99 is a slip.
    is_slip = text.count(":") > 0 and (rest >= 60 or (text.count(":") > 1 and minutes >= 60))
    if found is None or is_slip:
        raise PromptError(f"{text!r} is not a time; write seconds (90), minutes (1:30) or hours (0:01:30)")
    return hours * 3600 + minutes * 60 + rest


def media_of(
    images: Iterable[str], videos: Iterable[str], start_s: float | None = None, end_s: float | None = None
) -> tuple[Media, ...]:
    """Files to ask about, images first. A video is a file or a folder of pictures; of the only one, ``start_s`` and ``end_s`` cut
    out a clip.

    Raises ``PromptError`` for a file that is not there, and for a clip of several videos or of none.
    """
    images, videos = [str(path) for path in images], [str(path) for path in videos]
    for path in (*images, *videos):
        if not Path(path).exists():
            raise PromptError(f"{path}: no such file; give a picture or a video that is there")
    for path in images:
        if Path(path).is_dir():
            raise PromptError(
                f"{path} is a folder: give it as a video whose frames are the pictures in it, or name a picture"
            )
    if (start_s is not None or end_s is not None) and len(videos) != 1:
        raise PromptError(
            f"a start or an end cuts a clip out of one video, and there are {len(videos)}; give one video"
        )
    if start_s is not None and end_s is not None and end_s < start_s:
        raise PromptError(f"the clip ends at {end_s:g} s, before it starts at {start_s:g} s; swap the two")
    return (
        *(Media(path, is_video=False) for path in images),
        *(Media(path, is_video=True, start_s=start_s, end_s=end_s) for path in videos),
    )


class Prompts:
    """Makes documents of questions for the model that ``config`` describes, in the words of ``encoder``.

    ``chooser`` remembers what it knows of videos. Raises ``SettingError`` for tokens that the model has no place for.
    """

    def __init__(self, config: Config, encoder: ChatEncoder, chooser: FrameChooser | None = None) -> None:
        self._config, self._encoder = config, encoder
        self._chooser = chooser or FrameChooser(config.data, config.model)
        self._rule = TextRules.of(config.data).media_format

    def choose(self, media: Sequence[Media], num_frames: int | None = None, fps: float | None = None) -> Pictures:
        """The units of each medium: with ``num_frames`` at most so many of a video, with ``fps`` at most so many a second;
        without either, what the training run took. Reads frame tables, no pixel. Raises ``MediaError`` and ``PromptError``."""
        if num_frames is not None and num_frames < 1:
            raise PromptError(f"{num_frames} frames of a video are none: ask for at least one (--frames, num_frames)")
        if fps is not None and not 0 < fps < 1e6:
            raise PromptError(f"{fps:g} frames a second are no rate: give one above 0 (--fps, fps)")
        chooser, data, taken = self._chooser, self._config.data, []
        if num_frames is not None or fps is not None:
            data = dataclasses.replace(data, num_frames=num_frames or _MOST_FRAMES, fps=fps or 0.0)
        for medium in media:
            indices, files = chooser.choose_frames(medium, data)
            taken.append(chooser.references(medium, indices, chooser.size(medium, indices, files), files))
        return tuple(taken)

    def document(self, question: str, pictures: Pictures, name: str = "the question") -> Document:
        """The tokens of ``question`` about ``pictures`` up to where the answer begins; no label.

        Markers (``<image>``, ``<video>``) in the question are as many as there are files of each kind, or none: then the media
        stand first. Raises ``PromptError`` for another number, ``RenderError`` for a text that cannot be tokenized.
        """
        images = [units for units in pictures if not units[0].is_video]
        videos = [units for units in pictures if units[0].is_video]
        self._check_markers(question, len(images), len(videos))
        try:
            turns, markers = place_media([Turn("user", question)], len(images), len(videos), self._rule)
        except PlacementError as error:
            raise PromptError(str(error)) from error
        queues = {IMAGE: iter(images), VIDEO: iter(videos)}
        data = self._config.data
        document = assemble(
            self._encoder.prompt(turns),
            [next(queues[marker]) for marker in markers],
            data.image_separator_ids,
            data.frame_separator_ids,
            name,
        )
        largest = int(document.token_ids.max(initial=0))
        if largest >= self._config.model.llm.vocab_size:
            raise SettingError(
                f"{name} holds token id {largest}, but model.llm.vocab_size={self._config.model.llm.vocab_size}; use the "
                "tokenizer that belongs to the model"
            )
        return document

    def wanted(self, document: Document, answer_tokens: int = 0) -> Wanted:
        """What ``document`` and an answer of ``answer_tokens`` tokens take room for."""
        separators = len(self._config.data.frame_separator_ids)
        visual = sum(frame.tokens + separators for frame in document.frames)
        tokens = len(document) + answer_tokens
        frames = sum(frame.unit.frames for frame in document.frames)
        return Wanted(tokens, tokens - visual, frames, separators)

    def _check_markers(self, question: str, images: int, videos: int) -> None:
        markers = MARKER.findall(question)
        found = markers.count(IMAGE), markers.count(VIDEO)
        # LLaVA-Video writes <image> for its videos.
        if not markers or found == (images, videos) or (not images and found == (videos, 0)):
            return
        raise PromptError(
            f"the question holds {found[0]} markers {IMAGE} and {found[1]} markers {VIDEO}, and there are {images} images and "
            f"{videos} videos; write one marker for each file, or none (the files then stand first), or {escape(VIDEO)} for the "
            "word"
        )
