"""The words and tables of report.html: HTML from records, without plots. Every text of the user is escaped."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from acmds_optimizer.config import TrainConfig, to_dict
from acmds_tune.columns import FIGURES, STATUSES
from acmds_tune.plant import agreement
from acmds_tune.prescreen import comparable, misled
from acmds_tune.records import (
    DEFAULT,
    DONE,
    StudyRecord,
    TrialRecord,
    busy_share,
    confirmations,
    remarks,
    rule_of_choice,
)
from acmds_tune.report_figures import number
from acmds_tune.stages import SAMPLED

MOST_ROWS = 500
MOST_CELLS = 8000
"""Rows and cells of the table of all trials; trials.csv has the rest."""

NOT_SETTINGS = ("output_dir", "data_dir", "seed")
"""Where files lie and the trial's own seed: not part of what was found."""

COUNTS = {column.name for column in FIGURES if column.dtype == "int"}


def text(value: Any) -> str:
    """`value` as text that is safe anywhere in the page."""
    return html.escape(str(value))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def figure(trial: TrialRecord, name: str) -> str:
    """A figure of a trial for people."""
    value = trial.figures.get(name)
    return number(int(value) if name in COUNTS and value is not None else value)


def head(study: StudyRecord, environment: Mapping[str, Any]) -> str:
    """Name, what was searched for, and the machine."""
    counts = Counter(trial.status for trial in study.trials)
    ended = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    goals = ", ".join(f"{objective.direction} {objective.name}" for objective in study.objectives)
    limits = " subject to " + ", ".join(study.constraints) if study.constraints else ""
    facts = {
        "started": study.created[:16].replace("T", " "),
        "report made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "GPU busy": share_text(busy_share(study)),
        "training": share_text(busy_share(study, "training_seconds")),
        "time in trials": duration(sum(trial.seconds or 0.0 for trial in study.trials)),
        **flat(environment),
    }
    rows = "".join(
        f"<div{' class=long' if len(str(value)) > 40 else ''}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in facts.items()
        if value
    )
    return (
        f'<header><p class="kind">ACMDS search report</p><h1>{text(study.name)}</h1>'
        f"<p>{text(goals[:1].upper() + goals[1:])}{text(limits)}. "
        f"{len(study.trials)} trial{'s' if len(study.trials) != 1 else ''}{': ' + ended if ended else ''}.</p>"
        f'<dl class="about">{rows}</dl></header>'
    )


def share_text(share: float | None) -> str:
    """A share of the search's wall time."""
    return "" if share is None else f"{share:.0%} of the wall time"


def confirmation(study: StudyRecord, best: TrialRecord | None) -> str:
    """What was run on several seeds, the baselines beside it, and the drift of the machine; nothing without these."""
    again, objective = confirmations(study), study.objectives[0]
    ours = again.get(f"trial {best.number}") if best else None
    rows = []
    for label, found in again.items():
        mean = found.means[0] if found.means else None
        ratio = mean / ours.means[0] if ours and ours.means and ours.means[0] and mean is not None else None
        named = f"{label} (the best)" if found is ours else label
        cells = (
            len(found.trials), number(mean), number(found.deviations[0]) if found.deviations else "–",
            number(ratio), "yes" if found.feasible else "no",
        )  # fmt: skip
        rows.append(f"<tr><td>{text(named)}" + "".join(f"<td class=n>{text(cell)}" for cell in cells))
    for trial in study.of_stages(("baseline",)):
        if trial.status == "running" or trial.interrupted or trial.label in again:
            continue
        value = trial.figures.get(objective.name)
        cells = (1, number(value), "–", "–", "yes" if trial.feasible else "no")
        rows.append(f"<tr><td>{text(trial.label)}" + "".join(f"<td class=n>{text(cell)}" for cell in cells))
    notes = "".join(f"<p class=note>{text(remark)}</p>" for remark in remarks(study))
    drift = notes + anchor_drift(study) + plant_words(study)
    if not rows and not drift:
        return ""
    heads = (
        f"<thead><tr><th>what<th class=n>runs<th class=n>mean "
        f"{text(objective.name).replace('_', '_<wbr>')}<th class=n>standard deviation<th class=n>of the best"
        "<th class=n>feasible"
    )
    what = "Runs with the same seeds, none of which chose the best." if again else "One run each; not confirmed."
    table = f"<table class=trials>{heads}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    return f"<section><h2>Confirmation and baselines</h2><p class=muted>{what}</p>{table}{drift}</section>"


