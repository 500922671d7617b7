"""Which frames of a medium are taken, and as which units: the same for a training sample and for a question about a video."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from megatron_vila.config.schema import DataConfig, ModelConfig
from megatron_vila.data.clips import picture_files, take_frames
from megatron_vila.data.fields import Media
from megatron_vila.data.images import picture_size
from megatron_vila.data.media import Member, errors_of, open_media, state_of
from megatron_vila.data.video import probe_video, shown_size
from megatron_vila.data.video_info import VideoInfo
from megatron_vila.plan.pictures import Size, pictures_of
from megatron_vila.plan.row import FrameRef, references


class FrameChooser:
    """Chooses frames by ``data`` for ``model``. Reads no pixel but where a unit depends on the size of the pictures. Safe for
    threads."""

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        self.data = data
        self.pictures = pictures_of(model)
        self.probe: Callable[..., VideoInfo] = functools.lru_cache(maxsize=64)(probe_video)
        self.shown_size = functools.lru_cache(maxsize=64)(shown_size)
        self.list_folder = functools.lru_cache(maxsize=64)(picture_files)

    def choose_frames(
        self, medium: Media, data: DataConfig | None = None
    ) -> tuple[np.ndarray, tuple[str | Member | bytes, ...]]:
        """The frames to take of a medium if they all fit (int64, ascending), and the files of all its frames where each has its
        own; by ``data`` in the place of the settings at hand. Raises ``MediaError``."""
        if medium.is_video:
            return take_frames(medium, data or self.data, self.probe, self.list_folder)
        with errors_of(medium.path, "cannot be read"):
            size = state_of(medium.path)[0]
        if not size:
            open_media(medium.path).close()  # says why it is none
        return np.zeros(1, dtype=np.int64), ()

    def size(self, medium: Media, indices: np.ndarray, files: Sequence[str | Member | bytes]) -> Size | None:
        """Of the pictures of ``medium``: of its first frame, or of the first one taken where each has its own file. None where
        nothing depends on it."""
        if not self.pictures.needs_size:
            return None
        if medium.is_video and not files:
            return self.shown_size(self.probe(medium.path))
        return picture_size(files[indices[0]] if files else medium.path)

    def references(
        self, medium: Media, indices: np.ndarray, size: Size | None, files: Sequence[str | Member | bytes]
    ) -> tuple[FrameRef, ...]:
        """The units of the frames ``indices`` of ``medium``, whose pictures have ``size``; ``files`` as of ``choose_frames``."""
        units = self.pictures.units(len(indices), medium.is_video, size)
        return references(medium.path, indices, medium.is_video, units, files)
