"""A study and its trials as plain values, and the rule that names the best trial. Knows nothing of Optuna or files."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

DONE = ("ok", "infeasible")
"""Statuses of trials that ran to their end, so that their figures can be compared."""

MEMORY_FIGURES = ("oom_", "alloc_retries", "peak_reserved_gb", "headroom_")
"""Beginnings of the figures that smaller batches or more headroom make better."""


DEFAULT = "default"
"""Label of trials with the trainer's default settings, moved into the space."""

FIXED = "fixed batch"
"""Beginning of the labels of trials that held one micro-batch, and the name of that baseline."""

SPEEDS = ("samples_per_second", "seconds", "training_seconds", "gpu_busy_fraction")
"""Figures that other trials on the same device change."""

CANDIDATES = ("search", "train")
"""Stages whose trials can be the best: proposed by the sampler and run with the whole budget."""


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
        number: from 0, in the order in which trials were put in line: mostly that of the starts.
        status: one of acmds_tune.columns.STATUSES.
        reason: one line; never empty.
        violations: one number a constraint of the study, above 0 where it is broken; empty where not known.
        config: every setting as the trial used it; only the searched ones where it ended before that was known.
        figures: the measured columns of trials.csv by name; None where never measured.
        values: what Optuna was told, one an objective; None for a trial that runs.
        stage: one of acmds_tune.columns.STAGES.
        label: what a trial of the later stages repeats or is compared with, such as `trial 7` or `default`.
        predicted: samples a second that the plant predicted.
        began: when it was started, in seconds since 1970; None where not known.
        interrupted: its end says nothing about its settings, and it was or will be started anew.
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
    stage: str = "search"
    label: str = ""
    interrupted: bool = False
    began: float | None = None
    predicted: float | None = None

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
    confirm_seeds: int | None = None
    """Runs on other seeds that are asked for now; None where not known."""

    sharers: int = 1
    """Trials that may be at once on one device, as asked for now."""

    linear: frozenset[str] = frozenset()
    """Settings that are drawn evenly from a range, so that their axis is linear."""

    @property
    def candidates(self) -> list[TrialRecord]:
        """The trials of the search itself; the screened ones as long as none was trained with the whole budget."""
        found, screened = self.of_stages(CANDIDATES), self.of_stages(("screen",))
        ended = any(trial.status != "running" and not trial.interrupted for trial in found)
        return found if ended or not screened else screened

    @property
    def feasible(self) -> list[TrialRecord]:
        """The trials that can be the best."""
        return [trial for trial in self.candidates if trial.feasible]

    def of_stages(self, stages: Sequence[str]) -> list[TrialRecord]:
        """The trials of these stages."""
        return [trial for trial in self.trials if trial.stage in stages]


@dataclass(frozen=True)
class Confirmation:
    """One configuration run on several seeds; means and standard deviations of the objectives.

    Attributes:
        trials: its runs.
        means: one an objective; None where a run did not come to its end, or has no value.
        deviations: sample standard deviations, 0 for one run.
    """

    trials: tuple[TrialRecord, ...]
    means: tuple[float, ...] | None
    deviations: tuple[float, ...] | None

    @property
    def feasible(self) -> bool:
        """Every run ended well and kept every constraint."""
        return self.means is not None and all(trial.feasible for trial in self.trials)


def confirmations(study: StudyRecord) -> dict[str, Confirmation]:
    """What was run on several seeds, by label: those with as many ended runs as any other has, or as are asked for.

    Where the trial of the defaults was, that is what there is of the label `default` too.
    """
    runs: dict[str, list[TrialRecord]] = {}
    for trial in study.trials:
        if trial.stage == "confirm" and trial.status != "running" and not trial.interrupted:
            runs.setdefault(trial.label, []).append(trial)
    most = max(map(len, runs.values()), default=0)
    enough = min(most, study.confirm_seeds or most)  # fewer may be asked for than before
    result = {}
    for label, trials in runs.items():
        if len(trials) < enough:
            continue
        # what was told of a run that ended badly, or of a figure that was not measured, is no result
        values = [
            trial.values
            for trial in trials
            if trial.values is not None and trial.status in DONE
            and all(trial.figures.get(objective.name, 0.0) is not None for objective in study.objectives)
        ]  # fmt: skip
        means = deviations = None
        if len(values) == len(trials):
            columns = list(zip(*values, strict=True))
            means = tuple(statistics.fmean(column) for column in columns)
            deviations = tuple(statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns)
        result[label] = Confirmation(tuple(trials), means, deviations)
    for trial in study.trials:
        if trial.label == DEFAULT and trial.stage in CANDIDATES and f"trial {trial.number}" in result:
            result.setdefault(DEFAULT, result[f"trial {trial.number}"])
    return result


