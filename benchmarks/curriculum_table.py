"""The rows of benchmarks/curriculum.py, and what is read off them: paired differences with their standard errors."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {
    "suite": "digits, photos or cifar",
    "condition": "clean, noise NN or imbalanced NN, NN the share of wrong training labels in percent",
    "epochs": "length of the training, to which the schedules are fitted",
    "arm": "value of `direction`",
    "seed": "of weights, order and wrong labels; equal in all arms",
    "lr": "peak learning rate",
    "accuracy": "on the validation set, after the last epoch",
    "best_accuracy": "the best after any epoch: what stopping early with the validation set at hand could give at most",
    "best_epoch": "the epoch of it, from 1",
    "samples": "samples trained on",
    "seconds": "of training, without validation",
    "seconds_to_90": "of training until the validation accuracy first was 90 % or more",
    "seconds_to_93": "likewise for 93 %",
    "fired_epoch": "epoch after which the noise gate fired; empty where it did not",
    "flagged": "samples flagged at the end",
    "precision": "share of the flagged samples whose label is wrong",
    "recall": "share of the wrong labels that are flagged",
    "micro_batch": "samples at the end",
    "device": "name of the device",
    "torch": "version",
    "curve": "after each epoch: [seconds, samples, accuracy]",
}
"""Columns of the CSV file."""

HEADINGS = (
    "condition", "epochs", "arm", "n", "accuracy %", "less none", "less a shuffle of as many samples",
    "less none, at its wall time", "less none at its best epoch", "seconds", "to 90 %", "to 93 %", "gate fired",
    "precision", "recall",
)  # fmt: skip

Row = dict[str, Any]
Cell = tuple[str, str, int, float]


def read(paths: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: _number(text) for name, text in row.items() if name not in TEXTS}
                rows.append({**row, **numbers, "curve": json.loads(row["curve"])})
    return rows


TEXTS = ("suite", "condition", "arm", "device", "torch", "curve")


def _number(text: str) -> float | None:
    return float(text) if text else None


def print_tables(paths: Sequence[Path]) -> None:
    """Markdown tables of all rows, one a suite, to stdout."""
    rows = read(paths)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        devices = ", ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in mine}))
        print(f"\n{suite} ({devices})\n")
        print("| " + " | ".join(HEADINGS) + " |")
        print("| " + " | ".join("---" if name in ("condition", "arm") else "---:" for name in HEADINGS) + " |")
        for line in lines(mine):
            print("| " + " | ".join(line) + " |")
        early = best_budgets(mine)
        if early:
            print("\nPlain shuffling at other budgets, mean accuracy in percent (epochs: accuracy):\n")
            for text in early:
                print(f"- {text}")


def lines(rows: list[Row]) -> list[list[str]]:
    """One line a condition, length and arm; lengths at which only shuffling ran are left to `best_budgets`."""
    cells: dict[Cell, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = (row["suite"], row["condition"], int(row["epochs"]), row["lr"])
        cells[cell][row["arm"]][int(row["seed"])] = row
    several_rates = len({cell[3] for cell in cells}) > 1
    result = []
    for (_, condition, epochs, lr), arms in sorted(cells.items()):
        if set(arms) == {"none"} and not several_rates:
            continue
        shuffled = arms.get("none", {})
        for arm, seeds in sorted(arms.items(), key=lambda item: item[0] != "none"):
            pairs = [(row, shuffled[seed]) for seed, row in seeds.items() if seed in shuffled and arm != "none"]
            mine = list(seeds.values())
            equal = [at_equal_samples(row, arms) for row, _ in pairs if arm != "matched"]
            result.append(
                [
                    condition + (f", lr {lr:g}" if several_rates else ""),
                    str(epochs),
                    arm,
                    str(len(mine)),
                    mean_se([100 * row["accuracy"] for row in mine]),
                    mean_se([100 * (row["accuracy"] - other["accuracy"]) for row, other in pairs], sign=True),
                    mean_se([100 * value for value in equal if value is not None], sign=True),
                    mean_se([100 * at_equal_time(row, other) for row, other in pairs], sign=True),
                    mean_se([100 * (row["accuracy"] - other["best_accuracy"]) for row, other in pairs], sign=True),
                    mean_se([row["seconds"] for row in mine]),
                    reached(mine, "seconds_to_90"),
                    reached(mine, "seconds_to_93"),
                    f"{sum(row['fired_epoch'] is not None for row in mine)} of {len(mine)}",
                    mean_se([row["precision"] for row in mine if row["precision"] is not None], digits=3),
                    mean_se([row["recall"] for row in mine if row["recall"] is not None and arm != "none"], digits=3),
                ]
            )
    return result


def at_equal_time(row: Row, other: Row) -> float:
    """Accuracy of an arm at the wall time at which plain shuffling ended, less the accuracy with which that ended.

    An arm that takes longer is read off its own curve there, where its learning rate has not come down yet; one that
    ended sooner gets nothing for the rest of the time. So it errs against the arm.
    """
    return at_time(row, other["seconds"]) - float(other["accuracy"])


def at_equal_samples(row: Row, arms: dict[str, dict[int, Row]]) -> float | None:
    """Accuracy less that of the shuffle of as many samples and the same seed; None where there is none."""
    for shuffle in ("none", "matched"):
        other = arms.get(shuffle, {}).get(int(row["seed"]))
        if other is not None and abs(other["samples"] / row["samples"] - 1) < 0.01:
            return float(row["accuracy"] - other["accuracy"])
    return None


def at_time(row: Row, seconds: float) -> float:
    times, accuracies = [point[0] for point in row["curve"]], [point[2] for point in row["curve"]]
    return float(np.interp(seconds, times, accuracies))


def best_budgets(rows: list[Row]) -> list[str]:
    """For each condition, how well plain shuffling does at each length."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["arm"] == "none":
            found[row["condition"]][int(row["epochs"])].append(100 * row["accuracy"])
    return [
        f"{condition}: " + ", ".join(f"{epochs}: {mean_se(values)}" for epochs, values in sorted(lengths.items()))
        for condition, lengths in found.items()
        if len(lengths) > 1
    ]


def reached(rows: list[Row], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{mean_se(values)} ({len(values)} of {len(rows)})" if values else "never"


def mean_se(values: Sequence[float], *, sign: bool = False, digits: int = 2) -> str:
    """Mean and standard error; the mean alone of fewer than two."""
    if not values:
        return ""
    plus = "+" if sign else ""
    text = f"{np.mean(values):{plus}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}"
