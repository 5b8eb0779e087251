"""The plots of report.html as plain plotly dictionaries: pure functions of records.

One accent colour for what is feasible, grey for what is not, and one colour for out-of-memory events.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from acmds_tune.records import FIXED, Objective, StudyRecord, TrialRecord, confirmations, pareto_front
from acmds_tune.stages import best_fixed

if TYPE_CHECKING:
    import pandas as pd

Figure = dict[str, Any]
Marked = Mapping[str, TrialRecord]

ACCENT, PALE, GREY, INK, GRID, ALARM = "#0072B2", "#8FC1E3", "#9AA3AD", "#1F2933", "#E6E9ED", "#D55E00"
"""Blue and vermilion of Okabe and Ito's palette, which people with any common colour blindness tell apart."""

SYMBOLS = {
    "ok": "circle",
    "infeasible": "circle-open",
    "oom": "x-thin-open",
    "host_oom": "cross-thin-open",
    "crashed": "triangle-down-open",
    "timeout": "square-open",
    "error": "diamond-open",
    "stopped": "triangle-left-open",
}
"""Marker of a status; all but ok are grey."""

LABELS = {
    "samples_per_second": "Throughput (samples/s)",
    "oom_events": "Out-of-memory events",
    "val_loss": "Validation loss (nats)",
    "val_accuracy": "Validation accuracy (fraction)",
    "train_loss": "Training loss (nats)",
    "peak_reserved_gb": "Peak reserved memory (GB)",
    "seconds": "Wall time of the trial (s)",
}
MOST_POINTS = 2000
"""Points of one line; more cannot be told apart on a screen and cost file size."""

MOST_HOVERED = 1000
"""Trials of a study whose settings are shown beside the mouse; of a larger one the page would be too large."""
MOST_SLICES = 12
"""Settings that have a slice."""
MOST_SLICED = 6000
"""Points of all slices together; of more trials every second, third ... is drawn."""


def label(name: str) -> str:
    """Axis title of a column."""
    return LABELS.get(name, name)


def number(value: Any) -> str:
    """`value` for people: four significant digits, thousands marked; an en dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the style of the page."""
    style = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY}
    return {"title": {"text": title, "standoff": 10}, "automargin": True, **style, **more}


