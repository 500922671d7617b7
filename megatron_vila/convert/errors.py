"""The error of the converter, which names everything that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vila.errors import UserError


class ConversionError(UserError, ValueError):
    """A checkpoint cannot be converted or compared: ``what`` says which. ``problems`` lists all that were found, with cures."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{what}: {count}\n" + "\n".join(f"- {problem}" for problem in self.problems))
