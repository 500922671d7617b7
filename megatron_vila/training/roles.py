"""What a run is handed beside its configuration: watchers, which are told what it does, and tasks, which it does in between.

The trainer calls both in the order in which they were given, on every rank. ``start.py`` chooses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from megatron_vila.training.run_data import RunData
    from megatron_vila.training.step import Pass


@dataclass(frozen=True)
class RunFacts:
    """What holds for a whole run and this rank."""

    is_writer: bool
    """whether this rank writes for all"""
    total_steps: int
    start_step: int
    """step of the checkpoint that the run continues from, 0 for a new run"""
    ranks: int
    peak: float | None
    """peak FLOP/s of a rank's GPU by its data sheet, None if it is not known"""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, measured by the trainer over all ranks."""

    step: int
    """steps done, this one included"""
    loss: float
    """mean over the supervised tokens of the global batch"""
    lr: Mapping[str, float]
    """learning rate of each trained part (``llm``, ``projector``, ``vision``)"""
    grad_norm: float
    """global norm before clipping"""
    tokens: int
    """LLM tokens of the global batch without padding"""
    supervised_tokens: int
    frames: int
    """pictures encoded in the step"""
    model_flops: float
    """by ``flops.model_flops``, all ranks together"""
    step_s: float
    """wall time of the step, waiting for data included"""
    data_wait_s: float
    """of which waiting for data, on the rank that waited longest"""
    peak_memory_gib: float
    """largest memory of a rank since the start"""
    skipped: int
    """updates skipped so far"""
    loading: Mapping[str, float] = field(default_factory=dict)
    """what the rows of the step took to load (``loading.py``)"""
    row_fill: float = 0.0
    """tokens without padding over those that the rows have room for (``train.seq_length`` each)"""
    padding: float = 0.0
    """share of padding in the rows as they are trained on"""
    predicted_spread: float = 0.0
    """difference between the predicted costs of the most and the least expensive replica, over their mean"""
    counts: Mapping[str, int] = field(default_factory=dict)
    """what became of the samples so far, over all replicas: counts of ``StepPlan`` by name"""


class TaskName(NamedTuple):
    """What a task is called: to a reader, as "evaluation", and before the names of its results, as "eval"."""

    word: str
    prefix: str


class Watcher:
    """Is told what a run does; calls no collective and decides nothing. A subclass overrides the methods that it needs."""

    def start(self, facts: RunFacts) -> None:
        """The steps begin."""

    def at(self, step: int, phase: str) -> None:
        """This rank is now in ``phase`` (in words) of ``step`` (from 1). All ranks go through the same phases."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def result(self, step: int, task: TaskName, results: Mapping[str, float]) -> None:
        """A task gave ``results`` after ``step``."""

    def message(self, text: str) -> None:
        """A line for the reader of the log."""

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """The steps are over; returns ``summary`` with what this watcher adds to it."""
        return dict(summary)

    def close(self) -> None:
        """The run ends, in whatever way; called last, also after ``finish``."""


class Task(Protocol):
    """Something that a run does with its model beside training it, such as an evaluation. Equal on all ranks."""

    @property
    def name(self) -> TaskName: ...

    def warnings(self, data: RunData) -> Sequence[str]:
        """What a user should know at the start. Called on rank 0 alone; an error there ends all ranks."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether to run after ``step``; ``is_last`` says that it is the last one of the run."""

    def run(self, forward: Pass, data: RunData) -> dict[str, float]:
        """Numbers by name, equal on all ranks. May use every collective of ``forward``'s topology."""

    def remarks(self, results: Mapping[str, float]) -> Sequence[str]:
        """What a reader of ``results`` must know, in sentences."""

    def summary(self, results: Mapping[str, float]) -> dict[str, float]:
        """What the run's summary keeps of the last ``results``."""
