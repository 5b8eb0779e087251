"""Simulated plants for the memory law: what a step needs and takes, and who else is on the card. No torch, no clock."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.memory import law


def steady(step: int) -> float:
    return 1.0


def nobody(step: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Plant:
    """A training step on a card: peak = max(floor, intercept + slope * work), and what disturbs it. In GiB."""

    name: str
    card_gb: float = 24.0
    base_gb: float = 1.0
    """Allocated between steps."""
    intercept_gb: float = 1.4
    slope_gb: float = 0.09
    floor_gb: float = 0.0
    noise: float = 0.0
    """Standard deviation of the peak, relative; cut at three of them."""
    workspace: tuple[tuple[float, float], ...] = ()
    """(from this work on, factor on the peak), ascending."""
    sample_work: Callable[[int], float] = steady
    neighbour_gb: Callable[[int], float] = nobody
    seen_neighbour: bool = True
    """Whether a change is read before the size is chosen, or comes while the step runs."""
    slope_factor: Callable[[int], float] = steady
    epoch_samples: int = 0
    """Samples an epoch, the last batch of which is what is left; 0: no end."""
    seconds: Callable[[float], float] = lambda work: 0.02 + 0.001 * work

    def peak(self, work: float, step: int, rng: random.Random | None = None) -> float:
        """Bytes that a step with this much work reaches."""
        peak = max(self.floor_gb, self.intercept_gb + self.slope_gb * self.slope_factor(step) * work)
        for start, factor in self.workspace:
            if work >= start:
                peak *= factor
        if self.noise and rng is not None:
            peak *= 1.0 + self.noise * max(-3.0, min(3.0, rng.gauss(0.0, 1.0)))
        return peak * GIB

    def budget(self, step: int) -> float:
        """Bytes that the process may hold at this step."""
        return (self.card_gb - self.neighbour_gb(step)) * GIB


@dataclass(frozen=True)
class Row:
    """One step as it ran in the end."""

    step: int
    batch: int
    decided: int
    reason: str
    work: float
    peak: float
    budget: float
    target: float
    failures: tuple[int, ...]
    """Sizes that ran out of memory before this one."""
    seconds: float
    trim: float = 0.0
    p: float = 0.0
    i: float = 0.0
    d: float = 0.0


class Chooser(Protocol):
    """Anything that chooses the size of steps."""

    def choose(self, budget: float, sample_work: float, step: int) -> int: ...
    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None: ...
    def time(self, batch: int, seconds: float) -> None: ...
    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int: ...


@dataclass
class Ours:
    """The law, driven as the controller drives it."""

    limits: law.Limits
    state: law.State = field(default_factory=law.State)
    last: law.Decision | None = None
    timed: bool = True

    def choose(self, budget: float, sample_work: float, step: int) -> int:
        self.state, self.last = law.decide(self.state, self.limits, budget, sample_work, step)
        return self.last.batch

    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None:
        self.state = law.observe(self.state, law.Observation(step, batch, work, peak, base, budget), self.limits)

    def time(self, batch: int, seconds: float) -> None:
        if self.timed:
            self.state = law.time(self.state, batch, seconds, self.limits)

    def fail(self, batch: int, work: float, budget: float, shortage: float, attempt: int, step: int) -> int:
        failure = law.Failure(step, batch, work, budget, shortage, attempt)
        self.state, decision = law.fail(self.state, failure, self.limits)
        return decision.batch


def limits(
    *,
    headroom_gb: float = 3.0,
    low: int = 4,
    high: int = 512,
    policy: str = "free",
    effective: int | None = None,
    knee: float = 0.0,
    gains: tuple[float, float, float] = (0.15, 0.02, 0.08),
) -> law.Limits:
    """Limits as a configuration gives them; by default four sizes an octave and no knee."""
    config = CurriculumConfig(
        target_headroom_gb=headroom_gb,
        min_batch_size=low,
        max_batch_size=high,
        effective_batch_size=effective,
        batch_policy=policy,  # type: ignore[arg-type]
        knee_gain_fraction=knee,
        pid_kp=gains[0],
        pid_ki=gains[1],
        pid_kd=gains[2],
    )
    return law.Limits.from_config(config)


class Lost(Exception):
    """A step did not fit at any size."""


def simulate(
    chooser: Chooser, plant: Plant, steps: int, seed: int = 0, headroom_gb: float = 3.0, start: int = 0
) -> list[Row]:
    """Run `steps` steps; a step that breaks the budget fails, is told to the chooser, and is repeated.

    Raises:
        Lost: a step failed with one sample, or twenty times in a row.
    """
    rng = random.Random(seed)
    rows = []
    left = plant.epoch_samples
    for step in range(start, start + steps):
        sample_work = plant.sample_work(step)
        seen_at = step if plant.seen_neighbour else max(0, step - 1)
        decided = batch = chooser.choose(plant.budget(seen_at), sample_work, step)
        budget = plant.budget(step)
        if plant.epoch_samples:
            batch = min(batch, left)
        failures: list[int] = []
        spent = 0.0
        while True:
            peak = plant.peak(batch * sample_work, step, rng)
            spent += plant.seconds(batch * sample_work)
            if peak <= budget:
                break
            failures.append(batch)
            if batch == 1 or len(failures) > 20:
                raise Lost(f"{plant.name}: step {step}, sizes {failures}")
            smaller = chooser.fail(batch, batch * sample_work, budget, (peak - budget) / 2, len(failures), step)
            assert 1 <= smaller < batch
            batch = smaller
        if plant.epoch_samples:
            left = left - batch or plant.epoch_samples
        chooser.observe(batch, batch * sample_work, peak, plant.base_gb * GIB, budget, step)
        if not failures and batch == decided:
            chooser.time(batch, plant.seconds(batch * sample_work))
        rows.append(
            _row(
                chooser,
                plant,
                step,
                batch,
                decided,
                batch * sample_work,
                peak,
                budget,
                headroom_gb,
                tuple(failures),
                spent,
            )
        )
    return rows


def _row(
    chooser: Chooser,
    plant: Plant,
    step: int,
    batch: int,
    decided: int,
    work: float,
    peak: float,
    budget: float,
    headroom_gb: float,
    failures: tuple[int, ...],
    seconds: float,
) -> Row:
    row = Row(step, batch, decided, "", work, peak, budget, budget - headroom_gb * GIB, failures, seconds)
    last = chooser.last if isinstance(chooser, Ours) else None
    if last is None:
        return row
    return replace(row, reason=last.reason, trim=last.trim, p=last.p, i=last.i, d=last.d)


# --- what a run came to


def breaches(rows: Sequence[Row]) -> int:
    """Steps with less than the headroom free."""
    return sum(row.peak > row.target for row in rows)


def errors(rows: Sequence[Row]) -> int:
    """Out-of-memory errors."""
    return sum(len(row.failures) for row in rows)


def used(rows: Sequence[Row]) -> float:
    """Mean share of the memory below the headroom that steps reached."""
    return sum(row.peak / row.target for row in rows) / len(rows)


def changes(rows: Sequence[Row]) -> int:
    """How often the decided size changed."""
    return sum(a.decided != b.decided for a, b in pairwise(rows))


def work_per_second(rows: Sequence[Row]) -> float:
    """Work a simulated second, failed attempts included."""
    return sum(row.work for row in rows) / sum(row.seconds for row in rows)


def largest_fitting(plant: Plant, sizes: Sequence[int], steps: int, headroom_gb: float = 3.0, every: int = 1) -> int:
    """The oracle: the largest one size that, but for noise, keeps the headroom in all steps."""
    checked = range(0, steps, every)
    for size in sorted(sizes, reverse=True):
        if all(
            plant.peak(size * plant.sample_work(step), step) <= plant.budget(step) - headroom_gb * GIB
            for step in checked
        ):
            return size
    return min(sizes)


# --- disturbances


def steps_of_neighbour(gb: float, first: int, last: int) -> Callable[[int], float]:
    """A neighbour that takes `gb` at step `first` and gives it back at step `last`."""
    return lambda step: gb if first <= step < last else 0.0


def comes_and_goes(gb: float, period: int) -> Callable[[int], float]:
    """A neighbour that is there in every second period."""
    return lambda step: gb if (step // period) % 2 else 0.0


def growing(until: int, largest: float) -> Callable[[int], float]:
    """Samples that grow evenly from 1 to `largest` over `until` steps."""
    return lambda step: 1.0 + (largest - 1.0) * min(1.0, step / until)


def heavy_tailed(seed: int = 0, shape: float = 2.0, largest: float = 8.0) -> Callable[[int], float]:
    """Pareto-distributed sizes of the largest sample, cut at `largest`; the same for a step whenever it is asked."""

    def size(step: int) -> float:
        u = random.Random(seed * 1_000_003 + step).random()
        return min(largest, (1.0 - u) ** (-1.0 / shape))

    return size


def knee_at(work: float) -> Callable[[float], float]:
    """Seconds that are flat below `work` and proportional above."""
    return lambda done: 0.001 * max(work, done)


_RESNET50 = ((32, 1501), (64, 3368), (128, 5462), (256, 6086), (320, 6111), (512, 6322))


def resnet50_seconds(work: float) -> float:
    """Seconds of a ResNet-50 step at 224 px on an H200, between the sizes that were measured."""
    points = [(size, size / rate) for size, rate in _RESNET50]
    if work <= 32:
        return points[0][1]
    place = min(bisect_right([size for size, _ in points], work), len(points) - 1)
    (w0, t0), (w1, t1) = points[place - 1], points[place]
    return t0 + (t1 - t0) * (work - w0) / (w1 - w0)


def scaled(plant: Plant, card_gb: float) -> Plant:
    """The same plant on a card of another size, all its bytes in proportion (the headroom is not)."""
    factor = card_gb / plant.card_gb
    neighbour = plant.neighbour_gb
    return replace(
        plant,
        name=f"{plant.name} {card_gb:g} GB",
        card_gb=card_gb,
        base_gb=plant.base_gb * factor,
        intercept_gb=plant.intercept_gb * factor,
        slope_gb=plant.slope_gb * factor,
        floor_gb=plant.floor_gb * factor,
        neighbour_gb=lambda step: neighbour(step) * factor,
    )


def standard(length: int) -> list[Plant]:
    """The plants that laws are compared on, disturbed in proportion to a run of `length` steps."""
    static = Plant("static")
    third = length // 3
    return [
        static,
        replace(static, name="hinge", floor_gb=5.0),
        replace(static, name="noise 1 %", noise=0.01),
        replace(static, name="noise 3 %", noise=0.03),
        replace(static, name="workspace steps", workspace=((48, 1.03), (110, 1.04), (180, 1.05))),
        replace(static, name="ragged last batch", epoch_samples=5003),
        replace(static, name="growing samples", sample_work=growing(length, 4.0)),
        replace(static, name="heavy-tailed samples", sample_work=heavy_tailed(), noise=0.005),
        replace(static, name="neighbour 8 GB", neighbour_gb=steps_of_neighbour(8.0, third, 2 * third)),
        replace(static, name="neighbour 8 GB mid-step", neighbour_gb=comes_and_goes(8.0, 250), seen_neighbour=False),
        replace(static, name="slope +40 % mid-run", slope_factor=lambda step: 1.4 if step >= third else 1.0),
        replace(static, name="slope -40 % mid-run", slope_factor=lambda step: 0.6 if step >= third else 1.0),
        scaled(static, 6.0),
        scaled(static, 140.0),
    ]
