"""Pictures of a run, from its tables: run.png, and run.html, one file that opens offline."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmds_optimizer.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1000
"""Points of one line; more cannot be told apart, and a page grows with them."""

BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#D55E00", "#9AA3AD"
"""Of Okabe and Ito's palette, which people with any common colour blindness tell apart."""

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;color:#1f2933}
svg{width:100%;height:auto}td{padding:.1em 1.5em .1em 0;vertical-align:top}
details{margin-top:1em}"""


def draw_run(folder: Path) -> tuple[Path, Path]:
    """Write run.png and run.html into the folder of a run.

    Args:
        folder: of a run, finished or not.

    Returns:
        The two files.

    Raises:
        DataError: the folder holds no steps.csv with at least one step, or a table of something else.
        ConfigError: matplotlib is not installed, or the files cannot be written.
    """
    steps, epochs = _table(folder / "steps.csv"), _table(folder / "epochs.csv")
    if steps is None or steps.empty:
        raise DataError(f"{folder}: holds no steps.csv with steps in it, so there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot", ["matplotlib is not installed: pip install 'acmds[plot]'"]) from None
    figure = Figure(figsize=(15, 8), layout="constrained")
    try:
        _draw(figure, thin(steps), epochs)
    except KeyError as error:
        raise DataError(f"{folder}: its tables are not of a run, which would have a column {error}") from None
    vector = io.StringIO()
    figure.savefig(vector, format="svg", metadata={"Date": None})
    png, page = folder / "run.png", folder / "run.html"
    try:
        figure.savefig(png, dpi=100)
        # a folder's name need not be text
        page.write_text(_page(folder, vector.getvalue()), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError("plot", [f"{folder} cannot be written: {error}"]) from None
    return png, page


def _table(path: Path) -> pd.DataFrame | None:
    import pandas as pd

    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as a table: {error}") from None


def thin(steps: pd.DataFrame) -> pd.DataFrame:
    """About MOST_POINTS of the steps, evenly spaced, and all those with an out-of-memory error."""
    every = max(1, len(steps) // MOST_POINTS)
    return steps[(steps.index % every == 0) | (steps["oom_events"] > 0)]


def _draw(figure: Figure, steps: pd.DataFrame, epochs: pd.DataFrame | None) -> None:
    axes = figure.subplots(2, 3)
    seen = steps["samples_seen"]
    loss, accuracy, difficulty = axes[0]
    batch, memory, speed = axes[1]

    smooth = steps["loss"].ewm(halflife=max(1, len(steps) / 50)).mean()
    loss.plot(seen, steps["loss"], color=GREY, linewidth=0.5, alpha=0.6)
    loss.plot(seen, smooth, color=BLUE, label="training")
    speed.plot(seen, steps["effective_batch"] / steps["seconds"].clip(lower=1e-9), color=BLUE, linewidth=0.8)
    speed.set_ylim(bottom=0)
    batch.step(seen, steps["micro_batch"], color=BLUE, where="post", label="micro-batch")
    batch.step(seen, steps["effective_batch"], color=GREY, where="post", label="effective batch", linestyle="--")
    batch.set_ylim(bottom=0)
    memory.plot(seen, steps["budget_gb"], color=GREY, linestyle="--", label="budget")
    memory.plot(seen, steps["budget_gb"] - steps["target_headroom_gb"], color=ORANGE, label="target")
    memory.plot(seen, steps["reserved_gb"], color=GREEN, label="reserved")
    memory.plot(seen, steps["peak_allocated_gb"], color=BLUE, label="allocated")
    memory.set_ylim(bottom=0)
    struck = steps[steps["oom_events"] > 0]
    if len(struck):
        memory.plot(struck["samples_seen"], struck["peak_allocated_gb"], "x", color=ORANGE, label="out of memory")
    if epochs is not None and len(epochs):
        _draw_epochs(epochs, loss, accuracy, difficulty)
    titles = {
        loss: "Loss (nats)", accuracy: "Validation accuracy", difficulty: "Difficulty of the samples",
        batch: "Samples", memory: "Memory (GB)", speed: "Samples a second",
    }  # fmt: skip
    for axis, title in titles.items():
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("samples seen")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)


def _draw_epochs(epochs: pd.DataFrame, loss: Axes, accuracy: Axes, difficulty: Axes) -> None:
    at = epochs["samples"]
    if epochs["val_loss"].notna().any():
        loss.plot(at, epochs["val_loss"], "o-", color=ORANGE, markersize=3, label="validation")
        accuracy.plot(at, epochs["val_accuracy"], "o-", color=BLUE, markersize=3, label="top 1")
        if epochs["val_top5"].notna().any():
            accuracy.plot(at, epochs["val_top5"], "o-", color=GREY, markersize=3, label="top 5")
        best = epochs[epochs["is_best"] > 0].tail(1)
        accuracy.plot(best["samples"], best["val_accuracy"], "*", color=ORANGE, markersize=12, label="best")
        accuracy.set_ylim(top=1.0)
    difficulty.fill_between(at, epochs["difficulty_p10"], epochs["difficulty_p90"], color=BLUE, alpha=0.2)
    difficulty.plot(at, epochs["difficulty_p50"], "o-", color=BLUE, markersize=3, label="median, and 10 to 90 %")
    difficulty.set_ylim(0, 1)


def _page(folder: Path, vector: str) -> str:
    vector = vector[vector.index("<svg") :]  # what stands before it belongs to a file of its own
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1>", vector]
    for name, title in (("outcome", "Figures"), ("config", "Settings"), ("environment", "Environment")):
        parts.append(_facts(folder / f"{name}.json", title, is_open=name == "outcome"))
    title = html.escape(folder.resolve().name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _facts(path: Path, title: str, *, is_open: bool) -> str:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a run that has not ended
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}<td>{html.escape('none' if value is None else str(value))}"
        for key, value in values.items()
    )
    return f"<details{' open' if is_open else ''}><summary>{title}</summary><table>{rows}</table></details>"
