"""Compares laws that choose a batch size on simulated plants. CPU, seconds; CSV on stdout.

usage: python -m benchmarks.plant [STEPS [SEEDS]] > plant.csv     (default 2000 steps, 3 seeds)

Columns, each over all seeds: errors (out-of-memory errors, sum), lost (runs that ended because a step never fitted),
used (mean share of the memory below the headroom that steps reached), within (share of steps that kept the headroom),
changes (size changes a run), rate (work a second, failed attempts included, as a share of the oracle's).
The oracle is the largest one size that, but for noise, keeps the headroom in every step of the run.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass

from acmds_optimizer.config import GIB
from tests.plants import (
    Chooser,
    Lost,
    Ours,
    Plant,
    breaches,
    changes,
    errors,
    largest_fitting,
    limits,
    simulate,
    standard,
    used,
    work_per_second,
)

LOW, HIGH = 4, 512
HEADROOM_GB = 3.0


class Fixed:
    """One size; after an error half of it for this step."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def choose(self, budget: float, sample_work: float, step: int) -> int:
        return self.batch

    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None:
        pass

    def time(self, batch: int, seconds: float) -> None:
        pass

    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int:
        return max(1, batch // 2)


class Halving(Fixed):
    """From the largest size, half of it for good at every error."""

    def __init__(self) -> None:
        super().__init__(HIGH)

    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int:
        self.batch = max(1, batch // 2)
        return self.batch


class Aimd(Fixed):
    """Four more after a step that kept the headroom, three quarters after one that did not, half after an error."""

    def __init__(self) -> None:
        super().__init__(LOW)

    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None:
        within = peak <= budget - HEADROOM_GB * GIB
        self.batch = min(HIGH, self.batch + 4) if within else max(LOW, self.batch * 3 // 4)

    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int:
        self.batch = max(1, batch // 2)
        return self.batch


@dataclass
class PidOnCount(Fixed):
    """A PID whose output is the sample count itself: no model, no buckets.

    `reserved`: it is fed with the allocator's high-water mark, which falls only when an error releases the cache.
    """

    reserved: bool = False
    batch: int = LOW
    exact: float = LOW
    error: float = 0.0
    before: float = 0.0
    mark: float = 0.0

    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None:
        self.mark = max(self.mark, peak)
        target = budget - HEADROOM_GB * GIB
        error = max(-1.0, min(1.0, (target - (self.mark if self.reserved else peak)) / max(target, 1.0)))
        # the velocity form has no integral to wind up; the gains are the configuration's defaults
        step_up = 0.15 * (error - self.error) + 0.02 * error + 0.08 * (error - 2 * self.error + self.before)
        self.before, self.error = self.error, error
        self.exact = max(LOW, min(HIGH, self.exact + step_up * HIGH))
        self.batch = int(self.exact)

    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int:
        self.mark = 0.0
        self.batch = max(1, batch // 2)
        self.exact = float(self.batch)
        return self.batch


def laws(plant: Plant, steps: int) -> dict[str, Callable[[], Chooser]]:
    """Every law by name, ready to be made anew for each seed."""
    asked = limits(headroom_gb=HEADROOM_GB, low=LOW, high=HIGH)
    bare = limits(headroom_gb=HEADROOM_GB, low=LOW, high=HIGH, gains=(0.0, 0.0, 0.0))
    usual = [size for size in asked.buckets if size >= LOW]
    return {
        "oracle": lambda: Fixed(largest_fitting(plant, usual, steps, HEADROOM_GB)),
        "ours": lambda: Ours(asked),
        "feed-forward only": lambda: Ours(bare),
        "PID on count": PidOnCount,
        "PID on reserved": lambda: PidOnCount(reserved=True),
        "AIMD": Aimd,
        "halving": Halving,
    }


def main(steps: int = 2000, seeds: int = 3) -> None:
    """Write the table."""
    table = csv.writer(sys.stdout)
    table.writerow(("plant", "law", "errors", "lost", "used", "within", "changes", "rate"))
    for plant in standard(steps):
        best = 0.0
        for name, make in laws(plant, steps).items():
            runs, lost = [], 0
            for seed in range(seeds):
                try:
                    runs.append(simulate(make(), plant, steps, seed, HEADROOM_GB))
                except Lost:
                    lost += 1
            if not runs:
                table.writerow((plant.name, name, "", lost, "", "", "", ""))
                continue
            rate = sum(map(work_per_second, runs)) / len(runs)
            best = best or rate
            mean_used = sum(map(used, runs)) / len(runs)
            within = 1.0 - sum(map(breaches, runs)) / (steps * len(runs))
            moves = sum(map(changes, runs)) / len(runs)
            row = (sum(map(errors, runs)), lost, f"{mean_used:.3f}", f"{within:.4f}", f"{moves:.0f}")
            table.writerow((plant.name, name, *row, f"{rate / best:.3f}"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
