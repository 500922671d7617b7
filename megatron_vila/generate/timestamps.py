"""When in a video an answer was found: the frames that got most attention, as times, as a strip of pictures and as JSON.

``frame_attention`` says how much each frame got. What attention shows is where the model looked, not why it answered as it did.

Legend: F units of frames of a prompt.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from PIL import Image

from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaError, MediaSource, name_of
from megatron_vila.data.video import decode_video_frames, probe_video
from megatron_vila.data.video_info import VideoInfo
from megatron_vila.plain_files import replace_file
from megatron_vila.plan.row import Document, FrameRef

_INK, _FAINT, _MARK, _BEST = "#1f2933", "#9aa5b1", "#2563eb", "#d97706"
_APART = 4
"""Moments may be so many times closer to each other than if they were spread evenly over the video."""
_SHORT_S = 60.0
"""Tenths of seconds are told of media that are shorter."""
_HEIGHT = 240
"""Most pixels of a picture of the strip from top to bottom."""
_COLUMN = 1.9
"""Inches of the strip for each picture."""
_LETTERS = 13
"""Letters of the question that an inch of the strip has room for."""
_STEPS_S = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 36000, 1e9)
"""Seconds that may lie between two marks of the axis of time."""

Probe = Callable[[MediaSource], VideoInfo]


@dataclass(frozen=True)
class Moment:
    """A unit of frames that got much attention: ``rank`` 1 got most.

    ``unit`` counts all units of the prompt, ``medium`` its media. ``index`` is the unit's first frame as the video counts it,
    shown ``seconds`` after the video's first (None: pictures, which have no times). ``weight`` is the share of all attention.
    """

    rank: int
    unit: int
    medium: int
    source: str
    index: int
    seconds: float | None
    weight: float


def unit_seconds(document: Document, probe: Probe = probe_video) -> np.ndarray:
    """When the first frame of each unit is shown, in seconds after the video's first frame: float64 [F], NaN for pictures.

    ``probe`` reads the frame table of a video. Raises ``MediaError``.
    """
    known = functools.cache(probe)
    return np.array(
        [
            known(frame.source).seconds[frame.indices[0]] if frame.is_video and not frame.pictures else math.nan
            for frame in document.frames
        ],
        np.float64,
    )


def media_numbers(document: Document) -> np.ndarray:
    """The number of the medium of each unit, counted in the order of the prompt: int64 [F]."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault(frame.source, len(known)) for frame in document.frames], np.int64)


def moments(
    document: Document,
    weights: np.ndarray,
    seconds: np.ndarray,
    count: int = 8,
    apart_s: float | None = None,
) -> list[Moment]:
    """The ``count`` units that got most attention, the most first; fewer where there are not so many apart from each other.

    Of units of one video that lie closer than ``apart_s`` seconds only the strongest counts: neighbors show the same. None: a
    quarter of the distance that ``count`` moments spread evenly over the video would have. ``weights`` and ``seconds`` are
    float64 [F].
    """
    media, is_open = media_numbers(document), np.ones(len(weights), bool)
    found: list[Moment] = []
    for unit in np.argsort(-weights, kind="stable").tolist():
        if len(found) == count:
            break
        if not is_open[unit]:
            continue
        frame, time_s = document.frames[unit], float(seconds[unit])
        is_timed = not math.isnan(time_s)
        if is_timed:
            of_video = media == media[unit]
            times = seconds[of_video]
            apart = (times.max() - times.min()) / (count * _APART) if apart_s is None else apart_s
            is_open &= ~(of_video & (np.abs(seconds - time_s) < apart))
        found.append(
            Moment(
                rank=len(found) + 1,
                unit=unit,
                medium=int(media[unit]),
                source=name_of(frame.source),
                index=frame.indices[0],
                seconds=time_s if is_timed else None,
                weight=float(weights[unit]),
            )
        )
    return found


def clock(seconds: float, tenths: bool = False) -> str:
    """``h:mm:ss``, cut to the second, or to the tenth."""
    tenth = int(seconds * 10 + 1e-6)
    whole, rest = divmod(tenth, 10)
    text = f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{text}.{rest}" if tenths else text


def label(moment: Moment, seconds: np.ndarray) -> str:
    """What a moment is called: its time, or for pictures their number. ``seconds`` of all units say whether tenths matter."""
    if moment.seconds is None:
        return f"picture {moment.index + 1}"
    return clock(moment.seconds, tenths=bool(np.nanmax(seconds) < _SHORT_S))


