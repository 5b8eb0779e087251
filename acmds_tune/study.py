"""The search's memory: an Optuna study in a journal file, which is the truth about every trial.

Here a proposal becomes settings to train with, and an end becomes what the sampler learns from. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from acmds_optimizer.config import TrainConfig, build, to_dict
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.files import replacing
from acmds_tune.journal import JOURNAL, hold, make_new, mend
from acmds_tune.objective import DEFAULT_OBJECTIVE, Ended, read_outcome, share_done
from acmds_tune.plant import PLANT_FILE, Plant, read_plant, simulate
from acmds_tune.prescreen import FROM_PLANT, best_on_plant, misled
from acmds_tune.records import DEFAULT, StudyRecord
from acmds_tune.report import is_row, record, trial_dir
from acmds_tune.requires import Requirement, all_hold, nearest_allowed, parse_requirement
from acmds_tune.samplers import (
    PRUNER_REPORT_PERCENT,
    WITHOUT_CONSTRAINTS,
    OnlySampled,
    contains,
    distribution,
    new_pruner,
    new_sampler,
    suggest,
)
from acmds_tune.space import Space, derived_seed, ordered, space_differences
from acmds_tune.stages import SAMPLED, Extra, Sample, Step, Wait, default_values, left, next_step
from acmds_tune.storage import Journal, about_of, open_study, read_about
from acmds_tune.warm_start import best_settings, fingerprint, usable_trials

logger = logging.getLogger(__name__)

optuna.logging.set_verbosity(optuna.logging.ERROR)

CACHE = "decoded"
"""Folder in that of the study where trials share decoded images, until all trials are run."""

BAD_END_VIOLATION = 100.0
"""What the sampler is told of a trial that ran out of memory for good, raised, died or hung: far from feasible."""


@dataclass(frozen=True)
class Proposal:
    """A trial to run: `settings` are all settings of the trainer, `values` the searched ones among them."""

    number: int
    seed: int
    values: dict[str, Any]
    settings: dict[str, Any]
    stage: str = "search"
    label: str = ""
    objective: str | None = None
    """What runs it; None: as all others."""


class SearchStudy:
    """Proposes trials and learns from their ends. One process at a time holds a study.

    Args:
        directory: folder of the study.
        space: what is searched.
        study: the Optuna study in the folder's journal.
        journal: that journal.
        lock: open descriptor that holds the folder for this process.
    """

    def __init__(self, directory: Path, space: Space, study: optuna.Study, journal: Journal, lock: int) -> None:
        self.directory = directory
        self.space = space
        self._study = study
        self._journal = journal
        self._sampled = OnlySampled(study)
        self._lock = lock
        self._running: dict[int, optuna.trial.Trial] = {}
        self.enough = False
        """The sampler is asked for no more, because the time that is left is needed for the later stages."""
        self._step: tuple[Step, int, tuple[int, int, bool]] | None = None
        self._requirements: list[Requirement] = [parse_requirement(text) for text in space.requires]
        self._default = self._allowed(default_values(space), derived_seed(space.seed, -(2**32)))
        self._plant: Plant | None = None
        self._screening: Future[list[dict[str, Any]]] | None = None
        """The settings that are best on the plant, until they are enqueued."""
        self._ends = False
        self._percent: dict[int, int] = {}
        self._seconds: dict[int, float | None] = {}
        """What each running trial may train at most."""
        self._constraints = space.parsed_constraints
        self._order = ordered(space.search) or []
        about = study.user_attrs["acmds"]
        self.working_directory: str = about.get("working_directory", str(Path.cwd()))  # early studies lack it
        """Where relative paths of the settings start, also where the search is resumed from another folder."""
        if not Path(self.working_directory).is_dir():
            logger.warning("%s is gone; relative paths start in %s", self.working_directory, Path.cwd())
            self.working_directory = str(Path.cwd())
        here = [entry or str(Path.cwd()) for entry in sys.path]
        self.import_path: list[str] = [*here, *(entry for entry in about.get("import_path", []) if entry not in here)]
        """Where trials look for the user's own modules: as this process does, then as the first search did."""

    @property
    def objective(self) -> str:
        """`package.module:function` that the trials run."""
        return self._study.user_attrs["acmds"].get("objective") or DEFAULT_OBJECTIVE

    # --- beginning

    @classmethod
    def create(
        cls,
        directory: Path,
        space: Space,
        yaml_text: str,
        fixed: Mapping[str, str],
        objective: str = DEFAULT_OBJECTIVE,
    ) -> SearchStudy:
        """Start a study in the new folder `directory`. `fixed` is what `--set` added to the file.

        `objective` is the `package.module:function` that its trials will run, also where it is resumed.

        Raises:
            ConfigError: the folder exists, or cannot be made; there is no study to warm up with, or no such sampler.
        """
        sampler = new_sampler(space, derived_seed(space.seed, 0))
        for folder in space.warm_start:
            read_about(Path(folder))
        make_new(directory)
        lock = hold(directory)
        for left_over in (directory / JOURNAL, directory / f"{JOURNAL}.lock"):
            left_over.unlink(missing_ok=True)
        (directory / "study.yaml").write_text(yaml_text, encoding="utf-8")
        journal = Journal(directory / JOURNAL)
        study = optuna.create_study(
            study_name=space.name,
            storage=JournalStorage(journal),
            directions=[objective.direction for objective in space.objective],
            sampler=sampler,
            pruner=new_pruner(space),
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
            "fingerprint": fingerprint(space),
            "objective": objective,
            "working_directory": str(Path.cwd()),
            "import_path": [entry or str(Path.cwd()) for entry in sys.path],
        }
        study.set_user_attr("acmds", about)
        self = cls(directory, space, study, journal, lock)
        study.enqueue_trial(self._default, user_attrs={"label": DEFAULT})
        for folder in space.warm_start:
            self.learn_from(Path(folder))
        return self

    def learn_from(self, other: Path) -> int:
        """Try the best settings of another study first; where it measured the same thing, its trials are known here.

        Returns:
            How many trials of it are known here now.

        Raises:
            ConfigError: there is no study in `other`, or it is this one.
        """
        other = other.resolve()
        if other == self.directory.resolve():
            raise ConfigError(str(other), ["is the same study; its trials are known to it"])
        opened, ours = open_study(other), self._study.get_trials(deepcopy=False)
        theirs, about = record(opened, other), about_of(opened, other)
        label = f"from {theirs.name}"
        tried = [
            {name: value for name, value in values.items() if self.space.search[name].applies(values)}
            for each in ours
            if "earlier" not in each.user_attrs and each.user_attrs.get("stage", SAMPLED[-1]) in SAMPLED
            for values in [each.params or each.system_attrs.get("fixed_params", {})]  # started, or waiting
        ]
        taken = {each.user_attrs.get("earlier_trial") for each in ours if each.user_attrs.get("earlier") == str(other)}
        for values in best_settings(theirs, self.space):
            if values not in tried:
                tried.append(values)
                self._study.enqueue_trial(values, user_attrs={"label": label})
        differences = space_differences(about.get("fingerprint", {}), fingerprint(self.space))
        if (measured_by := about.get("objective") or DEFAULT_OBJECTIVE) != self.objective:
            differences.append(f"objective function: {measured_by} there, {self.objective} here")
        if differences:
            logger.warning(
                "%s was not measured under the same conditions, so only its best settings are taken: %s",
                other, "; ".join(differences),
            )  # fmt: skip
            return 0
        count = 0
        for row, params in usable_trials(theirs, self.space):
            if row.number in taken:
                continue
            blind = self.space.sampler in WITHOUT_CONSTRAINTS and not row.feasible
            known = optuna.trial.create_trial(
                params=params,
                distributions={name: distribution(self.space.search[name]) for name in params},
                values=self._values({}) if blind else list(row.values or ()),
                user_attrs={"earlier": str(other), "earlier_trial": row.number},
                system_attrs={f"constraints:{index}": value for index, value in enumerate(row.violations)},
            )
            self._study.add_trial(known)
            count += 1
        return count

    @classmethod
    def resume(
        cls,
        directory: Path,
        space: Space,
        yaml_text: str | None = None,
        fixed: Mapping[str, str] | None = None,
        objective: str | None = None,
    ) -> SearchStudy:
        """Go on with the study in `directory`, with what its sampler knows.

        Trials that were running when the search was killed are finished with their outcome.json if they have one;
        the others become rows with status `crashed` and their settings are tried once more. `yaml_text` and `fixed`,
        the file and `--set` as they are now, are kept in place of those that the study was started with. No `objective`
        is the one that it was started with.

        Raises:
            ConfigError: there is no study, or `space` or `objective` differs from what the study was started with.
            StudyBusyError: a search is writing to it.
        """
        lock = hold(directory)
        try:
            self = cls._resume(directory, space, lock, objective)
            if yaml_text is not None:
                about = self._study.user_attrs["acmds"]
                self._study.set_user_attr("acmds", {**about, "yaml": yaml_text, "set": dict(fixed or {})})
                with replacing(directory / "study.yaml") as temporary:
                    temporary.write_text(yaml_text, encoding="utf-8")
            return self
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _resume(cls, directory: Path, space: Space, lock: int, objective: str | None) -> SearchStudy:
        mend(directory / JOURNAL)
        about = read_about(directory)
        # through the model, so that keys which are newer than the study have their defaults
        before = Space.model_validate(about["space"]).model_dump(mode="json")
        differences = space_differences(before, space.model_dump(mode="json"))
        kept = about.get("objective") or objective  # early studies lack it
        if objective not in (None, kept):  # figures of two functions are no one study
            differences.append(f"objective function: {kept} in the study, {objective} now")
        if differences:
            raise ConfigError(
                str(directory),
                [*differences, "a changed search is another study: give it another --name, or undo the change"],
            )
        journal = Journal(directory / JOURNAL)
        study = optuna.load_study(study_name=about["name"], storage=JournalStorage(journal), pruner=new_pruner(space))
        started = sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        study.set_user_attr("acmds", {**about, "space": space.model_dump(mode="json"), "objective": kept})
        # the same seed would propose the same points again
        study.sampler = new_sampler(space, derived_seed(space.seed, -1 - started))
        self = cls(directory, space, study, journal, lock)
        self._end_interrupted()
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        rows = self.record()
        tried = {row.label for row in rows.of_stages(SAMPLED) if not row.interrupted}
        if DEFAULT not in tried | {trial.user_attrs.get("label") for trial in waiting}:
            # all others are compared with them: they are not given up, however often their trial was cut off
            study.enqueue_trial(self._default, user_attrs={"label": DEFAULT})
        for row in rows.of_stages(("plant",)):
            self._plant = self._plant or read_plant(self.trial_directory(row.number) / PLANT_FILE)
        known = (trial.user_attrs.get("label") for trial in study.get_trials(deepcopy=False))
        if self._plant is not None and self._screening is None and FROM_PLANT not in known:
            self._prescreen(self._plant)
        return self

    def _end_interrupted(self) -> None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._running[trial.number] = optuna.trial.Trial(self._sampled, trial._trial_id)
            ended = read_outcome(self.trial_directory(trial.number))
            if ended is not None and ended.status != "stopped":
                self.finish(trial.number, ended)
            else:
                reason = "the search was ended while it ran"
                self.finish(trial.number, Ended("crashed", reason), interrupted=True)

    # --- what comes next

    def record(self) -> StudyRecord:
        """The study as it stands."""
        return record(self._study, self.directory)

    def next_step(self) -> Step:
        """What `propose` would start."""
        return self._next()[0]

    def _next(self) -> tuple[Step, int]:
        """The next step, and the trials left of the first stages; kept, since it is asked ten times a second."""
        # the defaults need not wait for the plant
        if self._screening is not None and (now := self.record()).of_stages(SAMPLED):
            if self._running and not self._screening.done():
                return Wait(), left(self.space, now)
            for values in self._screening.result():
                self._study.enqueue_trial(values, user_attrs={"label": FROM_PLANT})
            self._screening = None
        seen = (len(self._study.get_trials(deepcopy=False)), len(self._running), self.enough)
        if self._step is None or self._step[2] != seen:
            now = self.record()
            self._step = next_step(self.space, now, self._default, self.enough), left(self.space, now), seen
        return self._step[:2]

    def _allowed(self, values: dict[str, Any], seed: int) -> dict[str, Any]:
        """`values`, or the nearest configuration that fulfils `requires`."""
        if not self._requirements:
            return values
        defaults = to_dict(TrainConfig())

        def holds(settings: Mapping[str, Any]) -> bool:
            return all_hold(self._requirements, {**defaults, **self.space.settings(settings)})

        if holds(values):
            return values
        return nearest_allowed(values, self.space.search, holds, random.Random(seed)) or values

    def interrupt(self) -> None:
        """Look for the settings that are best on the plant no longer. May be called from a signal handler."""
        self._ends = True

    def close(self) -> None:
        """Let go of the study, so that another process may hold it."""
        self.interrupt()
        os.close(self._lock)

    # --- trials

    def trial_directory(self, number: int) -> Path:
        """Folder of trial `number`."""
        return trial_dir(self.directory, number)

    @property
    def told(self) -> int:
        """Trials that ended in a way that counts; an interrupted one does not, it is replaced."""
        return sum(row.status != "running" and not row.interrupted for row in self.record().trials)

    @property
    def missing(self) -> int:
        """Trials still to be started; of the stages after the search only whether there are any."""
        step, to_start = self._next()
        if step is None:
            return to_start if self.enough else 0
        return max(1, to_start)

    def propose(self) -> Proposal:
        """What `next_step` says, or one more from the sampler. It must be given to `finish` some time."""
        with self._journal.one_wait():
            return self._propose()

    def _propose(self) -> Proposal:
        step = self.next_step()
        self._step = None
        if isinstance(step, Extra):
            return self._repeat(step)
        stage = step.stage if isinstance(step, Sample) else SAMPLED[-1]
        while True:
            trial = self._sampled.ask()
            values = self._suggested(trial)
            label = trial.user_attrs.get("label", "")
            passed_over = label == FROM_PLANT and misled(self.record())
            allowed = self._allowed(values, derived_seed(self.space.seed, -2 - trial.number))
            if allowed == values and not passed_over:
                break
            if not passed_over:  # in its place the nearest one that may be tried, of which the sampler then learns
                self._study.enqueue_trial(allowed, user_attrs={"label": label})
            trial.set_user_attr("replaced", True)
            self._sampled.tell(trial, state=TrialState.PRUNED)
        return self._begin(trial, values, {}, Extra(stage, trial.user_attrs.get("label", ""), values))

    def _suggested(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in self._order:
            parameter = self.space.search[name]
            if parameter.applies(values):
                values[name] = suggest(trial, name, parameter)
        return values

    def _repeat(self, extra: Extra) -> Proposal:
        # not asked for: what is enqueued stays for the search. Its stage hides it from the sampler from the first on
        values = {**extra.values, **extra.more}
        params = {
            name: values[name]
            for name, parameter in self.space.search.items()
            if name in values and contains(parameter, values[name])
        }
        new = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={name: distribution(self.space.search[name]) for name in params},
            user_attrs={"stage": extra.stage, "label": extra.label},
        )
        self._study.add_trial(new)
        trial = optuna.trial.Trial(self._sampled, self._study.get_trials(deepcopy=False)[-1]._trial_id)
        return self._begin(trial, dict(extra.values), extra.more, extra)

    def _begin(
        self, trial: optuna.trial.Trial, values: dict[str, Any], more: Mapping[str, Any], what: Extra
    ) -> Proposal:
        self._running[trial.number] = trial
        _set_aside(self.trial_directory(trial.number))
        seed = derived_seed(self.space.seed, trial.number) if what.seed is None else what.seed
        settings = {**self.space.settings(values), **more, "seed": seed}
        for name, value in {"stage": what.stage, "label": what.label, "seed": seed}.items():
            trial.set_user_attr(name, value)
        trial.set_user_attr("config", self._config_to_train_on(settings))
        if self._plant is not None and what.objective is None:
            self._predict(trial, self._plant, settings)
        # the defaults are run again among short trials, to be compared with the first of those
        short = what.stage == "screen" or (what.stage == "anchor" and self.space.screen.trials > 0)
        limits = self.space.trial_limits(values, self.space.screen.share if short else 1.0)
        self._seconds[trial.number] = limits.get("max_seconds", settings.get("max_seconds"))
        trial_settings = {**settings, **limits, "decoded_cache": str(self.directory / CACHE)}
        values |= {name: value for name, value in more.items() if name in self.space.search}
        return Proposal(trial.number, seed, values, trial_settings, what.stage, what.label, what.objective)

    def _config_to_train_on(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Every setting as the trial has it, but without the trial's budget and folder: what best.json holds."""
        try:
            return to_dict(build(TrainConfig, settings, "proposal"))
        except ConfigError:  # searched values that do not go together; the trial will say so
            return {**to_dict(TrainConfig()), **settings}

    def should_prune(self, number: int, progress: Mapping[str, Any]) -> bool:
        """Take in a progress report of a running trial; true where the pruner would end it now."""
        if self.space.pruner == "none" or self._stage(number) not in SAMPLED:
            return False
        # on a grid, because the pruners compare trials that have a value at exactly the same step
        percent = int(100 * share_done(progress, self._seconds[number]))
        percent = percent // PRUNER_REPORT_PERCENT * PRUNER_REPORT_PERCENT
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
        nothing about its settings; they are tried once more. Trials that the sampler did not propose are told like any
        other, for whoever reads the journal, but it does not see them.

        Returns:
            The trial's status: that of `ended`, or `infeasible` where it ended well but broke a constraint or has
            no value of an objective.
        """
        with self._journal.one_wait():
            return self._finish(number, ended, interrupted=interrupted)

    def _finish(self, number: int, ended: Ended, *, interrupted: bool) -> str:
        trial = self._running.pop(number)
        figures = {**ended.figures, **({"seconds": ended.seconds} if ended.seconds else {})}  # not known after a kill
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
        self._step = None
        sampled = trial.user_attrs.get("stage", "search") in SAMPLED
        if interrupted:
            trial.set_user_attr("interrupted", True)
            if sampled:
                self._try_again(trial)
            self._sampled.tell(trial, state=TrialState.FAIL)
            return status
        trial.set_user_attr("constraints", violations)
        trial.set_user_attr("values", self._values(figures))
        if trial.user_attrs.get("stage") == "plant":  # its figures are those of no configuration
            self._sampled.tell(trial, state=TrialState.PRUNED)
            self._plant = read_plant(self.trial_directory(number) / PLANT_FILE)
            if self._plant is None:
                logger.warning("there is no plant, so nothing is tried on it first: see trials/%04d", number)
            else:
                self._prescreen(self._plant)
            return status
        if self.space.sampler in WITHOUT_CONSTRAINTS:
            figures = figures if all(value <= 0 for value in violations) else {}
        else:
            for index, value in enumerate(violations):
                trial.set_constraint(str(index), value)
        self._sampled.tell(trial, self._values(figures))
        return status

    def reason(self, number: int) -> str:
        """Why a trial that has ended is what it is: which constraint it broke, say."""
        return str(self._study.get_trials(deepcopy=False)[number].user_attrs["reason"])

    def _stage(self, number: int) -> str:
        return str(self._running[number].user_attrs.get("stage", "search"))

    def _predict(self, trial: optuna.trial.Trial, plant: Plant, settings: Mapping[str, Any]) -> None:
        neighbour = [(step.at, step.holds_gb) for step in self.space.neighbour]
        try:
            foreseen = simulate(plant, {**to_dict(TrainConfig()), **settings}, neighbour)
        except ConfigError:  # settings that do not go together; the trial will say so
            return
        if foreseen is not None:
            trial.set_user_attr("predicted_samples_per_second", foreseen.samples_per_second)

    def _prescreen(self, plant: Plant) -> None:
        """Look for the settings that are best on the plant, while the trial of the defaults runs."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="acmds-prescreen")
        self._screening = thread.submit(
            best_on_plant, plant, self.space, self._default, self._requirements, lambda: self._ends
        )
        thread.shutdown(wait=False)

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
            again = {"retry_of": trial.number, "label": trial.user_attrs.get("label", "")}
            self._study.enqueue_trial({**enqueued, **frozen.params}, user_attrs=again)

    def _values(self, figures: Mapping[str, Any]) -> list[float]:
        """The objectives' values; the worst seen so far for one that was not measured."""
        result = []
        for objective in self.space.objective:
            value = figures.get(objective.name)
            if value is None:
                trials = [trial for trial in self._study.get_trials(deepcopy=False) if is_row(trial)]
                seen = [trial.user_attrs[objective.name] for trial in trials if objective.name in trial.user_attrs]
                maximize = objective.direction == "maximize"
                value = min([*seen, 0.0]) if maximize else max(seen, default=1000.0)
            result.append(float(value))
        return result


def _set_aside(directory: Path) -> None:
    """Rename the folder of a trial that an older journal, put back, does not know: its outcome is another trial's."""
    if directory.exists():
        count = sum(1 for _ in directory.parent.glob(f"{directory.name}.old*"))
        directory.rename(directory.with_name(f"{directory.name}.old{count + 1}"))


def _plain(value: Any) -> str:
    return "not measured" if value is None else f"{value:g}"
