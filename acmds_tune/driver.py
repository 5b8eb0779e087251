"""What a search does next, whoever runs its trials: which trial to start, which to stop, when to end.

Knows nothing of Ray. A backend asks `next_task`, passes on what the trials say, and is told here what to do.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from acmds_tune.child import Task, request_stop
from acmds_tune.objective import Ended
from acmds_tune.report import write_data
from acmds_tune.space import Space
from acmds_tune.stages import LATER, Extra, Sample, Wait, planned_after

if TYPE_CHECKING:
    from acmds_tune.progress import Display
    from acmds_tune.study import SearchStudy

logger = logging.getLogger(__name__)

INTERRUPTED = "the search was interrupted"
OUT_OF_TIME = "the minutes of the search were over"
PRUNED = "pruned: behind other trials at the same point"

ALIKE = 5
"""So many first trials that all fail for one reason end the search: the next one would fail as well."""

WRITING = 0.1
"""Share of the time that may go into the tables: where they take longer, they are not written after each trial."""


@dataclass
class _Running:
    started: float
    stage: str
    stop_reason: str = ""


class Driver:
    """Decides for a search. Not thread-safe, except `interrupt`.

    Args:
        study: proposes and learns.
        space: what is searched.
        objective: `package.module:function` that every trial runs.
        sharers: trials at once.
        display: is told what happens.
    """

    def __init__(
        self,
        study: SearchStudy,
        space: Space,
        *,
        objective: str,
        sharers: int,
        display: Display,
    ) -> None:
        self.study = study
        self.space = space
        self.sharers = sharers
        self.ending = ""
        """Why no further trial is started; empty while there is no such reason."""
        self.stopping = False
        """Whether somebody asked the running trials to end as well."""
        self._objective = objective
        self._display = display
        self._running: dict[int, _Running] = {}
        self._short_s: list[float] = []
        self._full_s: list[float] = []
        """How long trials took: those with a share of the budget, and those with the whole of it."""
        self._unwritten = False
        """A trial has ended that is not in the tables yet."""
        self._write_next = 0.0
        self._later = planned_after(space)  # trials of the later stages that are still to come
        self._failures: list[str] | None = []  # reasons of the failed trials while no other has ended
        minutes = space.budget.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._half_time = self._deadline - 30 * minutes if minutes else float("inf")

    def interrupt(self, *, stop: bool) -> None:
        """Start nothing more, and with `stop` end the running trials. May be called from a signal handler."""
        self.ending = INTERRUPTED
        self.stopping |= stop
        self.study.interrupt()

    @property
    def done(self) -> bool:
        """Nothing more is to be started."""
        if self.ending:
            return True
        if self.study.missing == 0:
            return True
        now = time.monotonic()
        one_more = self._expected_s("screen" if self.space.screen.trials else "search")
        after = (one_more + max(0, self._later) * self._expected_s("train")) / self.sharers
        if not self.study.enough and now + after > self._deadline and now > self._half_time:
            self.study.enough = True  # what comes after the search still has its time, but at most half of it all
        step = self.study.next_step()
        expected = self._expected_s(step.stage) if isinstance(step, Sample | Extra) else 0.0
        if now + expected > self._deadline or (self.study.enough and step is None):
            self.ending = OUT_OF_TIME
        return bool(self.ending)

    def _expected_s(self, stage: str) -> float:
        """How long a trial of this stage will take by those before it; 0 while nothing is known."""
        short, full = (statistics.median(each) if each else 0.0 for each in (self._short_s, self._full_s))
        return short if self._is_short(stage) else full or short / self.space.screen.share

    def _is_short(self, stage: str) -> bool:
        """Trials of this stage have a share of the budget only; anchors are like the trials that they stand among."""
        return stage == "screen" or (stage == "anchor" and self.space.screen.trials > 0)

    @property
    def idle(self) -> bool:
        """Nothing is running."""
        return not self._running

    def next_task(self) -> Task | None:
        """A trial to start now; None where all places are taken or nothing more is to be started."""
        if self.done or len(self._running) >= self.sharers or isinstance(self.study.next_step(), Wait):
            self._write()  # while the next trial starts: Ray asks at once for one more
            return None
        proposal = self.study.propose()
        self._running[proposal.number] = _Running(time.monotonic(), proposal.stage)
        self._later -= proposal.stage in LATER
        what = proposal.label if proposal.stage == "search" else f"{proposal.stage} {proposal.label}".strip()
        most = proposal.settings.get("max_seconds")
        self._display.started(proposal.number, proposal.values, what, max_seconds=most)
        return Task(
            number=proposal.number,
            seed=proposal.seed,
            settings=proposal.settings,
            directory=str(self.study.trial_directory(proposal.number)),
            objective=proposal.objective or self._objective,
            working_directory=self.study.working_directory,
            import_path=self.study.import_path,
            sharers=self.sharers,
            gpu_shared=self.space.resources.gpus_per_trial < 1 and self.sharers > 1,
            trial_timeout_s=self.space.timeouts.trial,
            silence_timeout_s=self.space.timeouts.silence,
            neighbour=[] if proposal.stage == "plant" else [(step.at, step.holds_gb) for step in self.space.neighbour],
            host_memory_gb=self.space.resources.host_memory_gb,
        )

    def heard(self, number: int, progress: Mapping[str, Any] | None) -> None:
        """A running trial is alive, perhaps with a progress report."""
        self._write()
        if progress is not None:
            self._display.progressed(number, progress)
            if self.study.should_prune(number, progress):
                self._stop(number, PRUNED)
        if time.monotonic() > self._deadline:
            self.ending = self.ending or OUT_OF_TIME
            self._stop(number, OUT_OF_TIME)
        if self.stopping:
            self._stop(number, INTERRUPTED)

    def _stop(self, number: int, reason: str) -> None:
        running = self._running[number]
        if not running.stop_reason:
            running.stop_reason = reason
            request_stop(self.study.trial_directory(number), reason)

    def ended(self, number: int, ended: Ended, progress: Mapping[str, Any] | None = None) -> None:
        """A trial is over, perhaps with a last progress report: tell the study.

        All tables and best.json are written once another trial runs, which need not wait for them.
        """
        self._write()
        if progress is not None:
            self.study.should_prune(number, progress)  # too late for it, but others are compared with it
        running = self._running.pop(number)
        if not ended.seconds:
            ended = replace(ended, seconds=time.monotonic() - running.started)
        interrupted = ended.status == "stopped" and ended.reason in (INTERRUPTED, OUT_OF_TIME)
        # a batch system sends its signal to all processes: a trial may end itself, or die, before it is asked to stop
        interrupted |= self.stopping and ended.status in ("stopped", "crashed") and ended.reason != PRUNED
        status = self.study.finish(number, ended, interrupted=interrupted)
        if not interrupted:
            if running.stage != "plant":  # that is as long as it needs to be
                durations = self._short_s if self._is_short(running.stage) else self._full_s
                durations.append(time.monotonic() - running.started)
            self._give_up_if_all_fail(status, ended.reason)
        self._display.ended(number, status, replace(ended, reason=self.study.reason(number)))
        self._unwritten = True
        if self.done:
            self._write_next = 0.0
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        if self._unwritten and began >= self._write_next:
            self._unwritten = False
            write_data(self.study.directory, self.study.record())
            # the more trials, the longer it takes: of thousands of short ones it would be most of the time
            self._write_next = began + (time.monotonic() - began) / WRITING

    def abandon(self) -> None:
        """Give up the trials that run: they are rows that do not count, and are tried again when it is resumed."""
        for number, running in list(self._running.items()):
            seconds = time.monotonic() - running.started
            self.study.finish(number, Ended("stopped", INTERRUPTED, seconds=seconds), interrupted=True)
        self._running.clear()

    def _give_up_if_all_fail(self, status: str, reason: str) -> None:
        if self._failures is None or status in ("ok", "infeasible", "stopped"):
            self._failures = None
            return
        # numbers differ from trial to trial: bytes, seconds, the trial's own folder
        self._failures.append(f"{status}: {re.sub(r'[0-9.]+', '#', reason)}")
        if len(self._failures) == ALIKE and len(set(self._failures)) == 1 and self.study.missing:
            self.ending = f"the first {ALIKE} trials all ended alike ({status}: {reason})"