def write_json(
    path: str | Path, document: Document, found: Sequence[Moment], weights: np.ndarray, seconds: np.ndarray
) -> None:
    """Write the moments, and of every unit its medium, frame, time and weight. Raises ``OSError``."""
    media = media_numbers(document)
    names = dict(zip(media.tolist(), (name_of(frame.source) for frame in document.frames), strict=True))
    content = {
        "media": [names[number] for number in sorted(names)],
        "weight": "share of all attention: mean over heads, layers, the last token of the question and those of the answer",
        "frames_together": float(weights.sum()),
        "moments": [{**asdict(moment), "time": label(moment, seconds)} for moment in found],
        "units": [
            {
                "medium": int(media[unit]),
                "indices": list(frame.indices),
                "seconds": None if math.isnan(seconds[unit]) else float(seconds[unit]),
                "weight": float(weights[unit]),
            }
            for unit, frame in enumerate(document.frames)
        ],
    }
    replace_file(Path(path), lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def pictures_of(document: Document, found: Sequence[Moment], probe: Probe = probe_video) -> list[Image.Image | None]:
    """The picture of each moment, RGB and upright; None where its file cannot be read any more."""
    taken: dict[int, Image.Image | None] = {}
    by_source: dict[Any, list[Moment]] = {}
    for moment in found:
        by_source.setdefault(document.frames[moment.unit].source, []).append(moment)
    for source, of_source in by_source.items():
        ordered = sorted(of_source, key=lambda moment: moment.index)
        try:
            pictures: list[Any] = list(_decoded(document, source, ordered, probe))
        except MediaError:
            pictures = [None] * len(ordered)
        taken |= {moment.unit: picture for moment, picture in zip(ordered, pictures, strict=True)}
    return [taken[moment.unit] for moment in found]


def _decoded(document: Document, source: Any, ordered: Sequence[Moment], probe: Probe) -> list[Image.Image]:
    frames = [document.frames[moment.unit] for moment in ordered]
    if frames[0].is_video and not frames[0].pictures:
        return decode_video_frames(source, [moment.index for moment in ordered], probe(source))
    return [load_image(_picture(frame)) for frame in frames]


def _picture(frame: FrameRef) -> Any:
    return frame.pictures[0] if frame.pictures else frame.source


def draw_strip(
    path: str | Path,
    found: Sequence[Moment],
    pictures: Sequence[Image.Image | None],
    weights: np.ndarray,
    seconds: np.ndarray,
    title: str = "",
) -> None:
    """Draw the moments in the order of the prompt into the PNG ``path``: picture, time and a bar of the weight for each, and the
    weights of all units below them. At least one moment. Raises ``OSError``."""
    figure = _strip(found, pictures, weights, seconds, title)
    replace_file(Path(path), lambda temporary: figure.savefig(temporary, format="png"))


def _strip(
    found: Sequence[Moment],
    pictures: Sequence[Image.Image | None],
    weights: np.ndarray,
    seconds: np.ndarray,
    title: str,
) -> Figure:
    """All lengths in inches, from the top."""
    count, strongest = len(found), max(moment.weight for moment in found)
    left, right, gap = 0.6, 0.15, 0.1
    shapes = [picture.height / picture.width for picture in pictures if picture is not None] or [0.5625]
    width = max(6.4 - left - right, _COLUMN * count)
    column = width / count - gap
    tall = column * max(shapes)
    heights = {"head": 0.6 if title else 0.3, "picture": tall, "bar": 0.1, "share": 0.25, "weights": 0.7, "foot": 0.4}
    size = left + width + right, sum(heights.values()) + 2 * gap
    figure = Figure(figsize=size, dpi=130, facecolor="white")
    FigureCanvasAgg(figure)

    def place(x: float, top: float, wide: float, high: float) -> Axes:
        return figure.add_axes((x / size[0], 1 - (top + high) / size[1], wide / size[0], high / size[1]))

    below = heights["head"] + tall + gap
    in_order = sorted(zip(found, pictures, strict=True), key=lambda pair: pair[0].unit)
    for number, (moment, picture) in enumerate(in_order):
        x, color = left + number * (column + gap), _BEST if moment.rank == 1 else _MARK
        _draw_picture(place(x, heights["head"], column, tall), picture, label(moment, seconds), color)
        _draw_bar(place(x, below, column, heights["bar"]), moment, strongest, color)
    top = below + heights["bar"] + heights["share"] + gap
    _draw_weights(place(left, top, width - gap, heights["weights"]), found, weights, seconds)
    if title:
        # A question is not a formula: "$5 or $10" stands as it was asked. What does not fit beside the strip is left out.
        text, room = " ".join(title.split()), int(_LETTERS * (width - gap))
        text = text if len(text) <= room else f"{text[: room - 4]} ..."
        at = left / size[0], 1 - 0.2 / size[1]
        figure.text(*at, text, va="center", fontsize=10, color=_INK, parse_math=False)
    return figure


def _draw_picture(axes: Axes, picture: Image.Image | None, text: str, color: str) -> None:
    if picture is None:
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center", color=_FAINT, transform=axes.transAxes)
    else:
        shown = picture.copy()
        shown.thumbnail((4 * _HEIGHT, _HEIGHT))
        axes.imshow(np.asarray(shown))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(text, fontsize=9.5, color=color, pad=3)
    for side in axes.spines.values():
        side.set_color(color)


def _draw_bar(axes: Axes, moment: Moment, strongest: float, color: str) -> None:
    axes.barh([0], [1], color="#e9edf2", height=1)
    axes.barh([0], [moment.weight / strongest if strongest else 0], color=color, height=1)
    axes.annotate(
        f"{moment.rank}.  {100 * moment.weight:.2g} %",
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=_INK,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    axes.axis("off")


def _draw_weights(axes: Axes, found: Sequence[Moment], weights: np.ndarray, seconds: np.ndarray) -> None:
    """The weights over the time of one video, else over the units in their order."""
    is_timed = not np.isnan(seconds).any() and bool((np.diff(seconds) >= 0).all())
    x = seconds if is_timed else np.arange(len(weights), dtype=np.float64)
    axes.fill_between(x, 100 * weights, color="#c5d4f0", linewidth=0, step="mid" if len(x) > 1 else None)
    for moment in found:
        color = _BEST if moment.rank == 1 else _MARK
        axes.plot(
            [x[moment.unit]], [100 * weights[moment.unit]], "o", color=color, markersize=4, clip_on=False, zorder=3
        )
    axes.set_ylim(bottom=0)
    axes.set_xlim(x.min(), max(x.max(), x.min() + 1e-9))
    if is_timed:
        tenths = bool(x.max() < _SHORT_S)
        axes.xaxis.set_major_locator(MultipleLocator(next(step for step in _STEPS_S if x.max() - x.min() <= 8 * step)))
        axes.xaxis.set_major_formatter(lambda at, _: clock(max(at, 0.0), tenths))
    else:
        axes.set_xlabel("pictures in the order of the prompt", fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT, length=2)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.3g} %")
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(_FAINT)
