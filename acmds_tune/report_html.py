"""report.html: one page that opens without a network, from a study's records. Here its frame and its plots."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from acmds_tune import report_figures as figures
from acmds_tune import report_text as words
from acmds_tune.records import DONE, StudyRecord, choose_best, why_no_best, worst_first
from acmds_tune.report import FEWEST_TRIALS_FOR_IMPORTANCES, read_events, trial_dir
from acmds_tune.report_text import text

logger = logging.getLogger(__name__)


def page(
    study: StudyRecord,
    study_dir: Path,
    environment: Mapping[str, Any],
    shares: Mapping[str, Mapping[str, float]],
) -> str:
    """The whole page.

    Args:
        study: what the journal holds.
        study_dir: its folder, for the step records.
        environment: content of environment.json.
        shares: importances, as report.importances gives them.
    """
    best, baseline = choose_best(study), words.default_trial(study)
    marked = {f"best (trial {best.number})": best} if best else {}
    if best and baseline and baseline is not best:
        marked[f"defaults (trial {baseline.number})"] = baseline
    plots: dict[str, figures.Figure] = {}
    body = "\n".join(
        [
            words.head(study, environment),
            words.tiles(study, best, baseline) if best else f'<p class="alert">{text(why_no_best(study))}</p>',
            words.best_settings(study, best, "/".join(study_dir.resolve().parts[-2:])) if best else "",
            words.confirmation(study, best),
            comparisons(
                replace(study, trials=[*study.candidates, *study.of_stages(("baseline",))]),
                marked,
                shares,
                plots,
                figures.baseline_values(study),
            ),
            responses(study, study_dir, plots),
            words.all_trials(study, best),
            words.bad_ends(study),
            words.how_to_read(study),
        ]
    )
    template = (Path(__file__).parent / "report_page.html").read_text(encoding="utf-8")
    parts = {
        "title": text(f"{study.name} - ACMDS report"),
        "body": body,
        "figures": packed(json.dumps(plots, allow_nan=False, separators=(",", ":"))) if plots else "",
        "library": packed(without_maps(get_plotlyjs())) if plots else "",
    }
    first, *rest = template.split("{{")  # not str.replace, which would also look inside what was put in
    return first + "".join(parts[name] + after for name, after in (piece.split("}}", 1) for piece in rest))


def without_maps(library: str) -> str:
    """plotly.js less the worker of its map traces, one string of half a megabyte; as it is where there is none such."""
    start = library.find("='var t1=Object") + 1
    if not start:
        return library
    end = start + 1
    while library[end] != "'":
        end += 2 if library[end] == "\\" else 1
    return library[: start + 1] + library[end:]


def packed(content: str) -> str:
    """`content` as gzip in base 85 without the character <, in lines: 1.7 MB for plotly's 4.8."""
    raw = base64.b85encode(gzip.compress(content.encode(), 9, mtime=0)).decode().replace("<", ",")
    return "\n".join(raw[start : start + 4000] for start in range(0, len(raw), 4000))


def plot(
    name: str, title: str, caption: str, drawn: figures.Figure | None, otherwise: str, into: dict[str, Any]
) -> str:
    """A place for one plot, or the reason why it is not there. `caption` is HTML."""
    inner = f"<figure><h3>{text(title)}</h3><figcaption>{caption}</figcaption>"
    if drawn is None:
        return f'{inner}<div class="empty">{text(otherwise)}</div></figure>'
    into[name] = drawn
    height = drawn["layout"]["height"]
    return f'{inner}<div class="plot" id="{name}" style="height:{height}px"></div></figure>'


