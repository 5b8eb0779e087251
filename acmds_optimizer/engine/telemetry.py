"""What a run records: one row a step, one row an event, and the figures made from them.

The losses of a step stay on the device until fifty rows are reduced together and copied to the host behind its back, so
recording costs a step neither a kernel nor a wait.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from acmds_optimizer.config import GIB
from acmds_optimizer.engine.columns import EVENT_COLUMNS, STEP_COLUMNS
from acmds_optimizer.engine.scalars import STEP_SCALARS, ScalarLog
from acmds_optimizer.errors import ACMDSError, DivergedError
from acmds_optimizer.files import replacing
from acmds_optimizer.memory.device import MemoryReading
from acmds_optimizer.memory.guard import OutOfMemoryEvent
from acmds_optimizer.memory.law import Decision

_FLUSH_ROWS = 50
_SUMS = (
    "figures", "peak_reserved_bytes", "headroom_min_bytes", "last_loss", "_window", "_epoch_loss", "_epoch_samples",
    "_timed_samples", "_timed_seconds", "_all_samples", "_all_seconds",
)  # fmt: skip
_WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Outcome:
    """The figures of a run. GB are 2**30 bytes; None where nothing was measured."""

    samples_per_second: float | None
    """Useful samples a second of training wall time after warm-up, recovery from errors included."""
    oom_events: int
    oom_recovered: int
    alloc_retries: int
    peak_reserved_gb: float | None
    headroom_min_gb: float | None
    headroom_breach_fraction: float | None
    """Share of the steps that left less than the target headroom free."""
    batch_size_mean: float | None
    """Mean micro-batch over the steps."""
    train_loss: float | None
    """Mean over the last epoch, or what was done of it."""
    val_loss: float | None
    val_accuracy: float | None
    """Fraction in [0, 1]."""
    val_top5: float | None
    """Share of the validation samples whose class is among the five likeliest; None for up to 5 classes."""
    best_epoch: int | None
    """Number, from 1, of the epoch with the best best_metric; None without validation."""
    steps: int
    samples: int
    epochs: int
    seconds: float
    stopped_early: bool = False


_JOINED: dict[str, Callable[[list[Any]], Any]] = {
    "oom_events": sum, "oom_recovered": sum, "alloc_retries": sum,
    "peak_reserved_gb": max, "headroom_min_gb": min, "headroom_breach_fraction": max,
}  # fmt: skip


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """The figures of a run of several processes: errors added up, memory of the card with the least left."""
    if len(outcomes) == 1:
        return outcomes[0]
    figures: dict[str, Any] = {}
    for name, join in _JOINED.items():
        values = [value for outcome in outcomes if (value := getattr(outcome, name)) is not None]
        figures[name] = join(values) if values else None
    return dataclasses.replace(outcomes[0], **figures)


@dataclass(frozen=True)
class Progress:
    """How a run stands, for a display. GB are 2**30 bytes."""

    step: int
    total_steps: int
    epoch: int
    samples_per_second: float | None
    batch_size: int
    free_gb: float
    target_headroom_gb: float
    loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    oom_events: int
    seconds: float


class CsvLog:
    """Rows appended to a CSV file; without a path they go nowhere."""

    def __init__(self, path: Path | None, columns: Iterable[str], keep_below_step: int | None = None) -> None:
        self._columns = list(columns)
        self._file: IO[str] | None = None
        if path is None:
            return
        if keep_below_step is None or not path.exists():
            self._file = path.open("w", newline="", encoding="utf-8")
            self._writer = csv.DictWriter(self._file, self._columns)
            self._writer.writeheader()
            return
        with (
            replacing(path) as temporary,
            path.open(newline="", encoding="utf-8", errors="replace") as old,
            temporary.open("w", newline="", encoding="utf-8") as new,
        ):
            writer = csv.writer(new)
            writer.writerow(self._columns)
            writer.writerows(
                _kept(csv.reader(old), self._columns, keep_below_step)
            )  # one by one: there may be millions
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self._columns)

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        if self._file is None:
            return
        try:
            for row in rows:
                self._writer.writerow({name: _plain(row[name]) for name in self._columns})
            self._file.flush()
        except OSError as error:
            what = f"{self._file.name}: cannot be written: {error.strerror}. What was written before is not lost"
            raise ACMDSError(f"{what}; make room, and go on with --resume from the newest checkpoint") from None

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # said where it was written
                self._file.close()
            self._file = None


def _kept(old: Iterator[list[str]], columns: list[str], below_step: int) -> Iterator[list[str]]:
    """Rows before a step, in the order of `columns`; without those that a full disk, a kill or a power cut cut off."""
    header = next(old, [])
    for row in old:
        named = dict(zip(header, row, strict=False))
        step = named.get("step", "")
        if len(row) == len(header) and step.isdecimal() and int(step) < below_step:
            yield [named.get(name, "") for name in columns]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if not math.isfinite(value) else f"{value:.6g}"
    return value


class Recorder:
    """Collects the rows of a run, writes them, and adds up its figures.

    Args:
        folder: where steps.csv and events.csv go; None: nowhere.
        difficulty_window: samples over which the mean difficulty is taken.
        resume_step: keep the rows of earlier steps that are already there.
        scalar_logs: where curves go besides.
    """

    def __init__(
        self,
        folder: Path | None,
        difficulty_window: int = 1000,
        resume_step: int | None = None,
        scalar_logs: Sequence[ScalarLog] = (),
    ) -> None:
        self._scalar_logs = scalar_logs
        self._steps = CsvLog(folder / "steps.csv" if folder else None, STEP_COLUMNS, resume_step)
        self._events = CsvLog(folder / "events.csv" if folder else None, EVENT_COLUMNS, resume_step)
        self._pending: list[dict[str, Any]] = []
        self._pending_losses: list[torch.Tensor] = []
        self._flush_rows = 1
        """What is first used, CUDA loads and pins while nothing else waits for the GPU: in the first step."""
        self._on_the_way: deque[tuple[list[dict[str, Any]], torch.Tensor, torch.cuda.Event | None]] = deque()
        self._window_size = difficulty_window
        self._window: list[tuple[int, float]] = []
        self.last_loss: float | None = None
        self.figures: dict[str, float] = dict.fromkeys(
            ("steps", "samples", "oom_events", "oom_recovered", "alloc_retries", "breaches", "batches"), 0
        )
        self.peak_reserved_bytes = 0
        self.headroom_min_bytes: int | None = None
        self._epoch_loss = 0.0
        self._epoch_samples = 0
        self._timed_samples = 0
        self._timed_seconds = 0.0
        self._all_samples = 0
        self._all_seconds = 0.0

    def step(
        self, row: dict[str, Any], losses: torch.Tensor, *, reserved_bytes: int, budget_bytes: int, headroom_bytes: int
    ) -> None:
        """Record one step.

        Args:
            row: all columns but loss and difficulty_mean.
            losses: (n,) of its samples, or (1, 2) the means of loss and difficulty; they stay on their device.
            reserved_bytes: peak of what the allocator held.
            budget_bytes: what it could hold.
            headroom_bytes: what was to be left.
        """
        figures = self.figures
        figures["steps"] += 1
        figures["samples"] += row["effective_batch"]
        figures["alloc_retries"] += row["alloc_retries"]
        figures["batches"] += row["micro_batch"]
        headroom = budget_bytes - reserved_bytes
        figures["breaches"] += headroom < headroom_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved_bytes)
        self.headroom_min_bytes = (
            headroom if self.headroom_min_bytes is None else min(headroom, self.headroom_min_bytes)
        )
        self._count(row["effective_batch"], row["seconds"])
        self._pending.append(row)
        self._pending_losses.append(losses.detach())
        if len(self._pending) >= self._flush_rows:
            self.flush(wait=False)
            self._flush_rows = _FLUSH_ROWS

    def waited(self, seconds: float) -> None:
        """Count the end of an epoch, in which the device catches up with the host, into the samples a second."""
        self._count(0, seconds)

    def _count(self, samples: int, seconds: float) -> None:
        self._all_samples += samples
        self._all_seconds += seconds
        if self.figures["steps"] > _WARM_UP_STEPS:
            self._timed_samples += samples
            self._timed_seconds += seconds

    def out_of_memory(self, event: OutOfMemoryEvent, where: dict[str, Any], *, recovered: bool) -> None:
        """Record and count a caught error, of a step or of a rehearsal."""
        self.figures["oom_events"] += 1
        self.figures["oom_recovered"] += recovered
        self._event(
            where,
            kind="out_of_memory",
            micro_batch=event.micro_batch,
            next_micro_batch=event.next_micro_batch,
            budget_gb=event.budget_bytes / GIB,
            peak_gb=event.peak_bytes / GIB,
            shortage_gb=event.shortage_bytes / GIB,
            attempt=event.attempt,
            recovered=recovered,
            message=event.message,
        )

    def note(self, where: dict[str, Any], kind: str, message: str, reading: MemoryReading, micro_batch: int) -> None:
        """Record an event that is no error: `where` holds step, epoch and seconds; written at once."""
        self._event(
            where,
            kind=kind,
            micro_batch=micro_batch,
            next_micro_batch=micro_batch,
            budget_gb=reading.budget_bytes / GIB,
            peak_gb=reading.peak_allocated_bytes / GIB,
            shortage_gb=0.0,
            attempt=0,
            recovered=True,
            message=message,
        )

    def _event(self, where: dict[str, Any], **values: Any) -> None:
        self._events.write([{**where, **values}])

    def flush(self, *, wait: bool = True) -> None:
        """Bring the losses of the pending rows to the host and write them.

        Args:
            wait: whether to wait for the device; else what has not arrived is written by a later call.

        Raises:
            DivergedError: a loss is not finite.
        """
        if self._pending:
            values, event = _to_host(_means(self._pending_losses))
            self._on_the_way.append((self._pending, values, event))
            self._pending, self._pending_losses = [], []
        while self._on_the_way:
            rows, values, event = self._on_the_way[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._on_the_way.popleft()
            self._write(rows, values.tolist())

    def _write(self, rows: list[dict[str, Any]], values: list[list[float]]) -> None:
        for row, (loss, difficulty) in zip(rows, values, strict=True):
            self._window.append((row["effective_batch"], difficulty))
            while sum(size for size, _ in self._window[1:]) >= self._window_size:
                self._window.pop(0)
            total = sum(size for size, _ in self._window)
            row["loss"] = loss
            row["difficulty_mean"] = sum(size * value for size, value in self._window) / total
            self._epoch_loss += loss * row["effective_batch"]
            self._epoch_samples += row["effective_batch"]
        self.last_loss = values[-1][0]
        self._steps.write(rows)
        for row in rows if self._scalar_logs else ():
            self.scalars(row["step"], {name: row[name] for name in STEP_SCALARS})
        bad = next((row["step"] for row in rows if not math.isfinite(row["loss"])), None)
        if bad is not None:
            raise DivergedError(bad)

    def scalars(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """One point of each curve, such as the figures of an epoch; a tensor (n,) in [0, 1] is a histogram."""
        for log in self._scalar_logs:
            log.write(step, values)

    def end_epoch(self) -> float | None:
        """Mean loss of the epoch's samples so far; the next one starts from zero."""
        self.flush()
        mean = self.epoch_loss
        self._epoch_loss, self._epoch_samples = 0.0, 0
        return mean

    @property
    def epoch_loss(self) -> float | None:
        return self._epoch_loss / self._epoch_samples if self._epoch_samples else None

    @property
    def samples_per_second(self) -> float | None:
        """After warm-up (10 steps); over all steps where there are not twice as many."""
        if self.figures["steps"] >= 2 * _WARM_UP_STEPS and self._timed_seconds > 0:
            return self._timed_samples / self._timed_seconds
        return self._all_samples / self._all_seconds if self._all_seconds > 0 else None

    def outcome(self, **values: Any) -> Outcome:
        """The figures so far; `values` are those that the trainer knows."""
        steps = int(self.figures["steps"])
        defaults: dict[str, Any] = {
            "samples_per_second": self.samples_per_second,
            "oom_events": int(self.figures["oom_events"]),
            "oom_recovered": int(self.figures["oom_recovered"]),
            "alloc_retries": int(self.figures["alloc_retries"]),
            "peak_reserved_gb": self.peak_reserved_bytes / GIB if steps else None,
            "headroom_min_gb": self.headroom_min_bytes / GIB if self.headroom_min_bytes is not None else None,
            "headroom_breach_fraction": self.figures["breaches"] / steps if steps else None,
            "batch_size_mean": self.figures["batches"] / steps if steps else None,
            "train_loss": self.epoch_loss,
            "val_loss": None,
            "val_accuracy": None,
            "val_top5": None,
            "best_epoch": None,
            "steps": steps,
            "samples": int(self.figures["samples"]),
        }
        return Outcome(**{**defaults, **values})

    def state_dict(self) -> dict[str, Any]:
        """The sums behind the figures, after `flush`, so that a resumed run reports the whole of it."""
        return {name: getattr(self, name) for name in _SUMS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; what was pending is not of that run."""
        for name in _SUMS:
            setattr(self, name, state[name])
        self._pending, self._pending_losses, self._flush_rows = [], [], 1
        self._on_the_way.clear()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._steps.close()
            self._events.close()
            for log in self._scalar_logs:
                log.close()
            self._scalar_logs = ()


def memory_columns(decision: Decision, reading: MemoryReading, target_headroom_gb: float) -> dict[str, Any]:
    """The columns of a row of steps.csv that are of memory, and of what was decided by it."""
    return {
        "predicted_peak_gb": decision.predicted_peak_bytes / GIB if decision.predicted_peak_bytes else None,
        "peak_allocated_gb": reading.peak_allocated_bytes / GIB,
        "reserved_gb": reading.peak_reserved_bytes / GIB,
        "budget_gb": reading.budget_bytes / GIB,
        "headroom_gb": (reading.budget_bytes - reading.peak_reserved_bytes) / GIB,
        "target_headroom_gb": target_headroom_gb,
        "feed_forward_samples": decision.feed_forward,
        "pid_p": decision.p,
        "pid_i": decision.i,
        "pid_d": decision.d,
        "trim": decision.trim,
        "next_micro_batch": decision.batch,
        "reason": decision.reason,
    }


def _means(losses: list[torch.Tensor]) -> torch.Tensor:
    """Mean loss and mean difficulty (m, 2) float64 of m steps with losses (n_i,), in a few kernels for all of them.

    Steps of several processes come as means (1, 2) already.
    """
    if losses[0].dim() == 2:
        return torch.cat(losses).double()
    sizes = torch.tensor([len(part) for part in losses])
    values = torch.cat(losses).double()
    sums = torch.stack((values, -torch.expm1(-values))).cumsum(1)  # along rows: columns are summed by one thread each
    ends = sums.index_select(1, (sizes.cumsum(0) - 1).to(values.device, non_blocking=True))
    sums = torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))
    return (sums / sizes.to(values.device, non_blocking=True)).T.contiguous()


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what says when it is there."""
    if values.device.type != "cuda":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return copy, event


def to_plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values; figures that are not finite become None."""
    values = dataclasses.asdict(outcome)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