def layout(height: int = 360, **more: Any) -> dict[str, Any]:
    """The layout that all plots share; `height` in pixels."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 36, "b": 52},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#FFFFFF", "bordercolor": GREY, "font": {"color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        **more,
    }


def hover(trial: TrialRecord, study: StudyRecord) -> str:
    """What is shown beside the mouse for one trial; its settings only where the study is not very large."""
    if len(study.trials) > MOST_HOVERED:
        return f"<b>trial {trial.number}</b>"
    figures = trial.figures
    lines = [
        f"<b>trial {trial.number}</b> · {trial.status}",
        f"{number(figures.get('samples_per_second'))} samples/s, {number(figures.get('oom_events'))} OOM events",
        *(html.escape(f"{name} = {number(trial.config.get(name))}", quote=False) for name in study.searched[:12]),
    ]
    return "<br>".join(lines)


def trace(mode: str, name: str, points: Sequence[tuple[Any, Any]], **more: Any) -> Figure:
    """Lines or markers through (x, y) points, to six digits."""
    x, y = ([float(f"{v:.6g}") if isinstance(v, float) else v for v in (p[k] for p in points)] for k in (0, 1))
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, **more}


def scatter(study: StudyRecord, marked: Marked, points: Mapping[int, tuple[float, float]]) -> list[Figure]:
    """One trace a status, in the order of SYMBOLS, and a ring around each trial of `marked`.

    Args:
        study: whose trials are drawn.
        marked: trials by their name in the legend; the first is the best.
        points: x and y by trial number; a trial without them is not drawn.
    """
    traces = []
    for status, symbol in SYMBOLS.items():
        trials = [trial for trial in study.trials if trial.status == status and trial.number in points]
        if not trials:
            continue
        good = status == "ok"
        colour, line = (ACCENT, {"width": 0}) if good else (GREY, {"width": 1.5})
        traces.append(
            trace(
                "markers",
                "feasible" if good else status,
                [points[trial.number] for trial in trials],
                text=[hover(trial, study) for trial in trials],
                hovertemplate="%{text}<extra></extra>",
                marker={"symbol": symbol, "size": 9, "color": colour, "line": line, "opacity": 0.85},
            )
        )
    for symbol, (name, trial) in zip(("circle-open", "diamond-open"), marked.items(), strict=False):
        if trial.number in points:
            ring = {"symbol": symbol, "size": 17, "color": INK, "line": {"width": 2}}
            traces.append(trace("markers", name, [points[trial.number]], hoverinfo="skip", marker=ring))
    return traces


def measured(study: StudyRecord, x: str, y: str) -> dict[int, tuple[float, float]]:
    """Two figures by trial number, of the trials that have both and have ended."""
    points = {}
    for trial in study.trials:
        one, other = trial.figures.get(x), trial.figures.get(y)
        if trial.status == "running" or one is None or other is None:
            continue
        if math.isfinite(one) and math.isfinite(other):
            points[trial.number] = (one, other)
    return points


def throughput_against_oom(study: StudyRecord, marked: Marked) -> Figure | None:
    """Throughput over out-of-memory events; None where no trial measured its throughput."""
    points = measured(study, "oom_events", "samples_per_second")
    if not points:
        return None
    most = max(x for x, _ in points.values())
    ends = max(most, 4)
    dense = {"dtick": 1} if most <= 10 else {}
    x_axis = axis("Out-of-memory events", tickformat="d", range=[-0.06 * ends, 1.06 * ends], **dense)
    if most > 20:  # one wild trial must not press all others against the axis
        marks = [0, *(m * 10**e for e in range(7) for m in (1, 3) if m * 10**e <= most * 1.5)]
        points = {key: (math.log10(1 + x), y) for key, (x, y) in points.items()}
        span = math.log10(1 + most)
        ticks = {"tickvals": [math.log10(1 + mark) for mark in marks], "ticktext": [str(mark) for mark in marks]}
        x_axis = axis("Out-of-memory events (log scale)", range=[-0.06 * span, 1.06 * span], **ticks)
    y_axis = axis(label("samples_per_second"), rangemode="tozero")
    return {"data": scatter(study, marked, points), "layout": layout(xaxis=x_axis, yaxis=y_axis)}


def pareto(study: StudyRecord, marked: Marked) -> Figure | None:
    """The first two objectives, or throughput and validation loss, or throughput and memory.

    None where fewer than two trials have both.
    """
    pair = list(study.objectives[:2])
    if len(pair) < 2:
        learned = any(trial.figures.get("val_loss") is not None for trial in study.trials)
        price = "val_loss" if learned else "peak_reserved_gb"
        pair = [Objective("samples_per_second", "maximize"), Objective(price, "minimize")]
    points = measured(study, pair[0].name, pair[1].name)
    if len(points) < 2:
        return None
    feasible = [points[trial.number] for trial in study.feasible if trial.number in points]
    front = pareto_front([(pair[0].cost(x), pair[1].cost(y)) for x, y in feasible])
    line = sorted(feasible[position] for position in front)
    edge = trace("lines", "Pareto front", line, line={"color": PALE, "width": 2}, hoverinfo="skip")
    arrows = {"maximize": "higher is better", "minimize": "lower is better"}
    titles = [f"{label(objective.name)}, {arrows[objective.direction]}" for objective in pair]
    return {
        "data": [*([edge] if line else []), *scatter(study, marked, points)],
        "layout": layout(xaxis=axis(titles[0]), yaxis=axis(titles[1])),
    }


def history(study: StudyRecord, marked: Marked, lines: Mapping[str, float] | None = None) -> Figure | None:
    """The first objective over the trials, with the best feasible value so far; None where no trial has a value.

    Args:
        study: whose trials are drawn.
        marked: trials with a ring.
        lines: baselines to compare with, as `baseline_values` has them of the whole study; None: of `study`.
    """
    objective = study.objectives[0]
    points = {}
    for trial in study.trials:
        value = trial.figures.get(objective.name, trial.values[0] if trial.values else None)
        if value is not None and trial.status != "running" and math.isfinite(value):
            points[trial.number] = (trial.number, value)
    if not points:
        return None
    last = study.trials[-1].number
    so_far: list[tuple[int, float]] = []
    for trial in study.feasible:
        value = trial.values[0] if trial.values else math.nan
        if not so_far or objective.cost(value) < objective.cost(so_far[-1][1]):
            so_far.append((trial.number, value))
    lines = baseline_values(study) if lines is None else lines
    data = [*baseline_lines(lines, last), *scatter(study, marked, points)]
    if so_far:
        steps = [*so_far, (last, so_far[-1][1])]
        line = {"color": PALE, "width": 2, "shape": "hv"}
        data.insert(0, trace("lines", "best so far", steps, line=line, hoverinfo="skip"))
    x_axis = axis("Trial", tickformat="d", range=[-1, last + 1], **({"dtick": 1} if last < 10 else {}))
    return {"data": data, "layout": layout(xaxis=x_axis, yaxis=axis(label(objective.name)))}


def baseline_values(study: StudyRecord) -> dict[str, float]:
    """The first objective of each baseline: its mean over the seeds where it was confirmed, else its run.

    Of the fixed batches that is the best one.
    """
    again = confirmations(study)
    values = {label: found.means[0] for label, found in again.items() if found.means and not label.startswith("trial ")}
    fixed = None if any(label.startswith(FIXED) for label in values) else best_fixed(study)
    for trial in study.of_stages(("baseline",)):
        if trial.feasible and trial.values and (trial is fixed or not trial.label.startswith(FIXED)):
            values.setdefault(trial.label, trial.values[0])
    return values


def baseline_lines(values: Mapping[str, float], last: int) -> list[Figure]:
    """A dashed line for each baseline of `baseline_values`, over the trials 0 to `last`."""
    return [
        trace(
            "lines",
            html.escape(label, quote=False),
            [(0, value), (last, value)],
            line={"color": INK, "width": 1, "dash": dash},
            hovertemplate=f"{html.escape(label, quote=False)}: {number(value)}<extra></extra>",
        )
        for dash, (label, value) in zip(("dash", "dot", "dashdot", "longdash"), values.items(), strict=False)
    ]


def slices(study: StudyRecord, shares: Mapping[str, float]) -> tuple[Figure | None, str]:
    """The first objective over each searched setting, one small plot each; None where no trial has a value.

    Args:
        study: its trials are drawn.
        shares: of each setting in how far the trials differ; of many settings the first by these are drawn.

    Returns:
        The figure, and what is not in it, as sentences.
    """
    objective, columns = study.objectives[0], 3
    rows = [row for row in study.trials if row.figures.get(objective.name) is not None and row.status != "running"]
    names = [name for name in study.searched if len({str(row.config.get(name)) for row in rows}) > 1]
    if not names or len(rows) < 2:
        return None, ""
    left_out = ""
    if len(names) > MOST_SLICES:
        names = sorted(names, key=lambda name: -shares.get(name, 0.0))[:MOST_SLICES]
        left_out += f" Drawn are the {MOST_SLICES} settings with the largest importance."
    every = math.ceil(len(rows) * len(names) / MOST_SLICED)
    if every > 1:
        rows = rows[::every]
        left_out += f" One trial of {every} is drawn."
    lines = math.ceil(len(names) / columns)
    data, axes = [], {}
    for position, name in enumerate(names):
        across, down = position % columns, position // columns
        number_ = "" if position == 0 else str(position + 1)
        left, height = across / columns, 1 / lines
        top = 1 - down * height
        values: list[Any] = [row.config.get(name) for row in rows]
        plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        decades = plain and name not in study.linear and min(values) > 0 and max(values) / min(values) >= 50
        few = {"nticks": 4, "tickangle": 0}  # numbers that lie flat do not run into the name below them
        kind = log_axis(min(values), max(values)) if decades else few if plain else {"type": "category"}
        domains = {"domain": [left + 0.03 * bool(across), left + 1 / columns - 0.03]}
        axes[f"xaxis{number_}"] = axis(name, anchor=f"y{number_}", **domains, **kind)
        axes[f"yaxis{number_}"] = axis(
            "", anchor=f"x{number_}", domain=[top - height * 0.68, top], showticklabels=across == 0
        )
        for good in (False, True):
            shown = [row for row in rows if row.feasible is good]
            settings = [row.config.get(name) if plain else setting_text(row.config.get(name)) for row in shown]
            data.append(
                trace(
                    "markers",
                    "feasible" if good else "not feasible",
                    list(zip(settings, (row.figures[objective.name] for row in shown), strict=True)),
                    showlegend=position == 0,
                    legendgroup=str(good),
                    xaxis=f"x{number_}",
                    yaxis=f"y{number_}",
                    text=[hover(row, study) for row in shown],
                    hovertemplate="%{text}<extra></extra>",
                    marker={"size": 7, "color": ACCENT if good else GREY, "opacity": 0.8 if good else 0.5},
                )
            )
    return {"data": data, "layout": layout(110 + 210 * lines, **axes)}, left_out


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high`, 50 times as much or more, that is legible on the width of a slice.

    Plotly's own marks are there digits without their power of ten, or numbers over each other. Here it is at most four
    powers of ten; where there is one only, the threes beside it.
    """
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [(1, power) for power in span if low <= float(f"1e{power}") <= high]
    threes = [(3, power) for power in span if low <= float(f"3e{power}") <= high]
    marks = tens[:: math.ceil(len(tens) / 4)] if len(tens) > 1 else threes
    values = [float(f"{digit}e{power}") for digit, power in marks]
    texts = [number(value) for value in values]
    if any(len(each) > len("0.001") or "e" in each for each in texts):
        texts = [f"{'3×' if digit == 3 else ''}10<sup>{power}</sup>" for digit, power in marks]
    return {"type": "log", "tickvals": values, "ticktext": texts, "tickangle": 0}