GOOD_CHOICE = 0.95
"""Where what the plant put first has this share of the best throughput, a wrong order of the others costs nothing."""


def plant_words(study: StudyRecord) -> str:
    """How well the plant predicted what was then measured, and whether to believe it."""
    rows = [row for row in study.trials if row.predicted and row.status in DONE and row.figures["samples_per_second"]]
    several: dict[str, list[TrialRecord]] = {}
    for row in rows:  # repetitions of the same settings are one configuration
        several.setdefault(str([row.predicted, *(row.config.get(name) for name in study.searched)]), []).append(row)
    alike = {key: each for key, each in several.items() if comparable(study, each[0], rows[0])}
    chosen = list((alike if len(alike) >= 3 else several).values())
    predicted = [each[0].predicted or 0.0 for each in chosen]
    measured = [statistics.fmean(row.figures["samples_per_second"] or 0.0 for row in each) for each in chosen]
    found, words = agreement(predicted, measured), ""
    if found is not None:
        correlation, error = found
        differ = "only" if len(alike) >= 3 else "also in others, of which it knows nothing, and"
        words = f"The plant, fitted from short runs, predicted the throughput of {len(chosen)} configurations"
        words += f" with a rank correlation of {correlation:.2f} and" if correlation is not None else " with"
        words += (
            f" a median error of {100 * error:.1f} %, once scaled. They differ {differ} in the controller's settings. "
        )
        top = statistics.fmean(m for p, m in zip(predicted, measured, strict=True) if p == max(predicted))
        share = top / max(measured)
        if max(predicted) < 1.05 * min(predicted):
            words += "Its predictions are within 5 % of each other, so their order says nothing. "
        else:
            words += f"What it put first measured {share:.2f} times the best of them. "
            if share < GOOD_CHOICE and (correlation is None or correlation < 0.5):
                words += "<b>It predicted badly here:</b> its order is no better than a guess. "
    if misled(study):
        words += "The plant's first choice was no better than the defaults, so its other choices were passed over. "
    return f"<p class=note>{words.strip()}</p>" if words else ""


def anchor_drift(study: StudyRecord) -> str:
    """What the same settings measured over the study."""
    objective = study.objectives[0].name
    runs = [row for row in study.of_stages((*SAMPLED, "train")) if row.label == DEFAULT and row.status in DONE]
    before = [row for row in runs if row.figures.get(objective)]
    anchors = [trial for trial in study.of_stages(("anchor",)) if trial.figures.get(objective) is not None]
    if not anchors or not before:
        return ""
    shown = []
    for trial in anchors:  # in full or short: studies from before had both among short trials
        first = min(before, key=lambda row: _times_as_long(row, trial))
        shown.append(f"{100 * ((trial.figures[objective] or 0.0) / (first.figures[objective] or 1.0) - 1):+.1f} %")
    said = text(", ".join(shown))
    return f"<p class=note>Drift: the default settings, run again, measured {said} against their first run.</p>"


def _times_as_long(one: TrialRecord, other: TrialRecord) -> float:
    """How many times as many samples the longer of two trials was trained on; 1 where that is not known."""
    a, b = one.figures.get("samples"), other.figures.get("samples")
    return max(a / b, b / a) if a and b else 1.0


def flat(environment: Mapping[str, Any]) -> dict[str, str]:
    """environment.json as one line a fact; an inner mapping becomes one line."""
    facts = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            facts[name.replace("_", " ")] = number(value)
    return facts


def default_trial(study: StudyRecord) -> TrialRecord | None:
    """The first trial that ran to its end with the defaults of acmds-train for all searched settings."""
    defaults = to_dict(TrainConfig())
    for trial in study.candidates:
        if trial.status in DONE and all(trial.config.get(name) == defaults.get(name) for name in study.searched):
            return trial
    return None


