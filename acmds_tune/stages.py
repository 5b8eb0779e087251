"""Which trial a study needs next: more of the search, its promotion, a baseline, an anchor, or a confirmation.

A pure function of the search space and of the rows so far, so that a resumed study goes on where it was. Only rows of
the stages `screen` and `search` are proposed by the sampler, and only from them does it learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from acmds_optimizer.config import TrainConfig, to_dict
from acmds_tune.records import DEFAULT, DONE, FIXED, StudyRecord, TrialRecord, choose_best, ranked
from acmds_tune.space import Space, derived_seed

SAMPLED = ("screen", "search")
"""Stages whose settings the sampler proposes."""

LATER = ("train", "baseline", "confirm")
"""Those that come after them, though baselines also run beside them where trials run side by side."""

PLANT = "short runs"
HALVING = "halving"
MOST_FIXED = 6
"""Feasible fixed batches that are tried."""

FULL = 0.8
"""A mean micro-batch of this share of a size may be of a run at that size: the last step of an epoch has fewer."""

MOST_TRIES = 3
"""Times that a trial of the later stages is started, where it is interrupted each time."""

_CONFIRM_SEEDS = 1_000_000
"""Number of the first confirmation seed: beyond those of the trials."""


@dataclass(frozen=True)
class Sample:
    """Ask the sampler."""

    stage: str


@dataclass(frozen=True)
class Extra:
    """Run these settings.

    Attributes:
        stage: train, baseline, anchor or confirm.
        label: what is repeated or compared: `default`, `fixed batch 128`, `halving`, `trial 7`.
        values: searched settings as in the trial that is repeated.
        more: settings on top, searched or not.
        seed: of the trial; None: its own.
        objective: what runs it; None: as all others.
    """

    stage: str
    label: str
    values: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    objective: str | None = None


@dataclass(frozen=True)
class Wait:
    """Nothing can be started before a running trial has ended."""


Step = Sample | Extra | Wait | None
"""None: the study has all that it was asked for."""


def next_step(space: Space, study: StudyRecord, default: Mapping[str, Any], enough: bool = False) -> Step:
    """What to start next.

    Args:
        space: what was asked for.
        study: all rows so far, running and interrupted ones included.
        default: the trainer's defaults of the searched settings, moved into the space.
        enough: the sampler is asked for no more, because the time is needed for what comes after it.
    """
    rows = [row for row in study.trials if not row.interrupted]
    if space.prescreen.keep and not _started(rows, "plant", PLANT) and not _tried_enough(study, "plant", PLANT, None):
        held = {"max_batch_size": largest_batch(space, default), "min_batch_size": smallest_batch(space)}
        return Extra("plant", PLANT, default, held, derived_seed(space.seed, 0), "acmds_tune.plant:measure")
    stage, wanted = ("screen", space.screen.trials) if space.screen.trials else ("search", space.trials)
    sampled = [row for row in rows if row.stage == stage]
    # as they were tried: without what has its condition not met, and with what has no default of its own
    tried = next((row for row in sampled if row.label == DEFAULT and row.config), None)
    default = default if tried is None else searched(space, tried)
    if sampled and not _running(rows, "baseline") and any(row.status == "running" for row in rows):
        # beside other trials, which they need not wait for; each fixed batch does wait for the one before it
        baseline = _baselines(space, study, rows, default)
        if isinstance(baseline, Extra) and not _tries(study, "baseline", baseline.label, None):
            return baseline  # one that was interrupted waits for its turn: in a long search it would be given up sooner
    if space.prescreen.keep and sampled and _running(rows, "plant"):
        return Wait()  # what comes after the defaults are the plant's best
    if space.anchor_every and sampled:
        due = sum(row.status != "running" for row in sampled[1:]) // space.anchor_every
        given_up = sum(row.interrupted and row.stage == "anchor" for row in study.trials) // MOST_TRIES
        if _count(rows, "anchor") + given_up < due:
            return Extra("anchor", DEFAULT, default, seed=_first(sampled).seed)
    if len(sampled) < wanted and not (enough and sampled):
        return Sample(stage)
    for part in (_train, _baselines, _confirm):
        later = part(space, study, rows, default)
        if isinstance(later, Wait):  # while other places are busy, this one can have what is sure to come
            return _confirm(space, study, rows, default) or later
        if later is not None:
            return later
    return None


def left(space: Space, study: StudyRecord) -> int:
    """Trials of the first stages still to be started; the later ones are not known before."""
    rows = [row for row in study.trials if not row.interrupted]
    if not space.screen.trials:
        return max(0, space.trials - _count(rows, "search"))
    return max(0, space.screen.trials - _count(rows, "screen")) + max(0, space.trials - _count(rows, "train"))


def planned(space: Space) -> int:
    """Trials that a whole study will have, as far as can be told beforehand."""
    first = space.screen.trials or space.trials
    anchors = first // space.anchor_every if space.anchor_every else 0
    return first + bool(space.prescreen.keep) + anchors + planned_after(space)


def planned_after(space: Space) -> int:
    """Those of them that come after what the sampler proposes."""
    count = space.trials if space.screen.trials else 0
    count += 3 * (FIXED in space.baselines) + (HALVING in space.baselines)
    compared = (DEFAULT in space.baselines) + (FIXED in space.baselines)
    return count + (space.confirm.top + compared) * space.confirm.seeds * bool(space.confirm.top)


def _train(space: Space, study: StudyRecord, rows: Sequence[TrialRecord], default: Mapping[str, Any]) -> Step:
    """The best of the screened trials, and the default, with the whole budget."""
    if not space.screen.trials:
        return Wait() if _running(rows, "search") and (space.baselines or space.confirm.top) else None
    screened = [row for row in rows if row.stage == "screen"]
    first, screening = _first(screened), _running(rows, "screen")
    if screening:  # the defaults will have the whole budget, whatever comes of the others
        chosen = [first] if first.label == DEFAULT and first.status != "running" else []
    else:
        order = ranked(replace(study, trials=screened), stages=("screen",), most=space.trials)
        chosen = [first, *(row for row in order if row is not first)][: space.trials]
    for row in chosen:
        label = DEFAULT if row.label == DEFAULT else f"trial {row.number}"
        if not _started(rows, "train", label) and not _tried_enough(study, "train", label, row.seed):
            return Extra("train", label, searched(space, row), seed=row.seed)
    undecided = _running(rows, "train") and (space.baselines or space.confirm.top)
    return Wait() if screening or undecided else None


def _baselines(space: Space, study: StudyRecord, rows: Sequence[TrialRecord], default: Mapping[str, Any]) -> Step:
    seed = derived_seed(space.seed, 0)  # of the first trial, which has the default settings
    halved = _started(rows, "baseline", HALVING) or _tried_enough(study, "baseline", HALVING, seed)
    if HALVING in space.baselines and not halved:
        more = _held(space, default, largest_batch(space, default))
        return Extra("baseline", HALVING, default, more, seed, "acmds_tune.baselines:halving")
    if FIXED in space.baselines:
        batch = next_fixed_batch(study, rows, largest_batch(space, default))
        if batch is not None:
            label = f"{FIXED} {batch}"
            if _running(rows, "baseline"):
                return Wait()
            if not _tried_enough(study, "baseline", label, seed):
                return Extra("baseline", label, default, _held(space, default, batch), seed)
    return Wait() if _running(rows, "baseline") and space.confirm.top else None


def default_values(space: Space) -> dict[str, Any]:
    """The trainer's defaults of the searched settings, moved into the space; without those that have no default."""
    defaults = to_dict(TrainConfig())
    result = {}
    for name, parameter in space.search.items():
        value = defaults[name]
        if parameter.values is not None:
            result[name] = value if value in parameter.values else parameter.values[0]
        elif value is not None:
            low, high = parameter.bounds
            clipped = min(max(value, low), high)
            if parameter.step is not None:
                clipped = min(low + round((clipped - low) / parameter.step) * parameter.step, high)  # rounding errors
            result[name] = type(low)(clipped)
    return result


