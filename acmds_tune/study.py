"""The search's memory: an Optuna study in a journal file, which is the truth about every trial.

Here a proposal becomes settings to train with, and an end becomes what the sampler learns from. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from acmds_optimizer.config import TrainConfig, build, to_dict
from acmds_optimizer.errors import ConfigError
from acmds_tune.journal import JOURNAL, hold, make_new, mend, readable
from acmds_tune.objective import Ended, read_outcome
from acmds_tune.space import Parameter, Space, derived_seed, ordered, space_differences

logger = logging.getLogger(__name__)

optuna.logging.set_verbosity(optuna.logging.ERROR)

CACHE = "decoded"
"""Folder in that of the study where trials share decoded images, until all trials are run."""

BAD_END_VIOLATION = 100.0
"""What the sampler is told of a trial that ran out of memory for good, raised, died or hung: far from feasible."""

PRUNER_REPORT_PERCENT = 5
"""A running trial is judged each time it has come this much further."""


@dataclass(frozen=True)
class Proposal:
    """A trial to run: `settings` are all settings of the trainer, `values` the searched ones among them."""

    number: int
    seed: int
    values: dict[str, Any]
    settings: dict[str, Any]


class SearchStudy:
    """Proposes trials and learns from their ends. One process at a time holds a study.

    Args:
        directory: folder of the study.
        space: what is searched.
        study: the Optuna study in the folder's journal.
        lock: open descriptor that holds the folder for this process.
    """

    def __init__(self, directory: Path, space: Space, study: optuna.Study, lock: int) -> None:
        self.directory = directory
        self.space = space
        self._study = study
        self._lock = lock
        self._running: dict[int, optuna.trial.Trial] = {}
        self._percent: dict[int, int] = {}
        self._constraints = space.parsed_constraints
        self._order = ordered(space.search) or []
        about = study.user_attrs["acmds"]
        self.working_directory: str = about["working_directory"]
        """Where relative paths of the settings start, also where the search is resumed from another folder."""
        if not Path(self.working_directory).is_dir():
            logger.warning("%s is gone; relative paths start in %s", self.working_directory, Path.cwd())
            self.working_directory = str(Path.cwd())
        here = [entry or str(Path.cwd()) for entry in sys.path]
        self.import_path: list[str] = [*here, *(entry for entry in about["import_path"] if entry not in here)]
        """Where trials look for the user's own modules: as this process does, then as the first search did."""

    # --- beginning

    @classmethod
    def create(cls, directory: Path, space: Space, yaml_text: str, fixed: Mapping[str, str]) -> SearchStudy:
        """Start a study in the new folder `directory`. `fixed` is what `--set` added to the file.

        Raises:
            ConfigError: the folder exists, or cannot be made.
        """
        make_new(directory)
        (directory / "study.yaml").write_text(yaml_text, encoding="utf-8")
        lock = hold(directory)
        study = optuna.create_study(
            study_name=space.name,
            storage=_storage(directory),
            directions=[objective.direction for objective in space.objective],
            sampler=_sampler(space, derived_seed(space.seed, 0)),
            pruner=_pruner(space),
        )
        about = {
            "name": space.name,
            "objectives": [objective.model_dump() for objective in space.objective],
            "constraints": space.constraints,
            "parameters": list(space.search),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "yaml": yaml_text,
            "space": space.model_dump(mode="json"),
            "set": dict(fixed),
            "working_directory": str(Path.cwd()),
            "import_path": [entry or str(Path.cwd()) for entry in sys.path],
        }
        study.set_user_attr("acmds", about)
        study.enqueue_trial(default_values(space))
        return cls(directory, space, study, lock)

    @classmethod
    def resume(cls, directory: Path, space: Space) -> SearchStudy:
        """Go on with the study in `directory`, with what its sampler knows.

        Trials that were running when the search was killed are finished with their outcome.json if they have one;
        the others become rows with status `crashed` and their settings are tried once more.

        Raises:
            ConfigError: there is no study, or `space` differs from what the study was started with.
            StudyBusyError: a search is writing to it.
        """
        lock = hold(directory)
        try:
            return cls._resume(directory, space, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _resume(cls, directory: Path, space: Space, lock: int) -> SearchStudy:
        mend(directory / JOURNAL)
        about = read_about(directory)
        # through the model, so that keys which are newer than the study have their defaults
        before = Space.model_validate(about["space"]).model_dump(mode="json")
        differences = space_differences(before, space.model_dump(mode="json"))
        if differences:
            raise ConfigError(
                str(directory),
                [*differences, "a changed search is another study: give it another --name, or undo the change"],
            )
        study = optuna.load_study(study_name=about["name"], storage=_storage(directory), pruner=_pruner(space))
        started = sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        study.set_user_attr("acmds", {**about, "space": space.model_dump(mode="json")})
        # the same seed would propose the same points again
        study.sampler = _sampler(space, derived_seed(space.seed, -1 - started))
        self = cls(directory, space, study, lock)
        self._end_interrupted()
        return self

    def _end_interrupted(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._running[trial.number] = optuna.trial.Trial(self._study, trial._trial_id)
            ended = read_outcome(self.trial_directory(trial.number))
            if ended is not None and ended.status != "stopped":
                self.finish(trial.number, ended)
            else:
                reason = "the search was ended while it ran"
                self.finish(trial.number, Ended("crashed", reason), interrupted=True)

    def close(self) -> None:
        """Let go of the study, so that another process may hold it."""
        os.close(self._lock)

    # --- trials

    def trial_directory(self, number: int) -> Path:
        """Folder of trial `number`."""
        return self.directory / "trials" / f"{number:04d}"

    @property
    def told(self) -> int:
        """Trials that ended in a way that counts; an interrupted one does not, it is replaced."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    @property
    def missing(self) -> int:
        """Trials still to be started."""
        return max(0, self.space.trials - self.told - len(self._running))

    def propose(self) -> Proposal:
        """The next trial. It must be given to `finish` some time."""
        trial = self._study.ask()
        self._running[trial.number] = trial
        values: dict[str, Any] = {}
        for name in self._order:
            parameter = self.space.search[name]
            if all(values.get(other) in allowed for other, allowed in (parameter.when or {}).items()):
                values[name] = _suggest(trial, name, parameter)
        seed = self.space.trial_seed(trial.number)
        settings = {**self.space.settings(values), "seed": seed}
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("config", self._config_to_train_on(settings))
        trial_settings = {**settings, **self.space.trial_limits(), "decoded_cache": str(self.directory / CACHE)}
        return Proposal(trial.number, seed, values, trial_settings)

    def _config_to_train_on(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Every setting as the trial has it, but without the trial's budget and folder: what best.json holds."""
        try:
            return to_dict(build(TrainConfig, settings, "proposal"))
        except ConfigError:  # searched values that do not go together; the trial will say so
            return {**to_dict(TrainConfig()), **settings}

    def should_prune(self, number: int, progress: Mapping[str, Any]) -> bool:
        """Take in a progress report of a running trial; true where the pruner would end it now."""
        if self.space.pruner == "none":
            return False
        # on a grid, because the pruners compare trials that have a value at exactly the same step
        percent = _percent(progress, self.space.budget.seconds) // PRUNER_REPORT_PERCENT * PRUNER_REPORT_PERCENT
        value = progress.get({"train_loss": "loss"}.get(self.space.objective[0].name, self.space.objective[0].name))
        if value is None or not math.isfinite(value) or percent < self._percent.get(number, 0) + PRUNER_REPORT_PERCENT:
            return False
        self._percent[number] = percent
        trial = self._running[number]
        trial.report(value, percent)
        return trial.should_prune()

    def finish(self, number: int, ended: Ended, *, interrupted: bool = False) -> str:
        """Write a trial's row and tell the sampler.

        A bad end is told as a trial with a violated constraint and its last measured values: Optuna's samplers ignore
        failed trials, and would propose the same again. Only an interrupted trial is told as failed, since its end says
        nothing about its settings; they are tried once more.

        Returns:
            The trial's status: that of `ended`, or `infeasible` where it ended well but broke a constraint or has
            no value of an objective.
        """
        trial = self._running.pop(number)
        figures = {**ended.figures, "seconds": ended.seconds}
        violations = [constraint.violation(figures.get(constraint.figure)) for constraint in self._constraints]
        status, reason = ended.status, ended.reason
        broken = [
            f"{text} ({_plain(figures.get(constraint.figure))})"
            for text, constraint, value in zip(self.space.constraints, self._constraints, violations, strict=True)
            if value > 0
        ]
        # not finite, or there were no validation samples: what the sampler is told in its place is not a result
        unmeasured = [goal.name for goal in self.space.objective if figures.get(goal.name) is None]
        if status == "ok" and (broken or unmeasured):
            status = "infeasible"
            parts = ["broke " + ", ".join(broken)] if broken else []
            reason = "; ".join([*parts, *(f"{name} was not measured" for name in unmeasured)])
        violations.append(max(self._end_violation(number, status), 1.0 if unmeasured else 0.0))
        for name, value in figures.items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("status", status)
        if interrupted:
            self._try_again(trial)
            self._study.tell(trial, state=TrialState.FAIL)
            return status
        trial.set_user_attr("constraints", violations)
        for index, value in enumerate(violations):
            trial.set_constraint(str(index), value)
        self._study.tell(trial, self._values(figures))
        return status

    def _end_violation(self, number: int, status: str) -> float:
        if status in ("ok", "infeasible"):
            return 0.0
        if status == "stopped":  # pruned: the further it came, the better it was
            return max(0.01, 1.0 - self._percent.get(number, 0) / 100)
        return BAD_END_VIOLATION

    def _try_again(self, trial: optuna.trial.Trial) -> None:
        if "retry_of" not in trial.user_attrs:  # once: perhaps it was these settings that ended the search
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            enqueued = frozen.system_attrs.get("fixed_params", {})
            self._study.enqueue_trial({**enqueued, **frozen.params}, user_attrs={"retry_of": trial.number})

    def _values(self, figures: Mapping[str, Any]) -> list[float]:
        """The objectives' values; the worst seen so far for one that was not measured."""
        result = []
        for objective in self.space.objective:
            value = figures.get(objective.name)
            if value is None:
                trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
                seen = [trial.user_attrs[objective.name] for trial in trials if objective.name in trial.user_attrs]
                maximize = objective.direction == "maximize"
                value = min([*seen, 0.0]) if maximize else max(seen, default=1000.0)
            result.append(float(value))
        return result


def default_values(space: Space) -> dict[str, Any]:
    """The trainer's defaults of the searched settings, moved into the space; without those that have no default."""
    defaults = to_dict(TrainConfig())
    result = {}
    for name, parameter in space.search.items():
        value = defaults[name]
        if parameter.values is not None:
            result[name] = value if value in parameter.values else parameter.values[0]
        elif value is not None:
            assert parameter.low is not None
            assert parameter.high is not None
            clipped = min(max(value, parameter.low), parameter.high)
            if parameter.step is not None:
                clipped = parameter.low + round((clipped - parameter.low) / parameter.step) * parameter.step
            result[name] = type(parameter.low)(clipped)
    return result


def read_about(directory: Path) -> dict[str, Any]:
    """What the study in `directory` was started with: name, objectives, yaml, space, set.

    Raises:
        ConfigError: there is none.
    """
    if not (directory / JOURNAL).is_file():
        raise ConfigError(str(directory), [f"is not the folder of a study: it has no {JOURNAL}"])
    with readable(directory / JOURNAL):
        storage = _storage(directory)
        names = optuna.get_all_study_names(storage)
        about = optuna.load_study(study_name=names[0], storage=storage).user_attrs.get("acmds") if names else None
    if not about:
        raise ConfigError(str(directory / JOURNAL), ["holds no study of acmds-tune"])
    return dict(about)


def _plain(value: Any) -> str:
    return "not measured" if value is None else f"{value:g}"


def _percent(progress: Mapping[str, Any], seconds: float | None) -> int:
    done = progress.get("step", 0) / max(1, progress.get("total_steps") or 1)
    if seconds:
        done = max(done, (progress.get("seconds") or 0.0) / seconds)
    return min(100, int(100 * done))


def _suggest(trial: optuna.trial.Trial, name: str, parameter: Parameter) -> Any:
    if parameter.values is not None:
        return trial.suggest_categorical(name, parameter.values)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.type == "int":
        step = int(parameter.step or 1)
        return trial.suggest_int(name, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def _storage(directory: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(directory / JOURNAL)))


def _sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    startup = min(10, max(4, space.trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if space.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if space.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=False)


def _pruner(space: Space) -> optuna.pruners.BasePruner:
    if space.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=30, interval_steps=PRUNER_REPORT_PERCENT)
    if space.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=20, reduction_factor=2)
    return optuna.pruners.NopPruner()