def tiles(study: StudyRecord, best: TrialRecord, baseline: TrialRecord | None) -> str:
    """The best trial in a few numbers; `baseline` is the trial with the default settings.

    Where the best was run again on other seeds, its throughput is the mean of these runs: the run that chose it
    was lucky as well. The same holds for the defaults, if they were run on these seeds too.
    """
    speed = best.figures.get("samples_per_second")
    base = baseline.figures.get("samples_per_second") if baseline else None
    cells = [(figure(best, "samples_per_second"), "samples/s", f"best: trial {best.number}, one run")]
    again = _mean_speed(study, f"trial {best.number}")
    default_again = _mean_speed(study, DEFAULT)
    if again:
        runs, mean, deviation = again
        cells = [(number(mean), "samples/s", f"best: trial {best.number}, ± {number(deviation)}, {runs} runs")]
    if again and default_again:
        what = f"{DEFAULT}: {number(default_again[1])}, {default_again[0]} runs"
        cells.append((f"{again[1] / default_again[1]:.2f}×", "the default settings", what))
    elif baseline and baseline is not best and speed and base:
        ooms = "" if baseline.feasible else f", {figure(baseline, 'oom_events')} OOM events"
        cells.append((f"{speed / base:.2f}×", "the default settings", f"trial {baseline.number}: {number(base)}{ooms}"))
    cells.append((figure(best, "oom_events"), "OOM events", f"in {figure(best, 'steps')} steps"))
    limit = best.config.get("memory_limit_gb")
    of_limit = f"of a limit of {number(limit)} GB" if limit else "no limit set"
    cells.append((gigabytes(best, "peak_reserved_gb"), "peak reserved", of_limit))
    target = number(best.config.get("target_headroom_gb"))
    cells.append((gigabytes(best, "headroom_min_gb"), "least headroom", f"target {target} GB"))
    accuracy = best.figures.get("val_accuracy")
    if accuracy is not None:
        cells.append((f"{100 * accuracy:.1f} %", "validation accuracy", f"loss {figure(best, 'val_loss')}"))
    items = (f'<div class="tile"><b>{text(a)}</b>{text(b)}<span>{text(c)}</span></div>' for a, b, c in cells)
    return f'<div class="tiles">{"".join(items)}</div>'


def _mean_speed(study: StudyRecord, label: str) -> tuple[int, float, float] | None:
    """(runs, mean, standard deviation) of the confirmation's throughput; None where there is none."""
    found = confirmations(study).get(label)
    runs = [trial for trial in found.trials if trial.status in DONE] if found else []
    speeds = [speed for trial in runs if (speed := trial.figures.get("samples_per_second"))]
    if len(speeds) < 2:
        return None
    return len(speeds), statistics.fmean(speeds), statistics.stdev(speeds)


def best_settings(study: StudyRecord, best: TrialRecord, folder: str) -> str:
    """The settings of the best trial against the defaults, and the command that trains with them."""
    defaults = to_dict(TrainConfig())
    fixed = [
        name
        for name, value in best.config.items()
        if name not in study.searched and name not in NOT_SETTINGS and value != defaults.get(name)
    ]
    searched = settings_table(study.searched, best.config, defaults)
    rest = settings_table(fixed, best.config, defaults) if fixed else "<p>All others are the defaults.</p>"
    cut = [f"{name} is {number(best.config[name])}" for name in ("max_steps", "max_seconds") if best.config.get(name)]
    note = (
        f"<p class=note>In it {text(' and '.join(cut))}, as in the search; to train longer, give another value on "
        "the command line.</p>"
    )
    return (
        "<section><h2>Best configuration</h2>"
        f"<p>Trial {best.number}: {text(rule_of_choice(study))}. To train with it:</p>"
        f"<pre>acmds-train --config {text(folder)}/best.json</pre>{note if cut else ''}"
        f'<div class="pair"><div><h3>Searched</h3>{searched}</div>'
        f"<div><h3>Set for all trials</h3>{rest}</div></div></section>"
    )


