"""Errors that end a run with a message for its user instead of a traceback."""

from __future__ import annotations

from megatron_vila.errors import UserError


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradients are not finite and the run was told to stop, or skipped too many updates in a row."""


class NoMemoryError(UserError, RuntimeError):
    """The GPU has too little memory for the run; the text names the part that is largest and the setting that shrinks it."""


class TooManyBrokenError(UserError, RuntimeError):
    """A larger share of the samples was broken than data.max_broken allows; the run is saved."""


class NothingToLearnError(UserError, RuntimeError):
    """No step of a whole epoch held a supervised token."""
