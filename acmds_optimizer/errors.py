"""What can go wrong for a user of ACMDS, with the exit code that the command lines give it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ACMDSError(Exception):
    """Root of all errors meant for users. `exit_code` is 2 for wrong usage and 1 for a failed run."""

    exit_code = 1


class ConfigError(ACMDSError):
    """Settings that cannot be used. Lists every problem at once."""

    exit_code = 2

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem{'s' if len(problems) != 1 else ''}\n{lines}")

    def __reduce__(self) -> tuple[type, tuple[str, list[str]]]:
        return type(self), (self.source, self.problems)


class DataError(ACMDSError):
    """Data or a model that cannot be used as asked."""

    exit_code = 2


class CheckpointError(ACMDSError):
    """A file that is not a whole checkpoint of this project."""

    exit_code = 2


class OutOfMemoryForGoodError(ACMDSError):
    """A step did not fit even at micro-batch 1, or not within the allowed tries. Says what to change.

    `events` are the errors that led to it, oldest first; `partial` is the Outcome of the run until then, if any.
    """

    def __init__(self, message: str, events: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.events = tuple(events)
        self.partial: Any = None


class DivergedError(ACMDSError):
    """The training loss is not finite."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.partial: Any = None
        super().__init__(
            f"the loss is not finite at step {step}: lower --lr, lengthen --warmup-fraction, or use --no-enable-amp"
        )

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.step,)


class RankFailedError(ACMDSError):
    """Another of the processes that train together gave up, or is gone."""


def first_line(said: object) -> str:
    """The first line of an error, or of its message; PyTorch's go on for many. Empty where it says nothing."""
    return str(said).partition("\n")[0]
