"""Every column of trials.csv, events.csv and steps.csv: its type, unit and meaning, once.

The writers take the names and their order from here, and the tables in docs/reports.md are made from here:

    python -m acmds_tune.columns docs/reports.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG_PREFIX = "config/"
"""Before the name of a searched setting in trials.csv."""


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


STATUSES: dict[str, str] = {
    "ok": "ran to its end and kept every constraint",
    "infeasible": "ran to its end, but broke a constraint",
    "oom": "ran out of memory for good: nothing fitted",
    "crashed": "its process died",
    "timeout": "took too long, or was silent for too long",
    "error": "raised an error",
    "stopped": "was ended early, by the pruner or by the user",
    "running": "had started and not ended when the table was written",
}
"""The values of the column `status`, and what they mean."""

_HEAD = (
    Column("trial", "int", "", "Number of the trial, from 0, in the order of the starts."),
    Column("status", "str", "", f"How the trial ended: {', '.join(STATUSES)}."),
    Column("reason", "str", "", "Why it ended like that, in words, on one line; never empty."),
    Column("feasible", "bool", "", "Ended well and kept every constraint; only such a trial can be the best."),
)

FIGURES = (
    Column(
        "samples_per_second", "float", "samples/s", "Useful samples over wall time after warm-up, recovery included."
    ),
    Column("oom_events", "int", "", "Out-of-memory errors, recovered or not, seen until the trial ended."),
    Column("oom_recovered", "int", "", "Those after which the step was repeated smaller and went through."),
    Column("alloc_retries", "int", "", "Times the allocator emptied its cache and tried again: an early warning."),
    Column("peak_reserved_gb", "float", "GB", "Most memory that the allocator held."),
    Column("headroom_min_gb", "float", "GB", "Least memory left free of what the process may hold."),
    Column("headroom_breach_fraction", "float", "0 to 1", "Share of the steps with less than the target left free."),
    Column("batch_size_mean", "float", "samples", "Mean micro-batch."),
    Column("train_loss", "float", "nats", "Mean training loss of the last epoch."),
    Column("val_loss", "float", "nats", "Loss on the fixed validation samples, at full difficulty."),
    Column("val_accuracy", "float", "0 to 1", "Share of the validation samples that are classified right."),
    Column("steps", "int", "", "Optimizer steps made."),
    Column("samples", "int", "", "Samples trained on, repeats not counted."),
)
"""What a training run measured; the values of a trial that ended badly are those measured until then."""

_TAIL = (
    Column("seconds", "float", "s", "Wall time from the start of the trial to its end, everything included."),
    Column("seed", "int", "", "Seed of the trial; -1 where it ended before it had one."),
)

EVENT_COLUMNS = (
    Column("trial", "int", "", "Number of the trial, as in trials.csv; only in the file of the whole study."),
    Column("step", "int", "", "Optimizer step in which it happened."),
    Column("epoch", "int", "", "Epoch in which it happened."),
    Column("seconds", "float", "s", "Time since the start of the training."),
    Column("kind", "str", "", "out_of_memory, neighbour_change, emergency_gc or fallback."),
    Column("micro_batch", "int", "samples", "Micro-batch at the event."),
    Column("next_micro_batch", "int", "samples", "Micro-batch after it."),
    Column("budget_gb", "float", "GB", "What the process could hold at that moment."),
    Column("peak_gb", "float", "GB", "Memory held at most in the step until the event."),
    Column("shortage_gb", "float", "GB", "How much was missing, where that is known."),
    Column("attempt", "int", "", "Which try of the step it was."),
    Column("recovered", "bool", "", "The run went on after it."),
    Column("message", "str", "", "What happened, in words."),
)

STEP_COLUMNS = (
    Column("step", "int", "", "Optimizer step."),
    Column("epoch", "int", "", "Epoch."),
    Column("samples_seen", "int", "samples", "Samples trained on so far."),
    Column("effective_batch", "int", "samples", "Samples of this optimizer step."),
    Column("micro_batch", "int", "samples", "Samples of one forward and backward pass."),
    Column("micro_batches", "int", "", "Passes that make up the step."),
    Column("predicted_peak_gb", "float", "GB", "Peak that the memory model predicted for the step."),
    Column("peak_allocated_gb", "float", "GB", "Most memory that tensors held in the step."),
    Column("reserved_gb", "float", "GB", "Memory that the allocator held at the end of the step."),
    Column("budget_gb", "float", "GB", "What the process may hold: free memory plus what it holds, up to the limit."),
    Column("headroom_gb", "float", "GB", "What was left free of the budget at the peak."),
    Column("target_headroom_gb", "float", "GB", "What was to be left free."),
    Column("feed_forward_samples", "float", "samples", "Micro-batch that the memory model alone would choose."),
    Column("pid_p", "float", "", "Proportional term of the PID."),
    Column("pid_i", "float", "", "Integral term of the PID."),
    Column("pid_d", "float", "", "Derivative term of the PID."),
    Column("trim", "float", "", "Correction of the feed-forward choice by the PID."),
    Column("next_micro_batch", "int", "samples", "Micro-batch chosen for the next step."),
    Column("reason", "str", "", "Code of why it was chosen."),
    Column("oom_events", "int", "", "Out-of-memory errors so far."),
    Column("alloc_retries", "int", "", "Allocator retries so far."),
    Column("seconds", "float", "s", "Time since the start of the training."),
    Column("loss", "float", "nats", "Training loss of the step."),
    Column("lr", "float", "", "Learning rate of the step."),
    Column("difficulty_mean", "float", "0 to 1", "Mean difficulty of the most recent samples."),
)


def trial_columns(searched: Sequence[str]) -> list[str]:
    """Headers of trials.csv in their order, for a study over the settings `searched`."""
    return [
        *(column.name for column in _HEAD),
        *(CONFIG_PREFIX + name for name in searched),
        *(column.name for column in (*FIGURES, *_TAIL)),
    ]


def described_trial_columns() -> list[Column]:
    """The columns of trials.csv with one row for all searched settings."""
    setting = Column(
        f"{CONFIG_PREFIX}<name>", "as the setting", "as the setting", "What the trial used for a searched setting."
    )
    return [*_HEAD, setting, *FIGURES, *_TAIL]


def markdown_table(columns: Iterable[Column]) -> str:
    """A Markdown table of `columns`, one row each."""
    rows = [f"| `{column.name}` | {column.dtype} | {column.unit} | {column.meaning} |" for column in columns]
    return "\n".join(["| column | type | unit | meaning |", "| --- | --- | --- | --- |", *rows])


def with_current_tables(text: str) -> str:
    """`text` of docs/reports.md with the tables between its `<!-- table: NAME -->` marks made anew."""
    tables = {
        "trials.csv": markdown_table(described_trial_columns()),
        "status": "\n".join(f"- `{status}`: {meaning}." for status, meaning in STATUSES.items()),
        "events.csv": markdown_table(EVENT_COLUMNS),
        "steps.csv": markdown_table(STEP_COLUMNS),
    }
    for name, table in tables.items():
        start = f"<!-- table: {name} -->"
        pattern = re.compile(re.escape(start) + r".*?<!-- end -->", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no '{start}' ... '<!-- end -->'")
        text = pattern.sub(lambda _, block=f"{start}\n{table}\n<!-- end -->": block, text)
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_current_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
