"""The two kinds of errors: what a user can cure, and everything else.

A ``UserError`` ends a run with its text as the only message. Any other exception is a fault of the program or of the machine
and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something a user can cure; the text names what was set or found, and what to do."""


class SettingError(UserError, ValueError):
    """A setting that cannot be used, alone or with others; the text names it, its value and the cure."""


class ConfigError(SettingError):
    """A configuration that cannot be used; the message lists every problem with its cure."""


class LaunchError(UserError, RuntimeError):
    """The processes were started in a way that cannot work; the text says how to start them."""


class PeerError(RuntimeError):
    """Another rank failed, and says why; this one ends without a word."""


class StallError(RuntimeError):
    """Ranks waited ``train.timeout_minutes`` for others; the text names those that did not come, and where they stand."""
