"""A model of one machine and one network, fitted from short runs: settings of the controller cost no training on it.

What a step of a micro-batch needs (a line through the measured peaks, with noise) and takes (a curve through the
measured times); the budget is what the search space says of the card and of the neighbour on it. The control law itself
is not modelled: it is the trainer's own, driven as the trainer drives it. Pure but for `measure`, which trains.
"""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acmds_optimizer.config import GIB, CurriculumConfig, TrainConfig, build, field_names
from acmds_optimizer.files import write_json
from acmds_optimizer.memory import law
from acmds_tune.baselines import until_error
from acmds_tune.objective import Report, ShouldStop

PLANT_FILE = "plant.json"
"""In the folder of the trial that measured the plant."""

SIZES = 4
"""Micro-batches that are measured, evenly spaced on a logarithmic scale."""

MOST_PARTS = 4
"""Micro-batches of a measured step at most."""

WARM_STEPS, TIMED_STEPS = 3, 16
SIMULATED_STEPS = 150
CONTROLLED = (
    "target_headroom_gb", "memory_limit_gb", "min_batch_size", "max_batch_size", "effective_batch_size", "batch_policy",
    "knee_gain_fraction", "pid_kp", "pid_ki", "pid_kd", "pressure_smoothing",
)  # fmt: skip
"""Settings whose effect the plant knows; it takes all others as they were when it was measured."""

_REHEARSALS = 12
_MOST_FAILURES = 20


