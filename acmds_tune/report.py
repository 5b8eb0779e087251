"""From a study's journal to what people read: trials.csv, events.csv, best.json and report.html.

Everything here is made again from the study directory alone, at any time, also while the search runs.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmds_optimizer.engine.columns import Column
from acmds_optimizer.files import replacing
from acmds_tune.columns import (
    CONFIG_PREFIX,
    EVENT_COLUMNS,
    FIGURES,
    STATUSES,
    described_trial_columns,
    trial_columns,
)
from acmds_tune.records import (
    DONE,
    Confirmation,
    Objective,
    StudyRecord,
    TrialRecord,
    choose_best,
    confirmations,
    front_of,
    remarks,
    why_no_best,
)
from acmds_tune.space import Space
from acmds_tune.stages import SAMPLED

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

FEWEST_TRIALS_FOR_IMPORTANCES = 10
"""Fewer say more of chance than of the settings."""

MOST_SPLITS = 6
"""Depth of the trees that importances are taken from; of deeper ones 1,000 trials take half a minute, for the same."""


# --- reading


def trial_dir(study_dir: str | Path, number: int) -> Path:
    """The folder of one trial."""
    return Path(study_dir) / "trials" / f"{number:04d}"


def load_study(study_dir: str | Path) -> StudyRecord:
    """The study as its journal has it, trials that run or failed included.

    Raises:
        ConfigError: there is no journal in `study_dir`, or it holds no study.
    """
    return _read(study_dir)[1]


def _read(study_dir: str | Path) -> tuple[optuna.Study, StudyRecord]:
    """The study as Optuna has it, and its record: together, since it takes seconds to read a long journal."""
    from acmds_tune.storage import open_study  # imports Optuna

    whole = open_study(Path(study_dir))
    return whole, record(whole, Path(study_dir))


def importances(study_dir: str | Path) -> dict[str, dict[str, float]]:
    """Share of each searched setting in how far the trials differ, for each objective.

    fANOVA (Hutter et al. 2014) over the trials that ran to their end; empty for fewer than
    FEWEST_TRIALS_FOR_IMPORTANCES of them. The shares of one objective add up to 1, or are all 0.
    """
    return _importances(*_read(study_dir))


def _importances(whole: optuna.Study, study: StudyRecord) -> dict[str, dict[str, float]]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    done = {trial.number for trial in study.of_stages(SAMPLED) if trial.status in DONE and trial.values is not None}
    if len(done) < FEWEST_TRIALS_FOR_IMPORTANCES:
        return {}
    trials = [trial for trial in whole.get_trials(deepcopy=False) if trial.number in done]
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    columns = {name: _column(trials, name) for name in names}
    distributions = {name: distribution for name, (_, distribution) in columns.items()}
    shares = {}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        for position, objective in enumerate(study.objectives):
            single = optuna.create_study()
            for row, trial in enumerate(trials):
                value = trial.values[position]
                if not math.isfinite(value):  # of a study from elsewhere; ours do not have it
                    continue
                params = {name: values[row] for name, (values, _) in columns.items()}
                single.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
            try:
                # not PED-ANOVA, Optuna's default: what the sampler settled on early counts for nothing there
                evaluator = FanovaImportanceEvaluator(max_depth=MOST_SPLITS, seed=0)
                found = get_param_importances(single, evaluator=evaluator)
            except RuntimeError:  # no trial differs from another
                found = dict.fromkeys(names, 0.0)
            shares[objective.name] = {name: float(share) for name, share in found.items()}
    finally:
        optuna.logging.set_verbosity(verbosity)
    return shares


def _column(
    trials: list[optuna.trial.FrozenTrial], name: str
) -> tuple[list[Any], optuna.distributions.BaseDistribution]:
    """The values of one setting on its scale, constant where it does not apply, and what they are spread over."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    first = next(trial for trial in trials if name in trial.params)
    values = [trial.params.get(name, first.params[name]) for trial in trials]
    given = first.distributions[name]
    if isinstance(given, CategoricalDistribution):
        return values, CategoricalDistribution(list(dict.fromkeys(values)))
    values = [math.log(value) if getattr(given, "log", False) else float(value) for value in values]
    return values, FloatDistribution(min(values), max(values))


def is_row(trial: optuna.trial.FrozenTrial) -> bool:
    """It was started here: not enqueued, known from another study, or replaced by one that fulfils `requires`."""
    attrs = trial.user_attrs
    return trial.state.name != "WAITING" and "earlier" not in attrs and "replaced" not in attrs


