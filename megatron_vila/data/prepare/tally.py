"""What a preparation counted: sums and histograms that add up over shards and parts, and the samples that need a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_vila.data.prepare.options import Outcome


class Note(NamedTuple):
    """Something about one sample: ``key`` is the number of its record, ``place`` where that stands in the source."""

    key: int
    place: str
    sample_id: str
    reason: str


@dataclass
class Tally:
    """``media`` counts media by their kind (``Outcome.kind``) and samples without media as ``text``; ``read`` and ``written``
    are bytes of media before and after, ``seconds`` of video, ``frames`` of video kept. ``frames_of`` and ``tokens_of`` are
    histograms: they map b to the samples with 2**b to 2**(b + 1) - 1 frames or tokens (-1: none). ``bad`` samples are left out,
    of ``poor`` ones a video lost more to the encoder than was allowed."""

    samples: int = 0
    media: Counter = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    seconds: float = 0.0
    frames: int = 0
    frames_of: Counter = field(default_factory=Counter)
    tokens_of: Counter = field(default_factory=Counter)
    tokens: int = 0
    bad: list[Note] = field(default_factory=list)
    poor: list[Note] = field(default_factory=list)

    def count(self, outcomes: Sequence[Outcome], tokens: int | None) -> None:
        """Count a good sample whose media became ``outcomes``, with ``tokens`` tokens if they are known."""
        self.samples += 1
        self.media.update([outcome.kind for outcome in outcomes] or ["text"])
        self.read += sum(outcome.read for outcome in outcomes)
        self.written += sum(outcome.written for outcome in outcomes)
        self.seconds += sum(outcome.seconds for outcome in outcomes)
        frames = sum(outcome.frames for outcome in outcomes if outcome.kind != "image")
        self.frames += frames
        self.frames_of[bucket(frames)] += 1
        if tokens is not None:
            self.tokens += tokens
            self.tokens_of[bucket(tokens)] += 1

    def as_json(self) -> dict[str, Any]:
        """For ``of_json``."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Tally:
        counters = {name: Counter(content[name]) for name in ("media",)}
        counters |= {
            name: Counter({int(b): n for b, n in content[name].items()}) for name in ("frames_of", "tokens_of")
        }
        notes = {name: [Note(*note) for note in content[name]] for name in ("bad", "poor")}
        return cls(**content | counters | notes)


def bucket(count: int) -> int:
    return count.bit_length() - 1


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum of ``tallies``, with their notes one after the other."""
    whole = Tally()
    for each in tallies:
        for name in vars(whole):
            setattr(whole, name, getattr(whole, name) + getattr(each, name))
    return whole
