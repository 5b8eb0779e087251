"""The columns of steps.csv and events.csv: name, type, unit and meaning, once. Imports nothing that is slow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: header in the CSV file, also the key in a trial's user attributes.
        dtype: what pandas.read_csv gives without arguments: int, float, bool or str.
            An int is always written; an empty cell, which pandas reads as NaN, is only in float and str columns.
        unit: unit of the values; empty for names, counts and flags.
        meaning: one sentence.
    """

    name: str
    dtype: str
    unit: str
    meaning: str


_STEP = (
    Column("step", "int", "", "Number of the optimizer step, from 0."),
    Column("epoch", "int", "", "Number of the epoch, from 0."),
    Column("samples_seen", "int", "samples", "Samples trained on so far, this step included."),
    Column("effective_batch", "int", "samples", "Samples of this optimizer step."),
    Column("micro_batch", "int", "samples", "Samples of its largest micro-batch."),
    Column("micro_batches", "int", "", "How many micro-batches it was split into."),
    Column("predicted_peak_gb", "float", "GB", "Peak that the memory model expected; empty before it knows anything."),
    Column("peak_allocated_gb", "float", "GB", "Peak of allocated memory in the step."),
    Column("reserved_gb", "float", "GB", "Peak of memory reserved by the allocator in the step."),
    Column("budget_gb", "float", "GB", "What the process could hold: driver-free plus reserved, within the limit."),
    Column("headroom_gb", "float", "GB", "Budget less reserved: what was left free."),
    Column("target_headroom_gb", "float", "GB", "Headroom asked for."),
    Column(
        "feed_forward_samples", "float", "samples", "Micro-batch that model and trim allow, before buckets and bounds."
    ),
    Column("pid_p", "float", "", "Proportional term."),
    Column("pid_i", "float", "", "Integral term."),
    Column("pid_d", "float", "", "Derivative term."),
    Column("trim", "float", "", "Share by which the PID moved the memory target, at most 0."),
    Column("next_micro_batch", "int", "samples", "Micro-batch chosen for this step before any error."),
    Column(
        "reason",
        "str",
        "",
        "Why: cold, hold, grow, shrink, max_batch, min_batch, below_min, knee, timing, calm, ceiling, budget.",
    ),
    Column("oom_events", "int", "", "Out-of-memory errors caught in this step."),
    Column("alloc_retries", "int", "", "Times the allocator released its cache to serve a request, in this step."),
    Column(
        "seconds", "float", "s", "Wall time of the host from the end of the step before, or the start of the epoch."
    ),
    Column("loss", "float", "nats", "Mean unweighted training loss of its samples."),
    Column("lr", "float", "", "Learning rate of the first parameter group."),
    Column(
        "difficulty_mean",
        "float",
        "0 to 1",
        "Mean difficulty, 1 - exp(-loss), over the last difficulty_window samples.",
    ),
)
STEP_COLUMNS = {column.name: column for column in _STEP}
"""Columns of steps.csv by name. GB are 2**30 bytes."""

_EVENT = (
    Column("step", "int", "", "Number of the optimizer step."),
    Column("epoch", "int", "", "Number of the epoch."),
    Column("seconds", "float", "s", "Seconds since the training began."),
    Column("kind", "str", "", "out_of_memory, neighbour_change, emergency_gc, noise_gate or resolution."),
    Column("micro_batch", "int", "samples", "Micro-batch when it happened."),
    Column("next_micro_batch", "int", "samples", "Micro-batch after it."),
    Column("budget_gb", "float", "GB", "What the process may hold after it."),
    Column("peak_gb", "float", "GB", "Peak of allocated memory before it."),
    Column("shortage_gb", "float", "GB", "What was missing, where the error says; else 0."),
    Column("attempt", "int", "", "Which repetition of the step, from 1; 0 where nothing was repeated."),
    Column("recovered", "bool", "", "Whether the step went through in the end."),
    Column("message", "str", "", "The error's or the event's own words."),
)
EVENT_COLUMNS = {column.name: column for column in _EVENT}
"""Columns of events.csv by name."""
