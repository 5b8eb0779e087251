"""The Ray Tune trainable: an actor that is used again for every trial and runs each in a child process."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ray import tune

from acmds_tune.child import Task, TrialProcess

STEP_S = 1.0
"""Seconds after which a step returns without news, so that the actor can always be spoken to."""


class TrialRunner(tune.Trainable):
    """Runs the trial in `config["task"]`. A result has `progress` or `ended` as JSON text, or neither."""

    _task: Task
    _trial: TrialProcess | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial. It starts with the first step.

        Ray may have asked for this actor and then give its trial to another one that has become free: that one alone
        is asked to step.
        """
        self._task = Task(**config["task"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same actor. False would make Ray wait for ever."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """News of the running trial."""
        if self._trial is None:
            self._trial = TrialProcess(self._task)
        progress = self._trial.poll(STEP_S)
        result: dict[str, Any] = {"done": self._trial.ended is not None}
        if progress is not None:
            result["progress"] = json.dumps(progress)
        if self._trial.ended is not None:
            result["ended"] = json.dumps(asdict(self._trial.ended))
        return result

    def cleanup(self) -> None:
        """Nothing of the trial may outlive the actor's use for it."""
        if self._trial is not None and self._trial.ended is None:
            self._trial.kill()
        self._trial = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Trials are started anew, never restored."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Trials are started anew, never restored."""
