"""Frames of a prompt as tokens: decoded in threads ahead, encoded under the layers that work on the frames before them, and kept.

Each rank decodes and encodes the units that a chunk's plan deals to it, as in training; nothing here is collective. The projected
tokens of a unit are kept in host memory by what they depend on: the content of its file, the frames, how pictures are prepared,
and the weights. Another question or another prompt about the same video encodes nothing that is still kept.

Legend: N visual tokens that this rank makes of a chunk, H hidden size, F squares that it decodes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
import xxhash

from megatron_vila import accelerator
from megatron_vila.config.schema import Config
from megatron_vila.data.failures import FailureReasons
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.data.media import MediaSource, errors_of, name_of, open_media, state_of
from megatron_vila.data.pending_row import PendingRow
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.errors import UserError
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower, encode_frames
from megatron_vila.plan.row import Document, FrameRef
from megatron_vila.plan.row_plan import ShardPlan

_COPIES = 4
"""Chunks whose tokens may be on their way to the host: each holds page-locked memory."""
_READ = 1 << 20


class UnreadableError(UserError):
    """Frames of a prompt cannot be decoded; the text names the file."""


class PictureSource(Protocol):
    """Gives the visual tokens of the chunks of a document, which are numbered from 0. No collectives."""

    def start(self, number: int, plan: ShardPlan) -> None:
        """Begin to decode this rank's frames of a chunk, unless that was begun. ``plan`` is the chunk's."""

    def tokens(self, number: int, plan: ShardPlan) -> torch.Tensor:
        """Projected tokens [N, H] of this rank's frames of the chunk, in the order of its row. Called once the layers of the
        chunk before are queued: encoding runs beside them."""


class ContentHashes:
    """Hashes of the content of media, each read once as long as its file does not change. Safe for threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[MediaSource, tuple[int | str, ...]], str] = {}

    def of(self, source: MediaSource) -> str:
        """The xxh3 hash (128 bits) of the bytes of ``source``, in hex. Raises ``MediaError``."""
        with errors_of(source, "cannot be read"):
            key = source, state_of(source)
            if key not in self._known:
                digest = xxhash.xxh3_128()
                with open_media(source) as file:
                    while block := file.read(_READ):
                        digest.update(block)
                self._known[key] = digest.hexdigest()
            return self._known[key]

    def unit(self, frame: FrameRef) -> str:
        """What a unit shows: its files' content, and which frames of it. Raises ``MediaError``."""
        if frame.pictures:
            return "+".join(map(self.of, frame.pictures))
        return f"{self.of(frame.source)}:{','.join(map(str, frame.indices))}"


def picture_settings(config: Config, weights: str) -> str:
    """A key of all that the tokens of a unit depend on beside its pictures; ``weights`` identifies those of the model."""
    model = config.model
    settings = [asdict(model.vision), asdict(model.projector), config.data.image_aspect, config.train.precision, weights]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def document_key(document: Document, hashes: ContentHashes, weights: str) -> str:
    """A key of ``document`` for the model with ``weights``: of its token ids, and of what its frames show.

    Equal for equal content, wherever the files lie. Raises ``MediaError``.
    """
    digest = hashlib.sha256(weights.encode())
    digest.update(np.ascontiguousarray(document.token_ids).tobytes())
    for frame, start in zip(document.frames, document.frame_starts.tolist(), strict=True):
        digest.update(f"{start}:{frame.tokens}:{hashes.unit(frame)};".encode())
    return digest.hexdigest()


