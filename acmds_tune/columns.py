"""Every column of trials.csv and events.csv: its type, unit and meaning; the trainer has those that it writes itself.

The writers take the names and their order from here, and the tables in docs/reports.md are made from here:

    python -m acmds_tune.columns docs/reports.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from acmds_optimizer.engine import columns
from acmds_optimizer.engine.columns import Column

CONFIG_PREFIX = "config/"
"""Before the name of a searched setting in trials.csv."""

STATUSES: dict[str, str] = {
    "ok": "ran to its end and kept every constraint",
    "infeasible": "ran to its end, but broke a constraint or has no value of an objective",
    "oom": "ran out of memory for good: nothing fitted",
    "host_oom": "filled the host's memory and was ended",
    "crashed": "its process died",
    "timeout": "took too long, or was silent for too long",
    "error": "raised an error",
    "stopped": "was ended early, by the pruner or by the user",
    "running": "had started and not ended when the table was written",
}
"""The values of the column `status`, and what they mean."""

STAGES: dict[str, str] = {
    "plant": "short runs from which a model of the machine was fitted",
    "screen": "proposed by the sampler, with a share of the budget",
    "search": "proposed by the sampler",
    "train": "one of the best of the screened trials, or the defaults, with the whole budget",
    "baseline": "what the search is compared with: a fixed batch, or halving after an error",
    "anchor": "the default settings again, to see whether the machine drifts",
    "confirm": "one of the best trials, or a baseline, with another seed",
}
"""The values of the column `stage`, and what they mean."""

_HEAD = (
    Column(
        "trial",
        "int",
        "",
        "Number of the trial and of its folder, from 0, in the order in which trials were put in line.",
    ),
    Column("stage", "str", "", f"Why it was run: {', '.join(STAGES)}."),
    Column(
        "label", "str", "", "What it repeats or is: `trial 7`, `default`, `fixed batch 128`, `halving`; else empty."
    ),
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
    Column("training_seconds", "float", "s", "Wall time from the first step to the end, validation included."),
    Column("gpu_busy_fraction", "float", "0 to 1", "Share of the trial's time in which its GPU ran a kernel (NVML)."),
)
"""What a training run measured; the values of a trial that ended badly are those measured until then."""

_TAIL = (
    Column("seconds", "float", "s", "Wall time from the start of the trial to its end, everything included."),
    Column("predicted_samples_per_second", "float", "samples/s", "What the plant predicted, where there is one."),
    Column("seed", "int", "", "Seed of the trial; -1 where it ended before it had one."),
)

EVENT_COLUMNS = (
    Column("trial", "int", "", "Number of the trial, as in trials.csv; only in the file of the whole study."),
    *columns.EVENT_COLUMNS.values(),
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
        "stage": "\n".join(f"- `{stage}`: {meaning}." for stage, meaning in STAGES.items()),
        "events.csv": markdown_table(EVENT_COLUMNS),
        "steps.csv": markdown_table(columns.STEP_COLUMNS.values()),
    }
    return with_tables(text, tables)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """`text` with what stands between its `<!-- table: NAME -->` and `<!-- end -->` marks replaced by that table."""
    for name, table in tables.items():
        before, start, rest = text.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the page has no '<!-- table: {name} -->' ... '<!-- end -->'")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_current_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