def largest_batch(space: Space, default: Mapping[str, Any]) -> int:
    """The largest micro-batch that the search space allows, for the default configuration."""
    searched_sizes = space.search.get("max_batch_size")
    if searched_sizes is None:
        largest = space.fixed.get("max_batch_size", TrainConfig().max_batch_size)
    else:
        largest = max(searched_sizes.values) if searched_sizes.values else searched_sizes.high  # type: ignore[type-var]
    settings = {**to_dict(TrainConfig()), **space.settings(default)}
    if settings["batch_policy"] == "hold" and settings["effective_batch_size"]:
        largest = min(largest, settings["effective_batch_size"])  # a micro-batch has at most the samples of a step
    return int(largest)


def smallest_batch(space: Space) -> int:
    """The smallest micro-batch that the search space allows."""
    searched_sizes = space.search.get("min_batch_size")
    if searched_sizes is None:
        return int(space.fixed.get("min_batch_size", TrainConfig().min_batch_size))
    smallest: Any = min(searched_sizes.values) if searched_sizes.values else searched_sizes.low  # type: ignore[type-var]
    return int(smallest)


def _held(space: Space, default: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Settings that hold the micro-batch and leave the samples of a step as they are by default."""
    settings = {**to_dict(TrainConfig()), **space.settings(default)}
    held: dict[str, Any] = {"min_batch_size": batch, "max_batch_size": batch}
    if settings["batch_policy"] == "hold":
        held["effective_batch_size"] = max(batch, settings["effective_batch_size"] or settings["max_batch_size"])
    return held


def next_fixed_batch(study: StudyRecord, rows: Sequence[TrialRecord], largest: int) -> int | None:
    """The next fixed batch to try: from the largest on, half as large each, until a feasible one is worse again.

    Where none is feasible, down to 1. One that never ran at its size, because the data set or the memory is smaller, is
    not compared with the next one, which is then what it ran at.
    """
    fixed = [row for row in rows if row.stage == "baseline" and row.label.startswith(f"{FIXED} ")]
    tried = {int(row.label.rsplit(" ", 1)[1]): row for row in fixed}
    batch, feasible = largest, 0
    best: TrialRecord | None = None
    while (row := tried.get(batch)) is not None:
        feasible += row.feasible
        ran = _ran_at(row, batch)
        if ran == batch:
            if best is not None and choose_best(replace(study, trials=[best, row]), stages=("baseline",)) is best:
                return None
            best = row if row.feasible else best
        if batch == 1:
            return None
        batch = min(batch // 2, ran)
    return batch if feasible < MOST_FIXED else None


def _ran_at(row: TrialRecord, batch: int) -> int:
    """`batch`; where the trial never ran at that size, the power of two that it mostly ran at, or the one below."""
    mean = row.figures.get("batch_size_mean") if row.status in DONE else None
    if mean is None or mean > batch / 2:  # one full step and one with the few samples left over are more
        return batch
    return 1 << (max(1, int(mean / FULL)).bit_length() - 1)


def best_fixed(study: StudyRecord) -> TrialRecord | None:
    """The best feasible fixed batch."""
    rows = [row for row in study.trials if row.label.startswith(f"{FIXED} ") and row.stage == "baseline"]
    return choose_best(replace(study, trials=rows), stages=("baseline",))


def _confirm(space: Space, study: StudyRecord, rows: Sequence[TrialRecord], default: Mapping[str, Any]) -> Step:
    """The best trials and what they are compared with, each on the same seeds.

    While others run, only those of them that are known already, whatever comes of what runs.
    """
    if not space.confirm.top or _running(rows, "screen"):
        return None
    chosen = ranked(study, most=space.confirm.top)
    candidates: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    stage = "train" if space.screen.trials else "search"
    ended = any(row.stage == stage and row.label == DEFAULT and row.status != "running" for row in rows)
    better = ended and len(chosen) == space.confirm.top and len(study.objectives) == 1  # than the defaults, for good
    undecided = _running(rows, "search") or _running(rows, "train")
    if not undecided:
        candidates = [(f"trial {row.number}", searched(space, row), {}) for row in chosen]
    if DEFAULT in space.baselines and not any(row.label == DEFAULT for row in chosen) and (better or not undecided):
        candidates.append((DEFAULT, dict(default), {}))
    fixed = best_fixed(study)
    if FIXED in space.baselines and fixed is not None and not _running(rows, "baseline"):
        held = {name: fixed.config[name] for name in ("min_batch_size", "max_batch_size", "effective_batch_size")}
        candidates.append((fixed.label, dict(default), held))
    for position in range(space.confirm.seeds):  # seed by seed, so that drift strikes all candidates alike
        seed = derived_seed(space.seed, _CONFIRM_SEEDS + position)
        for label, values, more in candidates:
            started = any(row.label == label and row.seed == seed for row in rows if row.stage == "confirm")
            if not started and not _tried_enough(study, "confirm", label, seed):
                return Extra("confirm", label, values, more, seed)
    return None


def searched(space: Space, row: TrialRecord) -> dict[str, Any]:
    """The searched settings of a trial, those left out whose condition is not met."""
    values = {name: row.config[name] for name in space.search if name in row.config}
    return {name: value for name, value in values.items() if space.search[name].applies(values)}


def _first(sampled: Sequence[TrialRecord]) -> TrialRecord:
    """The trial of the defaults: not the first one where that was interrupted."""
    return next((row for row in sampled if row.label == DEFAULT), sampled[0])


def _count(rows: Sequence[TrialRecord], stage: str) -> int:
    return sum(row.stage == stage for row in rows)


def _running(rows: Sequence[TrialRecord], stage: str) -> bool:
    return any(row.stage == stage and row.status == "running" for row in rows)


def _started(rows: Sequence[TrialRecord], stage: str, label: str) -> bool:
    return any(row.stage == stage and row.label == label for row in rows)


def _tried_enough(study: StudyRecord, stage: str, label: str, seed: int | None) -> bool:
    """It was interrupted before; perhaps it is what ends the search."""
    return _tries(study, stage, label, seed) >= MOST_TRIES


def _tries(study: StudyRecord, stage: str, label: str, seed: int | None) -> int:
    """How often it was interrupted."""
    same = [row for row in study.trials if row.interrupted and row.stage == stage and row.label == label]
    return sum(seed is None or row.seed == seed for row in same)
