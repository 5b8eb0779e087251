"""What a search does next, whoever runs its trials: which trial to start, which to stop, when to end.

Knows nothing of Ray. A backend asks `next_task`, passes on what the trials say, and is told here what to do.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmds_tune.child import Task
from acmds_tune.objective import Ended
from acmds_tune.report import write_data
from acmds_tune.space import Space

if TYPE_CHECKING:
    from acmds_tune.progress import Display
    from acmds_tune.study import SearchStudy

logger = logging.getLogger(__name__)

INTERRUPTED = "the search was interrupted"
OUT_OF_TIME = "the minutes of the search were over"
PRUNED = "pruned: behind other trials at the same point"


@dataclass
class _Running:
    started: float
    stop_reason: str = ""


class Driver:
    """Decides for a search. Not thread-safe, except `interrupt`.

    Args:
        study: proposes and learns.
        space: what is searched.
        objective: `package.module:function` that every trial runs.
        sharers: trials at once.
        request_stop: called with a trial's folder and the reason when a trial is to end early.
        display: is told what happens.
    """

    def __init__(
        self,
        study: SearchStudy,
        space: Space,
        *,
        objective: str,
        sharers: int,
        request_stop: Callable[[Path, str], None],
        display: Display,
    ) -> None:
        self.study = study
        self.space = space
        self.sharers = sharers
        self.ending = ""
        """Why no further trial is started; empty while there is no such reason."""
        self._objective = objective
        self._request_stop = request_stop
        self._display = display
        self._running: dict[int, _Running] = {}
        self._durations: list[float] = []
        minutes = space.budget.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def interrupt(self) -> None:
        """Start nothing more and end the running trials, as on Ctrl-C. May be called from a signal handler."""
        self.ending = INTERRUPTED

    @property
    def done(self) -> bool:
        """Nothing more is to be started."""
        if not self.ending and self.study.missing == 0:
            return True
        if not self.ending and self._durations:
            expected = statistics.median(self._durations)
            if time.monotonic() + expected > self._deadline:
                self.ending = OUT_OF_TIME
        if not self.ending and time.monotonic() > self._deadline:
            self.ending = OUT_OF_TIME
        return bool(self.ending) or self.study.missing == 0

    @property
    def idle(self) -> bool:
        """Nothing is running."""
        return not self._running

    def next_task(self) -> Task | None:
        """A trial to start now; None where all places are taken or nothing more is to be started."""
        if self.done or len(self._running) >= self.sharers:
            return None
        proposal = self.study.propose()
        self._running[proposal.number] = _Running(time.monotonic())
        self._display.started(proposal.number, proposal.values)
        return Task(
            number=proposal.number,
            seed=proposal.seed,
            settings=proposal.settings,
            directory=str(self.study.trial_directory(proposal.number)),
            objective=self._objective,
            working_directory=str(Path.cwd()),
            import_path=[entry or str(Path.cwd()) for entry in sys.path],
            sharers=self.sharers,
            trial_timeout_s=self.space.timeouts.trial,
            silence_timeout_s=self.space.timeouts.silence,
        )

    def heard(self, number: int, progress: Mapping[str, Any] | None) -> None:
        """A running trial is alive, perhaps with a progress report."""
        if progress is not None:
            self._display.progressed(number, progress)
            if self.study.should_prune(number, progress):
                self._stop(number, PRUNED)
        if time.monotonic() > self._deadline:
            self.ending = self.ending or OUT_OF_TIME
            self._stop(number, OUT_OF_TIME)
        if self.ending == INTERRUPTED:
            self._stop(number, INTERRUPTED)

    def _stop(self, number: int, reason: str) -> None:
        running = self._running[number]
        if not running.stop_reason:
            running.stop_reason = reason
            self._request_stop(self.study.trial_directory(number), reason)

    def ended(self, number: int, ended: Ended) -> None:
        """A trial is over: write its row, all tables, and best.json."""
        running = self._running.pop(number)
        if not ended.seconds:
            ended = replace(ended, seconds=time.monotonic() - running.started)
        interrupted = ended.status == "stopped" and ended.reason in (INTERRUPTED, OUT_OF_TIME)
        status = self.study.finish(number, ended, interrupted=interrupted)
        if not interrupted:
            self._durations.append(time.monotonic() - running.started)
        self._display.ended(number, status, ended)
        write_data(self.study.directory)


def request_stop_by_file(directory: Path, reason: str) -> None:
    """Ask the trial in `directory` to stop, on whatever machine it runs that shares the folder."""
    from acmds_tune.trainable import STOP_FILE

    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{STOP_FILE}.{os.getpid()}"
    temporary.write_text(reason, encoding="utf-8")
    temporary.replace(directory / STOP_FILE)
