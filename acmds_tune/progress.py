"""The search as it is seen in a terminal: one table on stderr, or one line a trial where stderr is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from acmds_optimizer.console import console as shared_console
from acmds_tune.objective import Ended, share_done

ROWS = 16
"""Trials shown at once: the newest."""

SETTINGS_SHOWN = 5
"""Searched settings in the table; the others are in trials.csv."""

TEXTS = ("trial", "what", "status")
"""Columns that are aligned to the left."""

STYLES = {
    "running": "cyan",
    "ok": "green",
    "infeasible": "yellow",
    "stopped": "yellow",
    "oom": "red",
    "host_oom": "red",
    "crashed": "red",
    "timeout": "red",
    "error": "red",
}


@dataclass
class _Row:
    number: int
    values: Mapping[str, Any]
    what: str = ""
    status: str = "running"
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    share: float = 0.0
    max_seconds: float | None = None

    @property
    def said(self) -> str:
        """The status, of a running trial with how far it is."""
        return f"running {self.share:4.0%}" if self.status == "running" else self.status

    @property
    def elapsed(self) -> float:
        """Seconds from its start to its end, or until now."""
        return self.seconds if self.seconds is not None else time.monotonic() - self.started


class Display:
    """Shows a search. Use as a context manager.

    Args:
        name: of the study.
        trials: how many there will be; `told` of them are over already.
        searched: names of the searched settings.
        console: where to; stderr if not given.
    """

    def __init__(
        self, name: str, trials: int, searched: Sequence[str], *, told: int = 0, console: Console | None = None
    ) -> None:
        self._console = console or shared_console()
        self._name = name
        self._trials = trials
        self._over = told
        self._shown = list(searched)[:SETTINGS_SHOWN]
        self._rows: dict[int, _Row] = {}
        self._began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def started(
        self, number: int, values: Mapping[str, Any], what: str = "", *, max_seconds: float | None = None
    ) -> None:
        """Trial `number` begins with the searched `values`.

        Args:
            number: of the trial.
            values: what the sampler proposed, or what is repeated.
            what: why it is run, where the sampler did not propose it.
            max_seconds: that it trains at most; None: its steps end it.
        """
        self._rows[number] = _Row(number, values, what, max_seconds=max_seconds)

    def progressed(self, number: int, progress: Mapping[str, Any]) -> None:
        """Trial `number` says how far it is."""
        row = self._rows[number]
        row.figures.update({key: value for key, value in progress.items() if value is not None})
        row.share = share_done(progress, row.max_seconds)

    def ended(self, number: int, status: str, ended: Ended) -> None:
        """Trial `number` is over."""
        row = self._rows[number]
        row.status, row.reason, row.seconds = status, ended.reason, ended.seconds
        row.figures.update(ended.figures)
        self._over += 1
        if self._live is None:
            self._console.print(Text(self._line(row)), soft_wrap=True)

    def _line(self, row: _Row) -> str:
        figures = row.figures
        settings = " ".join(f"{name}={_short(value)}" for name, value in row.values.items())
        parts = [
            f"trial {row.number} ({self._over}/{max(self._trials, self._over)})",
            *([row.what] if row.what else []),
            row.status,
            f"{_short(figures.get('samples_per_second'))} samples/s",
            f"{_short(figures.get('oom_events'))} oom",
            f"val_loss {_short(figures.get('val_loss'))}",
            f"{row.seconds or 0:.1f} s",
            settings,
        ]
        if row.status != "ok":
            parts.append(f"({row.reason})")
        return "  ".join(parts)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        rows = list(self._rows.values())[-ROWS:]
        columns = self._columns(rows)
        for heading in columns:
            words = heading.replace(" ", "\n")
            table.add_column(words, justify="left" if heading in TEXTS else "right", vertical="bottom", no_wrap=True)
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        summary = f"{self._name}: {self._over} of {max(self._trials, self._over)} trials, {minutes}:{seconds:02d}"
        parts = [table] if self._rows else []
        return Group(*parts, Text(summary, style="bold"))

    def _columns(self, rows: Sequence[_Row]) -> dict[str, list[Text]]:
        """Cells by heading: as many columns as the terminal holds whole, what was tried last among those to keep."""
        figures = {
            heading: [Text(_short(row.figures.get(name))) for row in rows]
            for heading, name in (("samples/s", "samples_per_second"), ("oom", "oom_events"), ("val loss", "val_loss"))
        }
        columns = {
            "trial": [Text(str(row.number)) for row in rows],
            "what": [Text(row.what) for row in rows],
            "status": [Text(row.said, style=STYLES.get(row.status, "")) for row in rows],
            **{name.replace("_", " "): [Text(_short(row.values.get(name))) for row in rows] for name in self._shown},
            **figures,
            "seconds": [Text(f"{row.elapsed:.0f}") for row in rows],
        }
        left = self._console.width
        kept: set[str] = set()
        for heading in ("trial", "status", *figures, "seconds", "what", *columns):
            width = max(*map(len, heading.split()), *map(len, columns[heading]), 0) + 2
            if heading not in kept and width <= left + 2:
                kept.add(heading)
                left -= width
        return {heading: cells for heading, cells in columns.items() if heading in kept}


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
