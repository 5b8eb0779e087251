"""The commands of acmds-tune that look at studies and files, and start no trial. What they say goes to stdout."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

from acmds_optimizer.errors import ACMDSError, ConfigError
from acmds_tune.journal import JOURNAL, is_held
from acmds_tune.records import StudyRecord, TrialRecord, busy_share, choose_best, confirmations, remarks, why_no_best
from acmds_tune.report_figures import number


def show(directory: Path, trial: int | None) -> int:
    """Print the trials of a study as a table, or everything that is known of one."""
    from acmds_tune.report import load_study, trial_dir  # imports Optuna

    study = load_study(directory)
    if trial is None:
        _print_trials(study)
        return 0
    found = next((row for row in study.trials if row.number == trial), None)
    if found is None:
        numbers = [row.number for row in study.trials]
        there = f"its trials are {min(numbers)} to {max(numbers)}" if numbers else "none was started"
        raise ConfigError(str(directory), [f"has no trial {trial}; {there}"])
    print(f"trial {found.number} of {study.name}: {found.stage} {found.label}".rstrip())
    print(f"status: {found.status} ({found.reason})")
    for name, value in found.figures.items():
        if value is not None:
            print(f"{name}: {number(value)}")
    for name in study.searched:
        print(f"config/{name}: {json.dumps(found.config.get(name))}")
    print(f"files: {trial_dir(directory, found.number)}")
    return 0


def _print_trials(study: StudyRecord) -> None:
    from rich.console import Console
    from rich.table import Table

    best = choose_best(study)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [objective.name for objective in study.objectives]
    extra = [name for name in ("oom_events", "seconds") if name not in names]
    for heading in ("trial", "stage", "status", *names, *extra, *study.searched):
        table.add_column(heading, no_wrap=True)
    for row in study.trials:
        cells = [number(row.figures.get(name)) for name in (*names, *extra)]
        cells += [number(row.config.get(name)) for name in study.searched]
        what = row.label if row.stage == "search" else f"{row.stage} {row.label}".strip()
        marked = f"{row.number} *" if best is not None and row.number == best.number else str(row.number)
        table.add_row(marked, what, row.status, *cells)
    # as wide as it needs to be: what a terminal cuts off is lost to who pipes it on
    console = Console(width=max(80, 14 * len(table.columns) + 40), soft_wrap=True)
    with console.capture() as shown:
        console.print(table)
    print(shown.get(), end="")  # not by rich, which has its own way to end where the reader has gone
    if best is not None:
        print("* the best trial")


def status(directory: Path) -> int:
    """Print how far a study is, whether a search is running, and what the best is so far."""
    from acmds_tune.report import record
    from acmds_tune.storage import about_of, open_study

    opened = open_study(directory)
    study, about = record(opened, directory), about_of(opened, directory)
    running = is_held(directory)
    print(f"{study.name}: {'a search is running' if running else 'no search is running'}")
    stages = Counter(row.stage for row in study.trials if row.status != "running" and not row.interrupted)
    print("trials: " + (", ".join(f"{count} {stage}" for stage, count in stages.items()) or "none has ended"))
    print(f"asked for: {about['space']['trials']}")
    ends = Counter(row.status for row in study.trials)
    print("status: " + ", ".join(f"{count} {name}" for name, count in ends.most_common()))
    share = busy_share(study)
    if share is not None:
        print(f"GPU busy: {share:.0%} of the time")
    _print_best(study)
    if not running:
        print(f"go on with: acmds-tune resume {directory}   or: acmds-tune extend {directory} --trials +20")
    return 0


def _print_best(study: StudyRecord) -> None:
    best = choose_best(study)
    if best is None:
        print(f"best: none. {why_no_best(study)}")
        return
    print(f"best: trial {best.number}: {summary(study, best)}")
    for label, found in confirmations(study).items():
        if label == f"trial {best.number}":
            continue
        for objective, mean in zip(study.objectives, found.means or (), strict=False):
            print(f"  {label}: {objective.name} {number(mean)} (mean of {len(found.trials)})")
    for remark in remarks(study):
        print(f"  {remark}")


def summary(study: StudyRecord, trial: TrialRecord) -> str:
    """The objectives of a trial: mean and standard deviation where it was confirmed."""
    again = confirmations(study).get(f"trial {trial.number}")
    parts = []
    for position, objective in enumerate(study.objectives):
        if again is not None and again.means is not None and again.deviations is not None:
            deviation = number(again.deviations[position])
            parts.append(f"{objective.name} {number(again.means[position])} ± {deviation} (n={len(again.trials)})")
        else:
            value = trial.values[position] if trial.values else None
            parts.append(f"{objective.name} {number(value)} (one run)")
    return ", ".join(parts)


def compare(one: Path, other: Path) -> int:
    """Print the best of two studies beside each other: objectives, figures, and the settings that differ."""
    from acmds_tune.report import load_study

    studies = [load_study(one), load_study(other)]
    bests = [choose_best(study) for study in studies]
    for folder, study, best in zip((one, other), studies, bests, strict=True):
        if best is None:
            raise ConfigError(str(folder), [why_no_best(study)])
    a, b = (best for best in bests if best is not None)
    rows = [("", f"{one} (trial {a.number})", f"{other} (trial {b.number})")]
    rows.append(("best", summary(studies[0], a), summary(studies[1], b)))
    for name in a.figures:
        values = a.figures.get(name), b.figures.get(name)
        if any(value is not None for value in values):
            rows.append((name, number(values[0]), number(values[1])))
    for name in sorted(set(a.config) | set(b.config)):
        if a.config.get(name) != b.config.get(name) and name not in ("seed", "output_dir"):
            rows.append((f"config/{name}", json.dumps(a.config.get(name)), json.dumps(b.config.get(name))))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip())
    return 0


def import_study(directory: Path, source: Path) -> int:
    """Make the trials of another study known to this one."""
    from acmds_tune.space_load import load_again
    from acmds_tune.storage import read_about
    from acmds_tune.study import SearchStudy

    about = read_about(directory)
    study = SearchStudy.resume(directory, load_again(directory, about, about["space"]["trials"]))
    try:
        count = study.learn_from(source)
    finally:
        study.close()
    print(f"{count} trials of {source} are known to the sampler of {directory}, and its best settings are tried next")
    return 0


def dashboard(directory: Path, port: int) -> int:
    """Serve Optuna's dashboard of a study until Ctrl-C."""
    if not (directory / JOURNAL).is_file():
        raise ConfigError(str(directory), [f"is not the folder of a study: it has no {JOURNAL}"])
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise ACMDSError("the dashboard is not installed: pip install optuna-dashboard")
    if not 0 < port < 2**16:
        raise ConfigError("command line", [f"--port {port}: write a number from 1 to 65535"])
    from acmds_tune.storage import serve_dashboard

    print(f"http://127.0.0.1:{port}/", flush=True)
    try:
        serve_dashboard(directory, port)
    except OSError as error:
        raise ACMDSError(f"port {port}: {error.strerror}; give another one with --port") from None
    return 0