def setting_text(value: Any) -> str:
    """A choice as one would write it in a configuration file."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def importance(shares: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Bars of the shares of each setting, one colour an objective; None where there are none."""
    shown = {name: share for name, share in shares.items() if any(share.values())}
    if not shown:
        return None
    first = next(iter(shown.values()))
    order = sorted(first, key=lambda name: first[name])[-15:]
    colours = [ACCENT, GREY, PALE]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(f"for {objective}", quote=False),
            "y": [html.escape(name, quote=False) for name in order],
            "x": [share.get(name, 0.0) for name in order],
            "marker": {"color": colours[position % 3]},
            "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
        }
        for position, (objective, share) in enumerate(shown.items())
    ]
    x_axis = axis("Share of the difference between trials", tickformat=".0%", rangemode="tozero")
    y_axis = axis("", showgrid=False, ticks="")
    look = layout(xaxis=x_axis, yaxis=y_axis, bargap=0.35, showlegend=len(data) > 1)
    look["legend"]["traceorder"] = "normal"
    return {"data": data, "layout": look}


def thinned(steps: pd.DataFrame, keep: Sequence[int], most: int = MOST_POINTS) -> pd.DataFrame:
    """At most `most` rows of `steps`: first, last, those in `keep`, and the highest peak of each stretch between."""
    if len(steps) <= most:
        return steps
    import numpy as np

    kept = np.flatnonzero(steps["step"].isin(keep).to_numpy())
    kept = np.union1d(kept[:: max(1, math.ceil(len(kept) / (most // 2)))], [0, len(steps) - 1])
    stretches = np.array_split(np.arange(len(steps)), most - len(kept))
    peaks = steps["peak_allocated_gb"].to_numpy()
    peaks = np.where(np.isnan(peaks), -np.inf, peaks)
    return steps.iloc[np.union1d(kept, [int(rows[peaks[rows].argmax()]) for rows in stretches])]


def batch_ticks(batches: Sequence[int]) -> list[int]:
    """Marks for an axis of micro-batches: the smallest, the largest and a few powers of two well between them."""
    low, high = max(1, int(min(batches))), max(1, int(max(batches)))
    between = [2**power for power in range(high.bit_length()) if 1.5 * low < 2**power < high / 1.5]
    return sorted({low, *between[:: math.ceil(len(between) / 3) or 1], high})


def memory_over_steps(steps: pd.DataFrame, events: Sequence[Mapping[str, Any]], top_gb: float | None = None) -> Figure:
    """Micro-batch above, memory below, over the optimizer steps, with the out-of-memory events marked.

    Args:
        steps: steps.csv of one trial, at least one row.
        events: its events, as report.read_events gives them.
        top_gb: upper end of the memory axis, so that two trials can be compared; None: as needed.
    """
    out_of_memory = [event for event in events if event["kind"] == "out_of_memory"]
    steps = thinned(steps, [event["step"] for event in out_of_memory])
    x = steps["step"].tolist()

    def line(name: str, y: Any, colour: str, **more: Any) -> Figure:
        style = {"color": colour, "width": 1.5, **more.pop("line", {})}
        values = [None if math.isnan(value) else float(f"{value:.4g}") for value in y.tolist()]
        return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": values, "line": style, **more}

    batch = {"yaxis": "y2", "showlegend": False}
    data = [
        line("reserved", steps["reserved_gb"], PALE),
        line("peak allocated", steps["peak_allocated_gb"], ACCENT),
        line("budget", steps["budget_gb"], INK),
        line("target", steps["budget_gb"] - steps["target_headroom_gb"], INK, line={"dash": "dash", "width": 1}),
        line("micro-batch", steps["micro_batch"], ACCENT, line={"shape": "hv"}, **batch),
    ]
    if out_of_memory:
        mark = {
            "type": "scatter",
            "mode": "markers",
            "name": "out of memory",
            "x": [event["step"] for event in out_of_memory[:MOST_POINTS]],
            "marker": {"symbol": "x", "size": 7, "color": ALARM},
            "cliponaxis": False,  # whole also at the first step and at the budget
        }
        budgets = [float(event["budget_gb"] or "nan") for event in out_of_memory[:MOST_POINTS]]
        data.append({**mark, "y": [None if math.isnan(budget) else budget for budget in budgets]})
        data.append({**mark, **batch, "y": [event["micro_batch"] for event in out_of_memory[:MOST_POINTS]]})
    batches = [*steps["micro_batch"].tolist(), *(event["micro_batch"] for event in out_of_memory[:MOST_POINTS])]
    batch_axis = axis("Micro-batch", type="log", tickvals=batch_ticks(batches), domain=[0.66, 1])
    memory_axis = axis("Memory (GB)", domain=[0, 0.58], range=[0, top_gb] if top_gb else None, rangemode="tozero")
    look = layout(
        470, xaxis=axis("Optimizer step", range=[x[0], max(x[-1], x[0] + 1)]), yaxis=memory_axis, yaxis2=batch_axis
    )
    look["margin"]["t"] = 62  # two lines of legend, so that both plots have the same size
    return {"data": data, "layout": look}