def against_baselines(study: StudyRecord) -> dict[str, float]:
    """The first objective of the best, as a multiple of that of each baseline on the same seeds; by label."""
    best, again = choose_best(study), confirmations(study)
    ours = again.get(f"trial {best.number}") if best is not None else None
    if ours is None or ours.means is None:
        return {}
    return {
        label: ours.means[0] / found.means[0]
        for label, found in again.items()
        if not label.startswith("trial ") and found.means is not None and found.means[0]
    }


def remarks(study: StudyRecord) -> list[str]:
    """What has to be known beside a comparison with the baselines, as sentences."""
    found = []
    fixed = [row for row in study.of_stages(("baseline",)) if row.label.startswith(f"{FIXED} ")]
    ended = [row for row in fixed if row.status != "running" and not row.interrupted]
    if ended and not any(row.feasible for row in ended):
        sizes = dict.fromkeys(row.label.removeprefix(f"{FIXED} ") for row in (ended[0], ended[-1]))
        found.append(
            f"No fixed batch that was tried ({' to '.join(sizes)}) was feasible, so there is none to compare with."
        )
    compared = any(not row.label.startswith("trial ") for row in study.of_stages(("baseline", "confirm")))
    if study.sharers > 1 and compared and any(objective.name in SPEEDS for objective in study.objectives):
        found.append(
            f"Up to {study.sharers} trials at once share a device and slow each other down. Baselines may have had "
            "fewer beside them, and look faster for it; one trial at a time compares fairly."
        )
    return found


LONGEST_GAP_S = 60.0
"""A longer time without any trial is one in which the search did not run."""


def busy_share(study: StudyRecord, figure: str = "gpu_busy_fraction") -> float | None:
    """Share of the search's wall time in which its GPUs ran kernels; None where that was not measured.

    Where trials ran side by side, it is that of as many places as there were trials at once.

    Args:
        study: whose trials are counted, all stages.
        figure: `gpu_busy_fraction`, a share of a trial's time, or `training_seconds`, which the CPU has as well.
    """
    spans = sorted(
        (trial.began, trial.began + trial.seconds, trial.figures.get(figure), trial.seconds)
        for trial in study.trials
        if trial.began is not None and trial.seconds and trial.status != "running"
    )
    if not any(value is not None for _, _, value, _ in spans):
        return None
    busy = sum((value or 0.0) * (seconds if figure.endswith("_fraction") else 1.0) for _, _, value, seconds in spans)
    wall, end = 0.0, spans[0][0]
    for began, ended, _, _ in spans:
        if began - end > LONGEST_GAP_S:
            end = began
        wall += max(0.0, ended - end)
        end = max(end, ended)
    changes = sorted([(began, 1) for began, *_ in spans] + [(ended, -1) for _, ended, *_ in spans])
    places = max(accumulate(change for _, change in changes))
    return min(1.0, busy / wall / places)