def comparisons(
    study: StudyRecord,
    marked: figures.Marked,
    shares: Mapping[str, Mapping[str, float]],
    into: dict[str, Any],
    lines: Mapping[str, float],
) -> str:
    """The plots of all trials; `lines` are the baselines of the whole study, confirmations included."""
    unmeasured = sum(t.status != "running" and t.figures.get("samples_per_second") is None for t in study.trials)
    missing = f" Not drawn: {unmeasured} that ended before throughput was measured." if unmeasured else ""
    done = sum(trial.status in DONE for trial in study.trials)
    too_few = "The trials do not differ enough to tell the settings apart."
    if done < FEWEST_TRIALS_FOR_IMPORTANCES:
        too_few = f"Needs {FEWEST_TRIALS_FOR_IMPORTANCES} trials that ran to their end; this study has {done}."
    nothing = "No trial ran long enough to measure this."
    of_first = shares.get(study.objectives[0].name, {})
    slices, left_out = figures.slices(replace(study, trials=study.candidates), of_first)
    parts = [
        plot(
            "oom",
            "Throughput against out-of-memory events",
            f"Best is high and at the left edge. Grey: not feasible.{missing}",
            figures.throughput_against_oom(study, marked),
            nothing,
            into,
        ),
        plot(
            "pareto",
            "Pareto front",
            "What one costs in the other. The line joins the feasible trials that no other beats in both.",
            figures.pareto(study, marked),
            "Needs two trials that have both figures.",
            into,
        ),
        plot(
            "history",
            "Optimisation history",
            "The line is the best feasible trial so far; flat for long: more trials will hardly help.",
            figures.history(study, marked, lines),
            nothing,
            into,
        ),
        plot(
            "importances",
            "Parameter importances",
            "How much of the difference between trials is due to each setting (fANOVA); slices show the direction.",
            figures.importance(shares),
            too_few,
            into,
        ),
        plot(
            "slices",
            "Slices",
            f"The first objective over each setting. What rises or falls through all trials matters.{left_out}",
            slices,
            "Needs two trials that differ.",
            into,
        ),
    ]
    return (
        "<section><h2>All trials compared</h2><p class=muted>Point at a mark for its settings, drag to zoom, "
        f'double-click to go back.</p><div class="plots">{"".join(parts)}</div></section>'
    )


def read_steps(study_dir: Path, number: int) -> pd.DataFrame | None:
    """steps.csv of a trial, the columns that are drawn; None where it has no whole row."""
    path = trial_dir(study_dir, number) / "steps.csv"
    needed = ["step", "micro_batch", "peak_allocated_gb", "reserved_gb", "budget_gb", "target_headroom_gb"]
    try:
        steps = pd.read_csv(path, usecols=needed, on_bad_lines="skip")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a trial that was killed may leave anything
        logger.warning("%s is left out of the report: %s", path, error)
        return None
    steps = steps.apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    steps = steps.dropna(subset=["step", "micro_batch"])
    return steps if len(steps) else None


def responses(study: StudyRecord, study_dir: Path, into: dict[str, Any]) -> str:
    """Batch size and memory over the steps of the best and of the worst trial."""
    best = choose_best(study)
    ended = [trial for trial in study.trials if trial.status != "running" and trial is not best]
    shown = []
    for role, trials in (("best", [best] if best else []), ("worst", worst_first(ended))):
        for trial in trials:
            steps = read_steps(study_dir, trial.number)
            if steps is not None:
                shown.append((role, trial, steps))
                break
    if not shown:
        return '<section><h2>Memory over the steps</h2><div class="empty">No trial left step records.</div></section>'
    highest = max(float(steps[["budget_gb", "reserved_gb", "peak_allocated_gb"]].max().max()) for *_, steps in shown)
    parts = []
    for role, trial, steps in shown:
        speed, errors = words.figure(trial, "samples_per_second"), words.figure(trial, "oom_events")
        caption = f"{text(trial.status)}; {speed} samples/s; out-of-memory events: {errors}"
        events = read_events(study_dir, trial.number)
        drawn = figures.memory_over_steps(steps, events, 1.06 * highest if math.isfinite(highest) else None)
        parts.append(plot(f"steps_{role}", f"Trial {trial.number}, the {role}", caption, drawn, "", into))
    return (
        "<section><h2>Memory over the steps</h2><p class=muted>The controller chooses the micro-batch so that what "
        "is reserved stays under the target, which is the budget less the headroom. The worst trial has the "
        "most out-of-memory events, of equals the slowest. All memory axes are the same.</p>"
        f'<div class="plots">{"".join(parts)}</div></section>'
    )
