"""Errors that end a run with a message for its user instead of a traceback."""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """Loss or gradients are not finite and the run was told to stop, or skipped too many updates in a row."""


class NothingToLearnError(RuntimeError):
    """No step of a whole epoch held a supervised token."""
