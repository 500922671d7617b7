"""The error of the converter: everything that is wrong, at once."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vila.errors import UserError


class ConversionError(UserError, ValueError):
    """A checkpoint cannot be converted or compared. ``problems`` are all that were found, each with its cure."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{what}: {count}\n" + "\n".join(f"- {problem}" for problem in self.problems))
