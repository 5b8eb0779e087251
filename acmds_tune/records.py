"""A study and its trials as plain values, and the rule that names the best trial. Knows nothing of Optuna or files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DONE = ("ok", "infeasible")
"""Statuses of trials that ran to their end, so that their figures can be compared."""

MEMORY_FIGURES = ("oom_", "alloc_retries", "peak_reserved_gb", "headroom_")
"""Beginnings of the figures that smaller batches or more headroom make better."""


@dataclass(frozen=True)
class Objective:
    """A figure that a study searches for the most or the least of."""

    name: str
    direction: Literal["maximize", "minimize"]

    def cost(self, value: float) -> float:
        """`value`, turned so that less is better."""
        return -value if self.direction == "maximize" else value


@dataclass(frozen=True)
class TrialRecord:
    """One started trial.

    Attributes:
        number: from 0, in the order of the starts.
        status: one of acmds_tune.columns.STATUSES.
        reason: one line; never empty.
        violations: one number a constraint of the study, above 0 where it is broken; empty where not known.
        config: every setting as the trial used it; only the searched ones where it ended before that was known.
        figures: the measured columns of trials.csv by name; None where never measured.
        values: what Optuna was told, one an objective; None for a trial that runs.
    """

    number: int
    status: str
    reason: str
    violations: tuple[float, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float | None] = field(default_factory=dict)
    values: tuple[float, ...] | None = None
    seconds: float | None = None
    seed: int | None = None

    @property
    def feasible(self) -> bool:
        """Ended well and kept every constraint."""
        return self.status == "ok" and self.values is not None and all(value <= 0 for value in self.violations)


@dataclass(frozen=True)
class StudyRecord:
    """A study as its journal has it. `searched` names the settings; `created` is ISO time; `yaml` is the text given."""

    name: str
    objectives: Sequence[Objective]
    constraints: Sequence[str]
    searched: Sequence[str]
    trials: Sequence[TrialRecord]
    created: str = ""
    yaml: str = ""

    @property
    def feasible(self) -> list[TrialRecord]:
        """The trials that can be the best."""
        return [trial for trial in self.trials if trial.feasible]


def costs(study: StudyRecord, trial: TrialRecord) -> tuple[float, ...]:
    """The trial's objective values, turned so that less is better. The trial must have values."""
    assert trial.values is not None
    return tuple(objective.cost(value) for objective, value in zip(study.objectives, trial.values, strict=True))


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Positions of the points that no other beats: is nowhere worse than, and somewhere better. Less is better."""

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def choose_best(study: StudyRecord) -> TrialRecord | None:
    """The best feasible trial, or None where no trial is feasible.

    With one objective: the best in it. With several: each objective is scaled from 0 (best on the Pareto front of the
    feasible trials) to 1 (worst on it), and the trial of the front that is nearest to 0 wins (the "closest to ideal"
    rule of compromise programming, Zeleny 1973). Of equals the better in the first objective wins, then the earlier.
    """
    trials = study.feasible
    if not trials:
        return None
    points = [costs(study, trial) for trial in trials]
    front = pareto_front(points)
    low = [min(points[i][k] for i in front) for k in range(len(study.objectives))]
    high = [max(points[i][k] for i in front) for k in range(len(study.objectives))]

    def distance(point: tuple[float, ...]) -> float:
        scaled = ((x - a) / (b - a) if b > a else 0.0 for x, a, b in zip(point, low, high, strict=True))
        return math.hypot(*scaled)

    chosen = min(front, key=lambda i: (round(distance(points[i]), 12), points[i], trials[i].number))
    return trials[chosen]


def rule_of_choice(study: StudyRecord) -> str:
    """The rule of `choose_best` in words, for this study."""
    first = study.objectives[0]
    if len(study.objectives) == 1:
        return f"the feasible trial with the {'highest' if first.direction == 'maximize' else 'lowest'} {first.name}"
    names = ", ".join(objective.name for objective in study.objectives)
    return f"the feasible trial on the Pareto front of {names} that is nearest to the best value of each"


def why_no_best(study: StudyRecord) -> str:
    """Why `choose_best` found none, and what to change. For a study without a feasible trial."""
    if not study.trials:
        return "No trial was started."
    counts = Counter(trial.status for trial in study.trials)
    ended = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [f"None of {len(study.trials)} trials is feasible: {ended}."]
    for position, constraint in enumerate(study.constraints):
        broken = sum(
            len(trial.violations) > position and trial.violations[position] > 0
            for trial in study.trials
            if trial.status in DONE
        )
        if broken:
            lines.append(f"{broken} ran to the end but broke the constraint {constraint}.")
    broke_memory = any(
        constraint.split()[0].startswith(MEMORY_FIGURES) and trial.violations[position] > 0
        for position, constraint in enumerate(study.constraints)
        for trial in study.trials
        if trial.status == "infeasible" and len(trial.violations) > position
    )
    if counts["oom"] or broke_memory:
        lines.append("Search smaller max_batch_size or larger target_headroom_gb, or raise memory_limit_gb.")
    elif any(counts[status] for status in counts if status not in ("running", "infeasible")):
        lines.append("The reasons are in the column `reason` of trials.csv.")
    return " ".join(lines)


def worst_first(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Those with the most out-of-memory events first, of equals the slowest."""
    return sorted(
        trials,
        key=lambda t: (-(t.figures.get("oom_events") or 0), t.figures.get("samples_per_second") or 0.0, t.number),
    )
