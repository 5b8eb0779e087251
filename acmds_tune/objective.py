"""One configuration -> one training run -> a trial's figures. Knows nothing of Ray, Optuna or processes.

The default objective is `run`. Any function with its signature can take its place; it is named as
`package.module:function`, because a trial runs in a process of its own that must be able to import it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmds_optimizer.config import TrainConfig, build
from acmds_optimizer.errors import ACMDSError, ConfigError, OutOfMemoryForGoodError
from acmds_optimizer.files import write_json
from acmds_tune.columns import FIGURES

if TYPE_CHECKING:
    from acmds_optimizer.engine.telemetry import Progress

logger = logging.getLogger(__name__)

_MOST = 2**63
"""No table holds a larger whole number."""

DEFAULT_OBJECTIVE = "acmds_tune.objective:run"

Report = Callable[[dict[str, Any]], None]
ShouldStop = Callable[[], bool]
Objective = Callable[[Mapping[str, Any], Path, Report, ShouldStop], dict[str, Any]]
"""(settings, folder of the trial, report progress, asked to stop?) -> figures by their names in trials.csv.

`stopped_early` among them, if it is there, tells whether a trial that was asked to stop did so before its end."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended: one of acmds_tune.columns.STATUSES, why in one line, and what was measured until then."""

    status: str
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Wall time of the whole trial."""


def run(settings: Mapping[str, Any], directory: Path, report: Report, should_stop: ShouldStop) -> dict[str, Any]:
    """Train as `settings` say, with all outputs in `directory`.

    Raises:
        ConfigError: the settings do not go together.
        OutOfMemoryForGoodError: nothing fits; `partial` has what was measured.
    """
    from acmds_optimizer.engine.run import run_training  # imports torch

    config = build(TrainConfig, {**settings, "output_dir": str(directory)}, "settings of the trial")
    began = float("inf")

    def pass_on(progress: Progress) -> None:
        nonlocal began
        began = min(began, time.monotonic() - progress.seconds)  # of the first step
        report(asdict(progress))

    outcome = run_training(config, output_dir=directory, on_progress=pass_on, should_stop=should_stop)
    trained = max(outcome.seconds, time.monotonic() - began)
    return figures_of({**asdict(outcome), "training_seconds": trained}) | {"stopped_early": outcome.stopped_early}


def figures_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that trials.csv has a column for and that were measured (no None, no NaN)."""
    names = [column.name for column in FIGURES]
    if values.get("steps") == 0 and not values.get("samples_per_second"):  # nobody can be so slow
        names.remove("samples_per_second")
    return {name: values[name] for name in names if name in values and _is_measured(values[name])}


def figures_so_far(progress: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the last progress report of a trial that ended badly says about its figures."""
    values = dict(progress or {})
    for ours, theirs in (("steps", "step"), ("train_loss", "loss")):
        values.setdefault(ours, values.get(theirs))
    return figures_of(values)


def share_done(progress: Mapping[str, Any], max_seconds: float | None = None) -> float:
    """How much of a trial is done by its progress report: of its steps, or of its seconds if nearer."""
    done = progress.get("step", 0) / max(1, progress.get("total_steps") or 1)
    if max_seconds:
        done = max(done, (progress.get("seconds") or 0.0) / max_seconds)
    return max(0.0, min(1.0, done))


def _is_measured(value: Any) -> bool:
    return isinstance(value, bool | int | float) and abs(value) < _MOST and math.isfinite(value)


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are numbers or none, those of NumPy and PyTorch as Python's.

    An objective of the user's own may say anything. What is no number would have to travel to the search, and be
    reckoned with there.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"figures and progress are mappings of names to numbers, not {type(values).__name__}")
    result = {}
    for name, value in values.items():
        if hasattr(value, "item"):
            with contextlib.suppress(Exception):  # of several elements, or of another kind altogether
                value = value.item()
        if value is None or (
            isinstance(value, bool | int | float) and not (type(value) is int and abs(value) >= _MOST)
        ):
            result[name] = value
    return result


def load_objective(name: str) -> Objective:
    """The function called `package.module:function`.

    Raises:
        ConfigError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(name, [f"is not an importable function: {error}"]) from None


def evaluate(
    objective: Objective, settings: Mapping[str, Any], directory: Path, report: Report, should_stop: ShouldStop
) -> Ended:
    """Run one trial to whatever end it has. Everything but the death of the process is an `Ended`.

    The trial's folder gets traceback.txt where an exception ended it.
    """
    last: dict[str, Any] = {}

    def remember(progress: dict[str, Any]) -> None:
        progress = numbers(progress)
        last.update((key, value) for key, value in progress.items() if value is not None)
        report(progress)

    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        figures = numbers(objective(settings, directory, remember, should_stop))
    except Exception as error:  # noqa: BLE001 - whatever a trial raises is a row of the table, never the end of a search
        partial = getattr(error, "partial", None)  # what a run that failed had measured
        figures = figures_so_far(last) | _figures_of_partial(partial)
        ended = _bad_end(error, figures)
        text = traceback.format_exc()
        (directory / "traceback.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    else:
        stopped = should_stop() and figures.get("stopped_early", True)
        ended = Ended("stopped" if stopped else "ok", "asked to stop" if stopped else "finished", figures_of(figures))
    return Ended(ended.status, ended.reason, ended.figures, time.monotonic() - start)


def _figures_of_partial(partial: Any) -> dict[str, Any]:
    return figures_of(asdict(partial)) if is_dataclass(partial) and not isinstance(partial, type) else {}


def _bad_end(error: Exception, figures: dict[str, Any]) -> Ended:
    message = _one_line(error)
    if isinstance(error, OutOfMemoryForGoodError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        # at least one out-of-memory event, also where it struck before the first report
        return Ended("oom", message, {**figures, "oom_events": max(1, int(figures.get("oom_events") or 0))})
    if isinstance(error, ACMDSError):
        return Ended("error", message, figures)
    return Ended("error", f"{type(error).__name__}: {message}", figures)


def _one_line(error: BaseException) -> str:
    # the name of a file may be no UTF-8, and no table could be written with it
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - of an exception of the user's own
        said = ""
    text = (
        " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", said).split()).encode(errors="backslashreplace").decode()
        or type(error).__name__
    )
    return text if len(text) <= 300 else text[:297] + "..."


def write_outcome(directory: Path, number: int, seed: int, ended: Ended) -> None:
    """Write outcome.json in the trial's folder: what becomes its row in trials.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "outcome.json", {"trial": number, "seed": seed, **asdict(ended)})


def read_outcome(directory: Path) -> Ended | None:
    """What outcome.json says; None where there is none, or not a whole one."""
    try:
        content = json.loads((directory / "outcome.json").read_text(encoding="utf-8"))
        return Ended(content["status"], content["reason"], content["figures"], content["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