def validate(file: Path, fixed: dict[str, str]) -> int:
    """Check a search-space file and say what it asks for."""
    from acmds_tune.space_load import load
    from acmds_tune.stages import planned

    space = load(file, fixed=fixed)
    goals = ", ".join(f"{goal.direction} {goal.name}" for goal in space.objective)
    print(f"{file}: searches {len(space.search)} settings to {goals}, about {planned(space)} trials")
    return 0


def schema() -> int:
    """Print the JSON schema of search-space files."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """The JSON schema of search-space files, in our spellings, with the trainer's settings under fixed and search."""
    from pydantic import TypeAdapter

    from acmds_optimizer.config import TrainConfig, field_help, field_names
    from acmds_tune.space import FIGURE_NAMES, PRESETS, SET_BY_THE_SEARCH, Space

    whole = Space.model_json_schema()
    trainer = TypeAdapter(TrainConfig).json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["title"] = "Search space of acmds-tune"
    whole["$defs"].update(trainer.get("$defs", {}))
    names = [name for name in field_names() if name not in SET_BY_THE_SEARCH]
    goal = {"anyOf": [{"enum": [*PRESETS, *FIGURE_NAMES]}, whole["$defs"]["Objective"]]}
    whole["$defs"]["Objective"]["required"] = ["name"]
    properties = whole["properties"]
    scalar = {"type": ["boolean", "integer", "number", "string", "null"]}
    condition = {"type": "object", "additionalProperties": {"anyOf": [{"type": "array", "items": scalar}, scalar]}}
    whole["$defs"]["Parameter"]["properties"]["when"] |= {"anyOf": [condition, {"type": "null"}]}
    properties["objective"] = {
        "description": properties["objective"].get("description", ""),
        "anyOf": [*goal["anyOf"], {"type": "array", "items": goal}],
    }
    properties["fixed"] = {
        "description": properties["fixed"].get("description", ""),
        "type": "object",
        "additionalProperties": False,
        "properties": {name: trainer["properties"][name] for name in names},
    }
    texts = field_help()
    properties["search"] = {
        "description": properties["search"].get("description", ""),
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {"$ref": "#/$defs/Parameter", "description": texts.get(name, "")}
            for name in names
            if name != "device"
        },
    }
    whole["required"] = ["search"]
    return whole