@dataclass(frozen=True)
class Plant:
    """Peaks and times by micro-batch, ascending; `base_gb` is held between steps, `noise` relative to a peak."""

    sizes: tuple[int, ...]
    peaks_gb: tuple[float, ...]
    seconds: tuple[float, ...]
    """Of one micro-batch, forward and backward."""
    step_seconds: float
    """Of an optimizer step besides its micro-batches."""
    base_gb: float
    noise: float
    time_noise: float
    budget_gb: float
    """What the process could hold when it was measured."""

    def peak_gb(self, batch: float) -> float:
        """Expected peak of a micro-batch: a straight line between and beyond what was measured."""
        return max(self.base_gb, _line(self.sizes, self.peaks_gb, batch))

    def micro_seconds(self, batch: float) -> float:
        """Expected time of a micro-batch; no less below the smallest measured one, where launches bound it."""
        if batch <= self.sizes[0]:
            return self.seconds[0]
        return max(self.seconds[0], _line(self.sizes, self.seconds, batch))


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    if len(xs) == 1:
        return ys[0] * x / xs[0]
    place = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    (x0, x1), (y0, y1) = xs[place - 1 : place + 1], ys[place - 1 : place + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Prediction:
    """What a trial would measure, by the names of trials.csv."""

    samples_per_second: float
    oom_events: int
    headroom_breach_fraction: float
    batch_size_mean: float


def simulate(
    plant: Plant,
    settings: Mapping[str, Any],
    neighbour: Sequence[tuple[float, float]] = (),
    *,
    steps: int = SIMULATED_STEPS,
    seed: int = 0,
) -> Prediction | None:
    """Drive the control law on the plant; None where a step never fits.

    Args:
        plant: what steps need and take.
        settings: of the trainer; only those in CONTROLLED matter.
        neighbour: (share of the run, GB that another process holds from then on), ascending.
        steps: optimizer steps of the run, over which the neighbour's script is spread.
        seed: of the noise.

    Raises:
        ConfigError: settings that do not go together.
    """
    known = set(field_names(CurriculumConfig))
    config = build(CurriculumConfig, {name: settings[name] for name in settings if name in known}, "settings")
    limits, rng = law.Limits.from_config(config), random.Random(seed)
    card = min(plant.budget_gb, config.memory_limit_gb or math.inf)
    hold = config.batch_policy == "hold"

    def peak(batch: int) -> float:
        return plant.peak_gb(batch) * GIB * (1.0 + plant.noise * max(-3.0, min(3.0, rng.gauss(0.0, 1.0))))

    def timed(batch: int) -> float:
        return plant.micro_seconds(batch) * (1.0 + plant.time_noise * max(-2.0, min(2.0, rng.gauss(0.0, 1.0))))

    base = plant.base_gb * GIB
    state = _rehearsed(limits, card * GIB, base, config.step_samples if hold else limits.buckets[-1], peak, timed)
    spent, samples, breaches, errors, batches, script = 0.0, 0, 0, 0, 0, list(neighbour)
    held, budget, reserves = 0.0, card * GIB, settings.get("device", "cuda") != "cpu"
    for step in range(steps):
        state, decision = law.decide(state, limits, budget, 1.0, step)  # by the budget that the step before left
        while script and step >= script[0][0] * steps:
            held = script.pop(0)[1]
        budget = max(0.0, card - held) * GIB
        batch = min(decision.batch, config.step_samples) if hold else decision.batch
        failures = 0
        # what PyTorch has reserved on CUDA no neighbour can take: it costs the headroom, not the step
        while (needed := peak(batch)) > (card * GIB if reserves else budget):
            failures += 1
            spent += timed(batch)
            if batch == 1 or failures > min(config.max_oom_retries, _MOST_FAILURES):
                return None
            shortage = max(0.0, needed - budget) / 2
            failure = law.Failure(step, batch, batch, budget, shortage, failures)
            state, decision = law.fail(state, failure, limits)
            batch = decision.batch
        count = math.ceil(config.step_samples / batch) if hold else 1
        took = timed(batch)
        spent += count * took + plant.step_seconds
        samples += config.step_samples if hold else batch
        errors += failures
        batches += batch
        breaches += needed > budget - limits.headroom_bytes
        state = law.observe(state, law.Observation(step, batch, batch, needed, base, budget), limits)
        if not failures:
            state = law.time(state, batch, took, limits)
    return Prediction(samples / spent, errors, breaches / steps, batches / steps)


def _rehearsed(limits: law.Limits, budget: float, base: float, most: int, peak: Any, timed: Any) -> law.State:
    """The state after the rehearsal before the first step, as in ACMDSTrainer."""
    state, last = law.State(), 0
    for _ in range(_REHEARSALS):
        state, decision = law.decide(state, limits, budget, rehearsal=True)
        size = min(decision.batch, most)
        needed = peak(size)
        if size == last or needed > budget:
            break
        last = size
        state = law.observe(state, law.Observation(0, size, size, needed, base, budget), limits)
        for _ in range(state.times.needed):
            state = law.time(state, size, timed(size), limits)
    return state


def fit(runs: Mapping[int, Sequence[Mapping[str, float]]]) -> Plant:
    """The plant from the step records of runs with a held micro-batch.

    Args:
        runs: rows of steps.csv by micro-batch; the first WARM_STEPS of each are left out.

    Raises:
        ValueError: there are none.
    """
    steady = {size: list(rows)[WARM_STEPS:] for size, rows in sorted(runs.items()) if len(rows) > WARM_STEPS}
    if not steady:
        raise ValueError("no run has enough steps")
    sizes, step_seconds = tuple(steady), _step_seconds(steady.values())
    # a step of one micro-batch holds less than one of several, which is what a run has
    most = {size: max(row["micro_batches"] for row in rows) for size, rows in steady.items()}
    steady = {size: [row for row in rows if row["micro_batches"] == most[size]] for size, rows in steady.items()}
    # of the reserved bytes too: it is these that the budget bounds. The least, since the odd last step of an epoch, of
    # which there are many in a short run, leaves what it cached beside the pool of the graphs
    reserved = {size: min(row["reserved_gb"] for row in steady[size]) for size in sizes}
    allocated = {size: statistics.median(row["peak_allocated_gb"] for row in steady[size]) for size in sizes}
    peaks = [max(reserved[size], allocated[size]) for size in sizes]
    times = {size: [(row["seconds"] - step_seconds) / row["micro_batches"] for row in steady[size]] for size in sizes}
    spread = [row["peak_allocated_gb"] for size in sizes for row in steady[size]]
    means = {size: statistics.fmean(row["peak_allocated_gb"] for row in steady[size]) for size in sizes}
    relative = [row["peak_allocated_gb"] / max(1e-9, means[size]) for size in sizes for row in steady[size]]
    jitter = statistics.median(_spread(each) for each in times.values())
    slope = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
    return Plant(
        sizes=sizes,
        peaks_gb=tuple(peaks),
        seconds=tuple(max(1e-9, statistics.median(each)) for each in times.values()),
        step_seconds=step_seconds,
        base_gb=max(0.0, min(min(spread), peaks[0] - slope * sizes[0])),
        noise=statistics.pstdev(relative),
        time_noise=min(0.2, jitter),
        budget_gb=max(row["budget_gb"] for rows in steady.values() for row in rows),
    )


def _step_seconds(runs: Iterable[Sequence[Mapping[str, float]]]) -> float:
    """Of an optimizer step besides its micro-batches, from a size that was run with two numbers of them; else 0."""
    for rows in runs:
        counts = sorted({row["micro_batches"] for row in rows})
        if len(counts) > 1:
            few, many = counts[0], counts[-1]
            short, long = (
                statistics.median(r["seconds"] for r in rows if r["micro_batches"] == n) for n in (few, many)
            )
            return max(0.0, short - few * (long - short) / (many - few))
    return 0.0


def _spread(seconds: Sequence[float]) -> float:
    """Standard deviation relative to the median, of which a few outliers (a capture, the end of an epoch) are no part.

    A normal distribution's is 1.4826 times the median absolute deviation.
    """
    middle = statistics.median(seconds)
    return 1.4826 * statistics.median(abs(each - middle) for each in seconds) / max(1e-9, middle)


def sizes_to_measure(low: int, high: int) -> list[int]:
    """SIZES micro-batches from `low` to `high`."""
    if low >= high:
        return [high]
    return sorted({round(low * (high / low) ** (place / (SIZES - 1))) for place in range(SIZES)})


def runs_to_measure(low: int, high: int, step_samples: int) -> list[tuple[int, int]]:
    """(micro-batch, micro-batches in a step) of the short runs: whole micro-batches, else they would be made smaller.

    The smallest is run with one and with several, which tells the time of the optimizer's step from theirs.
    """
    runs = [(size, max(1, min(MOST_PARTS, step_samples // size))) for size in sizes_to_measure(low, high)]
    return [*([(runs[0][0], 1)] if runs[0][1] > 1 else []), *runs]


def measure(settings: Mapping[str, Any], directory: Path, report: Report, should_stop: ShouldStop) -> dict[str, Any]:
    """Short runs at a few held micro-batches; writes PLANT_FILE. An objective like any other.

    A micro-batch that does not fit is left out. The figures are those of the largest one that did.
    """
    import torch

    config = build(TrainConfig, dict(settings), "settings of the trial")

    def step_is_over() -> bool:
        # asked before each step: the host must not run ahead of the GPU, or its steps take no time
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return should_stop()

    # "auto" looks at some steps before it decides, in which a short run would be over
    graphs = config.enable_cuda_graphs == "auto" and torch.cuda.is_available()
    low, high = config.min_batch_size, config.max_batch_size
    runs: dict[int, list[dict[str, float]]] = {}
    figures: dict[str, Any] = {}
    for size, count in runs_to_measure(low, high, config.step_samples):
        held = {
            **settings, "min_batch_size": size, "max_batch_size": size, "max_steps": WARM_STEPS + TIMED_STEPS,
            "effective_batch_size": size * count, "batch_policy": "hold",
            "enable_cuda_graphs": graphs or config.enable_cuda_graphs,
        }  # fmt: skip
        folder = directory / f"batch_{size}x{count}"
        found = until_error(held, folder, report, step_is_over)
        if found is None:
            break
        figures = found
        with (folder / "steps.csv").open(newline="", encoding="utf-8") as file:
            rows = [{name: _number(text) for name, text in row.items() if name} for row in csv.DictReader(file)]
        of_size = [row for row in rows if row["micro_batch"] == size]
        runs[size] = [*runs[size], *of_size[WARM_STEPS:]] if size in runs else of_size
    plant = fit(runs)
    write_json(directory / PLANT_FILE, asdict(plant))
    return figures


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_plant(path: Path) -> Plant | None:
    """The plant in a file that `measure` wrote; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    plain: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return Plant(**plain)


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float | None, float] | None:
    """(Spearman's rank correlation, median relative error after scaling by the median ratio); None for under three.

    There is no correlation where all are alike.
    """
    if len(predicted) < 3:
        return None
    ratio = statistics.median(m / p for p, m in zip(predicted, measured, strict=True))
    error = statistics.median(abs(p * ratio / m - 1.0) for p, m in zip(predicted, measured, strict=True))
    try:
        return statistics.correlation(_ranks(predicted), _ranks(measured)), error
    except statistics.StatisticsError:
        return None, error


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]
