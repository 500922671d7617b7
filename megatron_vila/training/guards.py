"""When a run ends because it would be wrong or pointless to continue, decided from numbers that are equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_vila.config.schema import Config
from megatron_vila.training.errors import NonFiniteError, NothingToLearnError, TooManyBrokenError
from megatron_vila.training.optimizer import PARTS

DATA_COUNTS = ("drawn", "left_out_broken", "left_out_too_long", "truncated", "unsupervised")
"""Counts of ``StepPlan`` that are summed over the run and reported."""


@dataclass(frozen=True)
class Outcome:
    """The result of a step, equal on all ranks. ``lr`` has the learning rates that it used."""

    loss: float
    supervised: int
    updated: bool
    grad_norm: float
    lr: dict[str, float]


class UpdateGuard:
    """Judges steps that changed no weight. An epoch has ``epoch`` samples; if as many in succession have no label, there is
    nothing to learn."""

    def __init__(self, config: Config, epoch: int) -> None:
        self._config, self._epoch = config, epoch
        self._without_labels, self._skips_in_a_row = 0, 0

    def judge(self, step: int, outcome: Outcome, drawn: int, skipped: int, say: Callable[[str], None]) -> None:
        """Call ``say`` if ``step``, for which ``drawn`` samples were drawn, did not change the weights. ``skipped`` is the number
        of updates skipped so far.

        Raises ``NonFiniteError`` as ``train.on_nan`` says and ``NothingToLearnError`` after a whole epoch without a label.
        """
        train = self._config.train
        self._without_labels = 0 if outcome.supervised else self._without_labels + drawn
        self._skips_in_a_row = 0 if outcome.updated or not outcome.supervised else self._skips_in_a_row + 1
        if outcome.updated:
            return
        if not outcome.supervised:
            say(f"step {step} has no supervised token: nothing updated")
            if self._without_labels >= self._epoch:
                raise NothingToLearnError(
                    f"a whole epoch of data.train={self._config.data.train} held no supervised token; the samples need answers "
                    "(turns from gpt) that fit into train.seq_length"
                )
            return
        rates = f"optim.lr={self._config.optim.lr}"
        for part in PARTS:
            if getattr(self._config.optim, part).lr is not None:
                rates += f", optim.{part}.lr={getattr(self._config.optim, part).lr}"
        what = f"step {step} gives loss {outcome.loss} and gradient norm {outcome.grad_norm}"
        cure = f"look at the data of this step and at {rates}"
        if train.on_nan == "stop":
            raise NonFiniteError(
                f"{what}, and train.on_nan=stop: the run ends, weights and checkpoints are as before the step; {cure}, or drop "
                "such updates with train.on_nan=skip"
            )
        say(f"{what}: update skipped ({skipped} so far)")
        if self._skips_in_a_row > train.max_skips:
            raise NonFiniteError(
                f"{what}: {self._skips_in_a_row} updates skipped in a row, more than train.max_skips={train.max_skips}; {cure}"
            )


def too_many_broken(config: Config, counts: Mapping[str, int], step: int, at_least: int) -> TooManyBrokenError | None:
    """The error for more broken samples than ``data.max_broken`` allows, else None; also if fewer than ``at_least`` were drawn.

    The caller saves the run before it raises the error.
    """
    broken, drawn = counts["left_out_broken"], counts["drawn"]
    if drawn < at_least or broken <= config.data.max_broken * drawn:
        return None
    return TooManyBrokenError(
        f"{broken} of the {drawn} samples drawn in {step} steps were broken ({100 * broken / drawn:.1f} %), more than "
        f"data.max_broken={config.data.max_broken} allows; the log names them, and `python -m megatron_vila.data check` "
        "finds all. The counts stay with the run: after mending the files continue with a higher data.max_broken, or start over"
    )
