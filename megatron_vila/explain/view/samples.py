"""One sample as a page shows it: what the trainer's own functions make of it, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.chat import MediaRun, media_runs
from megatron_vila.data.check import problem
from megatron_vila.data.dataset import BrokenSampleError, TooLongError, VilaDataset
from megatron_vila.data.fields import Media
from megatron_vila.data.images import picture_size
from megatron_vila.data.media import MediaError, name_of
from megatron_vila.explain.text import count, number
from megatron_vila.explain.view.pictures import Painter, Square, some_units
from megatron_vila.explain.view.tokens import Strip, strip_of, visible
from megatron_vila.plan.pictures import tokens_each
from megatron_vila.plan.row import IGNORE, Document


@dataclass(frozen=True)
class Limits:
    """What is shown of a sample at most: ``pictures`` of each medium, ``tokens`` of text."""

    pictures: int
    tokens: int


@dataclass(frozen=True)
class Medium:
    """A medium of a sample. ``facts`` say what the file holds, what is taken of it and what it becomes; ``pictures`` is how
    many squares the tower gets, of which ``squares`` are shown."""

    name: str
    is_video: bool
    facts: tuple[str, ...]
    summary: str
    pictures: int
    squares: tuple[Square, ...]


@dataclass(frozen=True)
class Sample:
    """``kind`` is empty for a sample that can be used, else one of ``check.KINDS``, and ``reason`` says what is wrong. ``cuts``
    are what was left out of it and other things to know, ``counts`` its numbers by name. ``sample_id`` is empty where the record
    has none that can be read."""

    anchor: str
    name: str
    sample_id: str
    place: str
    kind: str = ""
    reason: str = ""
    cuts: tuple[str, ...] = ()
    counts: dict[str, str] = field(default_factory=dict)
    media: tuple[Medium, ...] = ()
    strip: Strip | None = None

    @property
    def state(self) -> str:
        """used, learns nothing, or cannot be used: ..."""
        if self.kind:
            return f"cannot be used: {self.kind.replace('_', ' ')}"
        return "used" if self.counts["trained"] != "0" else "learns nothing"

    @property
    def look(self) -> str:
        """good, warn or bad: how the state is colored."""
        return {"used": "good", "learns nothing": "warn"}.get(self.state, "bad")


def sample_of(dataset: VilaDataset, painter: Painter, set_name: str, index: int, limits: Limits) -> Sample:
    """Sample ``index`` of data.``set_name``. Raises ``MachineError``, ``ChangedFileError``."""
    place, sample_id = dataset.records.name(index), dataset.name(index)
    known = Sample(
        anchor=f"{set_name}-{index}",
        name=f"{set_name} {index}",
        sample_id=visible(sample_id) if sample_id != place else "",
        place=visible(place),
    )
    try:
        made = dataset.build(index)
    except (BrokenSampleError, TooLongError) as error:
        kind = "too_long" if isinstance(error, TooLongError) else "broken"
        return replace(known, kind=problem(dataset, index, kind, str(error)).kind, reason=visible(str(error)))
    document, dropped = made.document, made.dropped_frames
    runs = media_runs(document)
    media = dataset.records.record(index).media
    units = [some_units(run.frames, limits.pictures) for run in runs]
    squares, fault = painter.squares(document, units, [medium.fps for medium in media])
    return replace(
        known,
        kind="broken" if fault else "",
        reason=visible(fault),
        cuts=tuple(_cuts(dataset, document, dropped)),
        counts=_counts(document),
        media=tuple(_medium(dataset, *each) for each in zip(media, runs, squares, strict=True)),
        strip=strip_of(document, dataset.encoder.tokenizer, limits.tokens),
    )


def _cuts(dataset: VilaDataset, document: Document, dropped: int) -> Iterator[str]:
    if dropped:
        yield f"{count(dropped, 'frame')} left out, evenly, to fit train.seq_length={dataset.seq_length}"
    if not (document.labels != IGNORE).any():
        yield "no answer to learn: it trains nothing"


def _counts(document: Document) -> dict[str, str]:
    units = [frame.unit for frame in document.frames]
    counts = {
        "tokens": len(document),
        "trained": int((document.labels != IGNORE).sum()),
        "visual": sum(unit.tokens for unit in units),
        "frames": sum(unit.frames for unit in units),
        "squares": sum(unit.squares for unit in units),
        "patches": sum(unit.cost for unit in units),
    }
    return {name: number(value) for name, value in counts.items()}


def _medium(dataset: VilaDataset, medium: Media, run: MediaRun, squares: Sequence[Square]) -> Medium:
    units = [frame.unit for frame in run.frames]
    kept = sum(unit.frames for unit in units)
    try:
        facts = tuple(_facts(dataset, medium, kept))
    except MediaError as error:
        facts = (visible(error.reason),)
    what = "frame" if medium.is_video else "picture"
    return Medium(
        name=visible(name_of(medium.path)),
        is_video=medium.is_video,
        facts=facts,
        summary=f"{count(kept, what)}, {tokens_each(units)} tokens{' each' if len(units) > 1 else ''}",
        pictures=sum(unit.squares for unit in units),
        squares=tuple(squares),
    )


def _facts(dataset: VilaDataset, medium: Media, kept: int) -> Iterator[str]:
    """What the file holds, which frames are chosen, and how many of them are kept."""
    if not medium.is_video:
        width, height = picture_size(medium.path)
        yield f"picture of {width} × {height} pixels"
        return
    chosen, files = dataset.choose_frames(medium)
    if files:
        yield f"{count(len(files), 'picture')}{f' at {medium.fps:g} a second' if medium.fps else ' without a rate'}"
    else:
        info = dataset.probe(medium.path)
        yield f"{info.width} × {info.height} pixels, {count(info.num_frames, 'frame')}, {info.duration_s:.1f} s"
    if medium.start_s is not None or medium.end_s is not None:
        end = "the end" if medium.end_s is None else f"{medium.end_s:g} s"
        yield f"clip from {medium.start_s or 0:g} s to {end}"
    yield f"{count(len(chosen), 'frame')} chosen ({_rule(dataset.data)})"
    if kept < len(chosen):
        yield f"thinned from {len(chosen)} to {kept} to fit train.seq_length={dataset.seq_length}"


def _rule(data: DataConfig) -> str:
    if not data.fps:
        return f"data.num_frames={data.num_frames}, spread evenly"
    return f"data.fps={data.fps:g}, data.fps_rule={data.fps_rule}, at most data.num_frames={data.num_frames}"