class Embeddings:
    """Projected tokens of units in host memory, by key, up to ``budget_bytes``. Safe for threads.

    Those of earlier prompts make room, the longest unused first; those of the present one stay (``next_prompt``), because a video
    that does not fit as a whole would otherwise push out what its second pass needs first.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget, self._used, self._prompt = budget_bytes, 0, 0
        self._kept: OrderedDict[str, tuple[torch.Tensor, int]] = OrderedDict()
        self._lock = threading.Lock()

    def next_prompt(self) -> None:
        """What is kept so far may make room from now on, until it is used again."""
        self._prompt += 1

    def get(self, key: str) -> torch.Tensor | None:
        """Tokens [T, H] of a unit on the host."""
        with self._lock:
            if key not in self._kept:
                return None
            tokens_TH, _ = self._kept.pop(key)
            self._kept[key] = tokens_TH, self._prompt
            return tokens_TH

    def put(self, key: str, tokens_TH: torch.Tensor) -> None:
        """Keep ``tokens_TH``, which lie on the host and nobody changes, if there is room."""
        size = tokens_TH.numel() * tokens_TH.element_size()
        with self._lock:
            if key in self._kept:
                return
            while self._used + size > self._budget and self._kept:
                oldest, (held_TH, prompt) = next(iter(self._kept.items()))
                if prompt == self._prompt:
                    return
                del self._kept[oldest]
                self._used -= held_TH.numel() * held_TH.element_size()
            if self._used + size <= self._budget:
                self._kept[key] = tokens_TH, self._prompt
                self._used += size

    def __len__(self) -> int:
        return len(self._kept)


@dataclass
class _Chunk:
    """What is begun of the chunk of ``plan``: the ``keys`` of this rank's units, the tokens of those that are ``kept``, and the
    others ``pending`` in the decoder."""

    plan: ShardPlan
    keys: list[str]
    kept: list[torch.Tensor | None]
    units: Sequence[FrameRef]
    pending: PendingRow | None


@dataclass
class FrameCounts:
    """Frames of this rank so far: ``encoded``, and ``reused`` from memory."""

    encoded: int = 0
    reused: int = 0


class FrameSource:
    """The ``PictureSource`` of a model's tower and projector, for any files. It owns threads: ``close`` it.

    ``chooser`` tells it of videos what it knows already. ``weights`` identifies the model's weights. Up to ``kept_bytes`` of
    embeddings are held in host memory; 0: none.
    """

    def __init__(
        self, tower: VisionTower, projector: Projector, config: Config, chooser: FrameChooser, weights: str, kept_bytes: int
    ) -> None:
        self._tower, self._projector, self._kept_bytes = tower, projector, kept_bytes
        self._hidden = config.model.llm.hidden_size
        self._decoder = RowDecoder.of(config.data, config.model.vision.image_size, chooser.probe, FailureReasons())
        self._settings = picture_settings(config, weights)
        self.hashes, self.embeddings, self.counts = ContentHashes(), Embeddings(kept_bytes), FrameCounts()
        self._chunks: dict[int, _Chunk] = {}
        self._turns = 0
        self._cuda = accelerator.cuda()
        self._stream = self._cuda.Stream()
        self._stream.wait_stream(self._cuda.current_stream())  # the weights are there by then
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._copies = threading.Semaphore(_COPIES)
        parameter = tower.used_parameters()[0]
        self._device, self._dtype = parameter.device, parameter.dtype

    def close(self) -> None:
        """Stop the threads; what is begun is given up."""
        self._decoder.close()
        self._keeper.shutdown(wait=True, cancel_futures=True)

    def next_prompt(self) -> None:
        """Give up what was begun of an earlier document, if it was not finished."""
        for chunk in self._chunks.values():
            if chunk.pending is not None:
                chunk.pending.cancel()
        self._chunks.clear()
        self.embeddings.next_prompt()

    def start(self, number: int, plan: ShardPlan) -> None:
        """Begin to decode this rank's frames of chunk ``number``, but for those whose tokens are kept. Raises ``MediaError`` for
        a file that is gone."""
        if number in self._chunks and self._chunks[number].plan is plan:
            return
        if not number:
            self.next_prompt()  # also after a document that was not read to its end
        units = plan.row.frames[plan.frames.start : plan.frames.stop]
        keys = [f"{self._settings}:{self.hashes.unit(unit)}" for unit in units]
        kept = [self.embeddings.get(key) for key in keys]
        missing = tuple(unit for unit, tokens_TH in zip(units, kept, strict=True) if tokens_TH is None)
        pending = self._decoder.submit(self._turns, [_frames_alone(missing)], range(len(missing))) if missing else None
        self._turns += 1
        self._chunks[number] = _Chunk(plan, keys, kept, units, pending)

    def tokens(self, number: int, plan: ShardPlan) -> torch.Tensor:
        """Projected tokens [N, H] of this rank's frames of chunk ``number``, in the order of its row.

        Waits for the decoder; what is encoded is queued beside what the device has to do. Raises ``UnreadableError`` for frames
        that cannot be decoded, and as ``start`` and ``RowDecoder``.
        """
        self.start(number, plan)
        chunk = self._chunks.pop(number)
        pixels_F3HW = None
        if chunk.pending is not None:
            decoded = chunk.pending.result()
            if decoded.undecodable:
                raise UnreadableError(f"a frame cannot be decoded: {decoded.undecodable[0]}; ask without this file, or mend it")
            pixels_F3HW = decoded.pixels
        with torch.no_grad(), self._cuda.stream(self._stream):
            made_NH = self._put_together(chunk, pixels_F3HW)
        self._cuda.current_stream().wait_stream(self._stream)
        if made_NH.is_cuda:
            made_NH.record_stream(self._cuda.current_stream())
        return made_NH

    def _put_together(self, chunk: _Chunk, pixels_F3HW: torch.Tensor | None) -> torch.Tensor:
        """Kept and new tokens of a chunk in their order, on the device."""
        new = [place for place, tokens_TH in enumerate(chunk.kept) if tokens_TH is None]
        self.counts.reused += sum(unit.unit.frames for unit, t in zip(chunk.units, chunk.kept, strict=True) if t is not None)
        parts: list[torch.Tensor] = [torch.empty(0)] * len(chunk.units)
        if pixels_F3HW is not None:
            new_NH = encode_frames(self._tower, self._projector, pixels_F3HW).flatten(0, 1)
            self._keep([chunk.keys[place] for place in new], [chunk.units[place].tokens for place in new], new_NH)
            for place, tokens_TH in zip(new, new_NH.split([chunk.units[place].tokens for place in new]), strict=True):
                parts[place] = tokens_TH
                self.counts.encoded += chunk.units[place].unit.frames
            if len(new) == len(chunk.units):
                return new_NH
        for place, tokens_TH in enumerate(chunk.kept):
            if tokens_TH is not None:
                parts[place] = accelerator.to_device(tokens_TH, self._device)
        if not parts:
            return torch.zeros(0, self._hidden, dtype=self._dtype, device=self._device)
        return torch.cat(parts)

    def _keep(self, keys: Sequence[str], sizes: Sequence[int], new_NH: torch.Tensor) -> None:
        """Copy new tokens to the host, behind this thread's back: it has the next chunk to queue."""
        if not self._kept_bytes:
            return
        if not new_NH.is_cuda:
            self._put_each(keys, sizes, new_NH)
            return
        self._copies.acquire()
        locked_NH = torch.empty(new_NH.shape, dtype=new_NH.dtype, pin_memory=True)
        locked_NH.copy_(new_NH, non_blocking=True)
        done = self._cuda.Event()
        done.record()

        def put() -> None:
            try:
                done.synchronize()
                self._put_each(keys, sizes, locked_NH)
            finally:
                self._copies.release()

        self._keeper.submit(put)

    def _put_each(self, keys: Sequence[str], sizes: Sequence[int], tokens_NH: torch.Tensor) -> None:
        for key, tokens_TH in zip(keys, tokens_NH.split(list(sizes)), strict=True):
            self.embeddings.put(key, tokens_TH.clone())


def _frames_alone(units: tuple[FrameRef, ...]) -> Document:
    """Units that are to be decoded, as the decoder takes them; errors name their files."""
    nothing = np.empty(0, dtype=np.int64)
    names = dict.fromkeys(name_of(unit.source) for unit in units)
    return Document(nothing, nothing, units, np.zeros(len(units), dtype=np.int64), ", ".join(names))

