"""epochs.csv: one row an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from acmds_optimizer.engine.telemetry import CsvLog

EPOCH_COLUMNS = {
    "epoch": "number of the epoch, from 1",
    "step": "number of its last optimizer step, from 0",
    "samples": "samples trained on so far",
    "seconds": "seconds of training so far, without validation",
    "epoch_loss": "mean unweighted, unsmoothed training loss of its samples",
    "val_loss": "mean validation loss; empty without validation",
    "val_accuracy": "share of the validation samples that are classified right",
    "val_top5": "share whose class is among the five likeliest; empty for up to 5 classes",
    "is_best": "1 where best_metric was better than in all epochs before",
    "samples_per_second": "of the run so far, after warm-up",
    "batch_size": "micro-batch at its end",
    "oom_events": "out-of-memory errors of the run so far",
    "difficulty_p10": "a tenth of the samples are easier than this: 1 - exp(-loss) of a sample, averaged",
    "difficulty_p50": "median difficulty",
    "difficulty_p90": "a tenth of the samples are harder than this",
}
"""Columns of epochs.csv, and what they mean."""


class EpochLog:
    """Appends to epochs.csv.

    Args:
        folder: of the run; None: nothing is written.
        resume_step: keep the rows of epochs that had ended before this step.
    """

    def __init__(self, folder: Path | None, resume_step: int | None = None) -> None:
        self._log = CsvLog(folder / "epochs.csv" if folder else None, EPOCH_COLUMNS, resume_step)

    def write(
        self, epoch: int, steps: int, seconds: float, figures: Mapping[str, float], difficulty: Tensor
    ) -> dict[str, float]:
        """One row, after `steps` optimizer steps in all; the quantiles of difficulty (n,) in [0, 1], by column."""
        ordered = difficulty.float().cpu().sort().values
        ranks = {
            f"difficulty_p{p}": float(ordered[min(len(ordered) - 1, len(ordered) * p // 100)]) for p in (10, 50, 90)
        }
        row = {**dict.fromkeys(EPOCH_COLUMNS, ""), **figures, **ranks}
        row |= {"epoch": epoch, "step": steps - 1, "seconds": seconds, "is_best": int(figures.get("is_best", 0))}
        self._log.write([row])
        return ranks

    def close(self) -> None:
        self._log.close()