def settings_table(names: Iterable[str], config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Value and default of each setting; what differs is marked."""
    rows = []
    for name in names:
        value, default = config.get(name), defaults.get(name)
        changed = value != default
        rows.append(
            f"<tr{' class=changed' if changed else ''}><td><code>{text(name)}</code><td>{text(setting(value))}"
            f"<td>{text(setting(default))}<td class=tag>{'changed' if changed else ''}"
        )
    heads = "<thead><tr><th>setting<th>best<th>default<th></thead>"
    return f"<table class=settings>{heads}<tbody>{''.join(rows)}</tbody></table>"


def gigabytes(trial: TrialRecord, name: str) -> str:
    """A figure in GB, short; in MB where it is a small part of one, as on a card on the CPU."""
    value = trial.figures.get(name)
    if value is None:
        return number(value)
    return f"{value:.3g} GB" if not 0 < value < 0.1 else f"{1024 * value:.3g} MB"


def setting(value: Any) -> str:
    """A setting as one would write it in a configuration file."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else number(value)


def what(trial: TrialRecord) -> str:
    """Why a trial was run, in a word or two; empty for most of those of the search."""
    return trial.label if trial.stage == "search" else f"{trial.stage} {trial.label}".strip()


def all_trials(study: StudyRecord, best: TrialRecord | None) -> str:
    """The table of all trials, sortable."""
    names = ["samples_per_second", "oom_events", "peak_reserved_gb", "headroom_min_gb", "headroom_breach_fraction"]
    names += ["batch_size_mean", "val_loss", "val_accuracy"]
    heads = ["trial", "stage", "status", *names, "seconds", *study.searched]
    # columns with a word in them are aligned to the left
    wordy = {n for n in study.searched if any(isinstance(row.config.get(n), (str, bool)) for row in study.trials)}
    aligned = {name: "" if name in ("stage", "status") or name in wordy else " class=n" for name in heads}
    rows, most = [], min(MOST_ROWS, MOST_CELLS // len(heads))
    for trial in study.trials[:most]:
        kind = " class=best" if trial is best else "" if trial.feasible else " class=off"
        cells = [str(trial.number), what(trial), trial.status, *(figure(trial, name) for name in names)]
        cells += [number(trial.seconds), *(setting(trial.config.get(name)) for name in study.searched)]
        marked = (f"<td{aligned[name]}>{text(cell)}" for name, cell in zip(heads, cells, strict=True))
        rows.append(f"<tr{kind}>{''.join(marked)}")
    titles = "".join(f"<th{aligned[name]}>{text(name).replace('_', '_<wbr>')}" for name in heads)
    more = f" Shown: the first {most} of {len(study.trials)}." if len(study.trials) > most else ""
    return (
        f"<section><h2>All trials</h2><p class=muted>Click on a heading to sort.{more} trials.csv beside this page has "
        'more columns; docs/reports.md says what they mean.</p><div class="wide"><table class="trials">'
        f"<thead><tr>{titles}</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def bad_ends(study: StudyRecord) -> str:
    """Trials that cannot be the best, with the reasons."""
    bad = [trial for trial in study.trials if not trial.feasible and trial.status != "running"]
    if not bad:
        return ""
    rows = "".join(
        f"<tr><td>{trial.number}<td>{text(what(trial))}<td>{text(trial.status)}"
        f"{', interrupted' if trial.interrupted else ''}<td>{figure(trial, 'oom_events')}<td>{text(trial.reason[:600])}"
        for trial in bad[:MOST_ROWS]
    )
    notes = [f"{len(bad)} of {len(study.trials)}."]
    if any(trial.stage in SAMPLED and not trial.interrupted for trial in bad):
        notes.append("The sampler is told that those it proposed are bad, so that it keeps away from there.")
    if any(trial.interrupted for trial in bad):
        notes.append("One that was interrupted says nothing about its settings, and the sampler is not told of it.")
    return (
        f"<section><h2>Rejected and failed trials</h2><p class=muted>{' '.join(notes)}</p>"
        '<div class="wide"><table class="reasons"><thead><tr><th>trial<th>stage<th>status<th>OOM events<th>reason'
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def how_to_read(study: StudyRecord) -> str:
    """What the words mean."""
    statuses = "; ".join(f"<i>{text(status)}</i> {text(meaning)}" for status, meaning in STATUSES.items())
    constraints = text(", ".join(study.constraints) or "none")
    notes: Sequence[str] = (
        "<b>Throughput</b> is useful samples over wall time after warm-up. Time lost to recovery from out-of-memory "
        "errors is in it, so settings that gamble with memory do not look fast.",
        f"<b>Feasible</b> trials ran to their end and kept every constraint ({constraints}). "
        f"The best is {text(rule_of_choice(study))}.",
        "<b>Budget</b> is what the process may hold: free memory plus what it holds, up to memory_limit_gb. "
        "<b>Target</b> is the budget less target_headroom_gb. <b>Reserved</b> is what the allocator holds, "
        "<b>allocated</b> what tensors use of it. GB are 2<sup>30</sup> bytes.",
        f"<b>Status</b>: {statuses}.",
        "One short run a setting is a noisy measurement: a difference of a few percent between trials may be chance.",
    )
    items = "".join(f"<li>{note}</li>" for note in notes)
    space = f"<details><summary>study.yaml</summary><pre>{text(study.yaml)}</pre></details>" if study.yaml else ""
    return f"<section><h2>How to read this</h2><ul>{items}</ul>{space}</section>"