def costs(study: StudyRecord, trial: TrialRecord) -> tuple[float, ...]:
    """The trial's objective values, turned so that less is better. The trial must have values."""
    assert trial.values is not None
    return tuple(objective.cost(value) for objective, value in zip(study.objectives, trial.values, strict=True))


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Positions of the points that no other beats: is nowhere worse than, and somewhere better. Less is better."""
    front: dict[tuple[float, ...], list[int]] = {}
    for i in sorted(range(len(points)), key=points.__getitem__):  # what beats a point comes before it
        point = points[i]
        if point in front:
            front[point].append(i)
        elif not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front[point] = [i]
    return sorted(i for alike in front.values() for i in alike)


def front_of(study: StudyRecord) -> list[TrialRecord]:
    """The feasible candidates that no other beats in all objectives."""
    trials = study.feasible
    return [trials[position] for position in pareto_front([costs(study, trial) for trial in trials])]


def choose_best(study: StudyRecord, stages: Sequence[str] | None = None) -> TrialRecord | None:
    """The best feasible trial, or None where no trial is feasible.

    With one objective: the best in it. With several: each objective is scaled from 0 (best on the Pareto front of the
    feasible trials) to 1 (worst on it), and the trial of the front that is nearest to 0 wins (the "closest to ideal"
    rule of compromise programming, Zeleny 1973). Of equals the better in the first objective wins, then the earlier.

    Trials that were run again on several seeds are compared by their means, and go before those that were not; one
    that was not feasible with every seed is out.

    Args:
        study: its trials.
        stages: choose among the trials of these stages, whether confirmed or not; None: as described.
    """
    if stages is not None:
        return _nearest_to_ideal(study, [trial for trial in study.of_stages(stages) if trial.feasible])
    again = confirmations(study)
    confirmed = {trial.number: again[label] for trial in study.feasible if (label := f"trial {trial.number}") in again}
    sure = [
        replace(trial, values=found.means)
        for trial in study.feasible
        if (found := confirmed.get(trial.number)) is not None and found.feasible
    ]
    chosen = _nearest_to_ideal(study, sure or [trial for trial in study.feasible if trial.number not in confirmed])
    return next((trial for trial in study.trials if chosen is not None and trial.number == chosen.number), None)


def ranked(study: StudyRecord, stages: Sequence[str] | None = None, most: int | None = None) -> list[TrialRecord]:
    """The feasible candidates (or those of `stages`), each the best of those that come after it; `most` at most."""
    left = study.feasible if stages is None else [trial for trial in study.of_stages(stages) if trial.feasible]
    result: list[TrialRecord] = []
    while (most is None or len(result) < most) and (best := _nearest_to_ideal(study, left)) is not None:
        result.append(best)
        left = [trial for trial in left if trial is not best]
    return result


def _nearest_to_ideal(study: StudyRecord, trials: Sequence[TrialRecord]) -> TrialRecord | None:
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
    first, again = study.objectives[0], confirmations(study)
    sure = any((found := again.get(f"trial {trial.number}")) is not None and found.feasible for trial in study.feasible)
    who, mean, of_means = "the feasible trial", "", ""
    if sure:
        who = "of the trials that were run again and were feasible with every seed, the one"
        mean, of_means = "mean ", "the means of "
    if len(study.objectives) == 1:
        return f"{who} with the {'highest' if first.direction == 'maximize' else 'lowest'} {mean}{first.name}"
    names = ", ".join(objective.name for objective in study.objectives)
    return f"{who} on the Pareto front of {of_means}{names} that is nearest to the best value of each"


def why_no_best(study: StudyRecord) -> str:
    """Why `choose_best` found none, and what to change. For a study without a feasible trial."""
    if not study.trials:
        return "No trial was started."
    trials = study.candidates
    if not trials:  # the plant's short runs are no trials of the search
        return "No trial of the search was started."
    counts = Counter(trial.status for trial in trials)
    ended = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    if study.feasible:
        return "No trial was feasible again with every seed of its confirmation; see the rows of stage confirm."
    lines = [f"None of {len(trials)} trials is feasible: {ended}."]
    for name in (objective.name for objective in study.objectives):
        without = sum(trial.status in DONE and trial.figures.get(name, 0.0) is None for trial in trials)
        if without:
            lines.append(f"{without} {'has' if without == 1 else 'have'} no {name}.")
    for position, constraint in enumerate(study.constraints):
        broken = sum(
            len(trial.violations) > position and trial.violations[position] > 0
            for trial in trials
            if trial.status in DONE
        )
        if broken:
            lines.append(f"{broken} ran to the end but broke the constraint {constraint}.")
    broke_memory = any(
        constraint.split()[0].startswith(MEMORY_FIGURES) and trial.violations[position] > 0
        for position, constraint in enumerate(study.constraints)
        for trial in trials
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
