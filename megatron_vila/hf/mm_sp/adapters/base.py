"""What MM-SP has to know of a model with vision: one adapter per family, and nothing else in MM-SP names a model.

The pixels of a sample are cut into *units*, each encoded by itself, such as a picture, a frame or the frames that a tower
merges. Units are dealt over the ranks that share a sample. An adapter has two sides. On the host, in the workers of a
DataLoader, it finds the units of a sample and the positions of its tokens; for that it is a frozen dataclass of numbers, made
from the model's configuration alone. On the device it calls the model's own functions to encode units, and hands the features
to the model.

A new model is one more file here and one line in ``ADAPTERS``.

Legend: L tokens of a sample, R rows of pixels, N visual tokens made by a rank, M owned by it, C = (1 + levels) * H, H width of
the language model, levels = features of earlier layers of the tower that the model adds to its own layers (deepstack), often
none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class VisionUnit:
    """What is encoded by itself: ``rows`` rows of pixels, which become ``tokens`` tokens in consecutive places of a sample.

    ``cost`` is that of encoding it, in any unit of the adapter's: units are dealt so that ranks have about the same. ``is_video``
    tells whether its tokens are those of a video. ``ends`` tells whether it is the last unit of its picture or video. ``grid`` is
    what else the adapter's ``encode`` has to know, such as the patches of each side.
    """

    rows: int
    tokens: int
    cost: int
    is_video: bool
    ends: bool
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A unit in a sample. ``start`` is the place of its first token in the sample. Its pixels are ``pixels[first_row : first_row
    + unit.rows]``, read on the rank that encodes it only; ``pixels`` is a tensor or anything else that can be sliced so."""

    unit: VisionUnit
    start: int
    pixels: Any
    first_row: int


class VisionAdapter(ABC):
    """The traits of a model family; subclasses are frozen dataclasses that can be pickled."""

    keys: ClassVar[tuple[str, ...]]
    """Fields of a sample beyond input_ids, labels and attention_mask that ``pieces`` reads."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Fields that the model's processor makes and that MM-SP works out by itself."""
    hints: ClassVar[Mapping[str, str]] = {}
    """What to do instead, by the name of a field that the model knows and MM-SP cannot take."""
    options: ClassVar[tuple[str, ...]] = ()
    """Arguments of the model's forward that go to ``encode``."""
    text_models: ClassVar[tuple[str, ...]]
    """Model types that the language model may have."""

    @classmethod
    @abstractmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        """The adapter for a model of such a configuration."""

    @classmethod
    def problems(cls, config: PreTrainedConfig) -> list[str]:
        """Settings with which results would be wrong, each in plain words with its cure."""
        return []

    @property
    @abstractmethod
    def token_ids(self) -> tuple[int, ...]:
        """The ids that stand for visual tokens."""

    @property
    def unlearned(self) -> tuple[int, ...]:
        """The ids that count as -100 where they stand in labels, as the model itself takes them."""
        return ()

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row of pixels."""

    @abstractmethod
    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        """The units of a sample whose token ids without padding are ``ids`` int64 [L], in any order; reads no pixel. Together
        their tokens are all visual tokens of ``ids``.

        Raises ``ValueError`` that says what is wrong with the sample, to be read behind its name ("has 3 ...").
        """

    def positions(self, sample: Mapping[str, Any], ids: np.ndarray, pieces: Sequence[Piece], first: int) -> np.ndarray | None:
        """Position ids of a whole document, int64 [A, L] for a model with A axes of them, or None if they just count from
        ``first``, the position after what came before."""
        return None

    def check_rows(self, pixels: torch.Tensor) -> None:
        """Raise ``ValueError`` unless ``pixels``, which were read for some units, has rows of ``row_shape``."""
        if tuple(pixels.shape[1:]) != self.row_shape:
            shape = ", ".join(str(size) for size in self.row_shape)
            raise ValueError(
                f"frames have shape {tuple(pixels.shape)} but the model's vision tower takes [frames, {shape}]; resize them"
            )

    @abstractmethod
    def blank(self) -> VisionUnit:
        """The smallest unit there is. A rank without units encodes it, black, and discards it, so that all weights of the tower
        get a gradient (of exact zeros) and FSDP2 gathers them equally often on all ranks."""

    @abstractmethod
    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        """Features [N, C] of ``units``, at least one, in their order; ``pixels`` [R, ...] are their rows.

        ``model`` is the module whose forward takes the features (the model without its output layer). No collective of MM-SP.
        """

    @abstractmethod
    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        """Arguments of the forward of ``model`` with the features of the visual tokens that a rank owns, in their order.

        ``is_video_M`` bool, in host memory, tells which are tokens of videos. Called alike on all ranks, those without such
        tokens included.
        """

    def backbone(self, model: Any) -> nn.Module:
        """The language model inside ``model``, the whole model; MM-SP gives its attention to that."""
        return model.model.language_model

    def packed_tower(self, model: Any) -> nn.Module | None:
        """The tower inside ``model``, the whole model, if it hands the bounds of packed parts to flash attention; else None."""
        return None

    def start_decoding(self, model: Any, next_position: int, tokens: int) -> None:
        """Before the model decodes: its next token stands at ``next_position``, though ``tokens`` tokens came before."""
        return