def record(study: optuna.Study, study_dir: Path) -> StudyRecord:
    """The study as plain values, every trial that was started included."""
    about = study.user_attrs.get("acmds", {})
    directions = [direction.name.lower() for direction in study.directions]
    declared = about.get("objectives") or [
        {"name": f"objective_{position}", "direction": direction} for position, direction in enumerate(directions)
    ]
    started = [t for t in study.get_trials(deepcopy=False) if is_row(t)]
    searched = about.get("parameters") or list(dict.fromkeys(name for trial in started for name in trial.params))
    return StudyRecord(
        name=about.get("name") or study_dir.resolve().name,
        objectives=tuple(Objective(item["name"], item["direction"]) for item in declared),
        constraints=tuple(about.get("constraints", ())),
        searched=tuple(searched),
        trials=tuple(_trial(trial, study_dir) for trial in started),
        created=about.get("created", ""),
        yaml=about.get("yaml", ""),
        confirm_seeds=about.get("space", {}).get("confirm", {}).get("seeds"),
        sharers=_sharers(about.get("space", {})),
        linear=frozenset(
            name
            for trial in started
            for name, given in trial.distributions.items()
            if getattr(given, "log", True) is False  # choices have none
        ),
    )


def _sharers(asked: Mapping[str, Any]) -> int:
    """Trials that may be at once on one device; of the space only what says so, which early studies have as well."""
    parts = {"fixed": asked.get("fixed", {}), "resources": asked.get("resources", {})}
    return Space.model_validate(parts).sharers


def _trial(trial: optuna.trial.FrozenTrial, study_dir: Path) -> TrialRecord:
    attrs = trial.user_attrs
    status = attrs.get("status")
    if not trial.state.is_finished():
        status, reason = "running", "has not ended yet"
    elif status not in STATUSES:  # ended without its outcome: only when the search itself was killed
        status = {"PRUNED": "stopped", "COMPLETE": "ok"}.get(trial.state.name, "crashed")
        reason = "finished" if status == "ok" else "ended without an outcome"
    else:
        reason = " ".join(str(attrs.get("reason") or "").split()) or (
            "finished" if status == "ok" else "no reason given"
        )
    figures = {column.name: _number(attrs.get(column.name)) for column in FIGURES}
    if status == "oom":
        figures["oom_events"] = max(1.0, figures["oom_events"] or 0.0)
    violations = tuple(float(value) for value in attrs.get("constraints", ()))
    if status == "ok" and any(value > 0 for value in violations):
        status, reason = "infeasible", "broke a constraint"
    seed = attrs.get("seed")
    config = attrs.get("config") or _json(trial_dir(study_dir, trial.number) / "config.json") or trial.params
    seconds = _number(attrs.get("seconds"))
    if seconds is None and trial.duration is not None and "status" not in attrs:
        seconds = trial.duration.total_seconds()
    figures["seconds"] = seconds
    told = attrs.get("values") or trial.values
    values = tuple(float(value) for value in told) if trial.state.is_finished() and told is not None else None
    return TrialRecord(
        trial.number,
        status,
        reason,
        violations,
        config,
        figures,
        values,
        seconds,
        seed if seed is not None else config.get("seed"),
        attrs.get("stage", "search"),
        attrs.get("label", ""),
        bool(attrs.get("interrupted")),
        trial.datetime_start.timestamp() if trial.datetime_start is not None else None,
        _number(attrs.get("predicted_samples_per_second")),
    )


def _number(value: Any) -> float | None:
    """`value` as a float; None for what is not a number, NaN included."""
    if isinstance(value, (int, float)) and not math.isnan(value):
        return float(value)
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


# --- writing


def write_tables(study_dir: str | Path, study: StudyRecord | None = None) -> None:
    """Write trials.csv, trials.parquet, pareto.csv and events.csv anew."""
    study_dir = Path(study_dir)
    study = study or load_study(study_dir)
    header = trial_columns(study.searched)
    rows = [_row(trial, study) for trial in study.trials]
    write_atomically(study_dir / "trials.csv", _csv(header, rows))
    write_parquet(study_dir / "trials.parquet", header, rows)
    front = {trial.number for trial in front_of(study)}
    write_atomically(study_dir / "pareto.csv", _csv(header, (row for row in rows if row["trial"] in front)))
    events = (event for trial in study.trials for event in read_events(study_dir, trial.number))
    write_atomically(study_dir / "events.csv", _csv([column.name for column in EVENT_COLUMNS], events))


def write_parquet(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as Parquet, with the types of the columns also where cells are empty."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_(), "str": pyarrow.string()}
    types = {column.name: kinds[column.dtype] for column in described_trial_columns() if column.dtype in kinds}
    columns = {}
    for name in header:
        values = [row.get(name) for row in rows]
        if name in types:
            columns[name] = pyarrow.array(values, types[name])
            continue
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) + values.count(None) < len(values) and not all(isinstance(v, bool | None) for v in values):
            values = [None if value is None else str(value) for value in values]  # a setting of several types
        columns[name] = pyarrow.array(values)
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def write_importances(study_dir: Path, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Write importance.csv: one row a setting and objective."""
    rows = [
        {"objective": objective, "setting": name, "share": share}
        for objective, found in shares.items()
        for name, share in sorted(found.items(), key=lambda item: -item[1])
    ]
    write_atomically(study_dir / "importance.csv", _csv(["objective", "setting", "share"], rows))


def write_data(study_dir: str | Path, study: StudyRecord | None = None) -> None:
    """Write the tables and, where a trial is feasible, best.json: all that others read, but not the page.

    Cheap enough to be called after each trial, so that whatever ends the search, what it found is there.
    """
    study = study or load_study(study_dir)
    write_tables(study_dir, study)
    if study.feasible:
        write_best(study_dir, study)


def write_best(study_dir: str | Path, study: StudyRecord | None = None) -> TrialRecord | None:
    """Write best.json and return the best trial. Where none can be the best: no best.json, warn why, return None."""
    study_dir = Path(study_dir)
    study = study or load_study(study_dir)
    best = choose_best(study)
    if best is None:
        (study_dir / "best.json").unlink(missing_ok=True)  # of a trial that its confirmation has refuted since
        logger.warning("no best.json: %s", why_no_best(study))
        return None
    assert best.values is not None
    again = confirmations(study)
    confirmed = again.get(f"trial {best.number}")
    compared = {label: each for label, each in again.items() if not label.startswith("trial ")}
    content = {
        "acmds_study": {
            "study": study.name,
            "trial": best.number,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "objectives": {
                objective.name: {"direction": objective.direction, "value": value}
                for objective, value in zip(study.objectives, best.values, strict=True)
            },
            "confirmed": _confirmed(study, confirmed) if confirmed else None,
            "compared_with": {label: _confirmed(study, each) for label, each in compared.items()},
            "figures": {column.name: _figure(column, best.figures.get(column.name)) for column in FIGURES},
            "versions": read_environment(study_dir).get("versions", {}),
        },
        "config": dict(best.config),
    }
    write_atomically(study_dir / "best.json", json.dumps(content, indent=2) + "\n")
    return best


def _confirmed(study: StudyRecord, found: Confirmation) -> dict[str, Any]:
    values = zip(study.objectives, found.means or (), found.deviations or (), strict=False)
    return {
        "trials": [trial.number for trial in found.trials],
        "seeds": [trial.seed for trial in found.trials],
        "feasible": found.feasible,
        **{objective.name: {"mean": mean, "standard_deviation": deviation} for objective, mean, deviation in values},
    }


def write_html(study_dir: str | Path) -> Path:
    """Write report.html and importance.csv, and return the path of the page."""
    return _write_html(Path(study_dir), *_read(study_dir))


def _write_html(study_dir: Path, whole: optuna.Study, study: StudyRecord) -> Path:
    from acmds_tune.report_html import page  # imports plotly

    path = study_dir / "report.html"
    shares = _importances(whole, study)
    write_importances(study_dir, shares)
    write_atomically(path, page(study, study_dir, read_environment(study_dir), shares))
    return path


def write_all(study_dir: str | Path) -> TrialRecord | None:
    """Write the tables, best.json and report.html; return the best trial, or None. Warn of what has to be known."""
    whole, study = _read(study_dir)
    write_tables(study_dir, study)
    best = write_best(study_dir, study)
    for remark in remarks(study):
        logger.warning(remark)
    _write_html(Path(study_dir), whole, study)
    return best


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and move it there, so that a reader sees the old file or the new one, whole."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_environment(study_dir: str | Path) -> dict[str, Any]:
    """What environment.json says, with what a trial's says of the device it ran on; empty where there is none."""
    study = _json(Path(study_dir) / "environment.json")
    for path in sorted(Path(study_dir).glob("trials/*/environment.json")):
        trial = _json(path)
        return {**{name: trial[name] for name in ("device", "gpu", "gpu_memory_gb", "cuda") if name in trial}, **study}
    return study


def read_events(study_dir: str | Path, number: int) -> list[dict[str, Any]]:
    """The events of one trial with its number, in the columns of EVENT_COLUMNS; none where the trial wrote no file."""
    try:
        text = (trial_dir(study_dir, number) / "events.csv").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    events = []
    with contextlib.suppress(csv.Error):  # cut off within quotation marks
        for row in csv.DictReader(io.StringIO(text)):
            if None in row.values():  # a last line cut off by the death of the trial
                continue
            with contextlib.suppress(ValueError, OverflowError):  # not a line of the trainer's
                cells = {c.name: _event_cell(c, row) for c in EVENT_COLUMNS if c.name != "trial"}
                events.append({"trial": number, **cells})
    return events


def _event_cell(column: Column, row: Mapping[str, str]) -> Any:
    text = row.get(column.name) or ""
    if column.dtype == "int":
        return int(float(text)) if text else 0
    if column.dtype == "bool":  # what is not an out-of-memory error does not end a run
        return text.lower() in ("true", "1") if text else row.get("kind") != "out_of_memory"
    if column.dtype == "float" and text and not math.isfinite(float(text)):
        return ""
    return text


def _row(trial: TrialRecord, study: StudyRecord) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "stage": trial.stage,
        "label": trial.label,
        "status": trial.status,
        "reason": trial.reason,
        "feasible": trial.feasible,
        **{CONFIG_PREFIX + name: trial.config.get(name) for name in study.searched},
        **{column.name: _figure(column, trial.figures.get(column.name)) for column in FIGURES},
        "seconds": trial.seconds,
        "predicted_samples_per_second": trial.predicted,
        "seed": -1 if trial.seed is None else trial.seed,
    }


def _figure(column: Column, value: float | None) -> float | int | None:
    return int(value or 0) if column.dtype == "int" else value


def _csv(header: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
