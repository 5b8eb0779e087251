"""The control law: from what a step needed to how large the next micro-batch may be. No torch, no clock, no I/O.

Feed-forward: an online model of peak bytes as a function of work says how many samples fit under the target. Feedback:
a PID on the dimensionless headroom error trims that; it only takes away, for what the model does not explain. The
result is rounded down to a bucket, so that few distinct shapes are ever launched.

Tried and rejected (docs/memory.md has the figures):
1. PID on the sample count alone: with samples of varying size it has to discover every change through an error.
2. PID on reserved memory: reserved is the allocator's high-water mark, so the batch ratchets down.
3. A trim that may also add: the rounding to buckets keeps the error positive for ever, the integral winds up, and the
   next larger bucket is tried, breaches and is left again, for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.memory.model import PeakModel, TimeModel

_TRIM_LOWEST = -0.5
_DEAD_BAND = 0.02
_COLD_GROWTH = 4.0
_CALM_STEPS = 10
_CEILING_STEPS = 100


@dataclass(frozen=True)
class Limits:
    """What the user asked for, in the law's units."""

    headroom_bytes: int
    buckets: tuple[int, ...]
    """Micro-batch sizes in ascending order. Those below `min_batch` are for recovery only."""
    min_batch: int
    kp: float
    ki: float
    kd: float
    smoothing: float
    knee_gain: float

    @staticmethod
    def from_config(config: CurriculumConfig) -> Limits:
        return Limits(
            headroom_bytes=int(config.target_headroom_gb * GIB),
            buckets=buckets(config),
            min_batch=config.min_batch_size,
            kp=config.pid_kp,
            ki=config.pid_ki,
            kd=config.pid_kd,
            smoothing=config.pressure_smoothing,
            knee_gain=config.knee_gain_fraction,
        )


@dataclass(frozen=True)
class Observation:
    """One finished step."""

    step: int
    batch: int
    """Micro-batch size that ran."""
    work: float
    """Work of its largest micro-batch: samples times the size of a sample."""
    peak_bytes: float
    """Peak allocated bytes, times the ratio of reserved to allocated."""
    base_bytes: float
    """Allocated between steps: weights, optimizer state, resident data."""
    budget_bytes: float


@dataclass(frozen=True)
class Failure:
    """One out-of-memory error."""

    step: int
    batch: int
    work: float
    budget_bytes: float
    shortage_bytes: float
    """What the failed allocation lacked; 0 where it is not known. The step may have needed more."""
    attempt: int = 1
    """How many times in a row the step has failed now."""


@dataclass(frozen=True)
class State:
    """All that the law remembers."""

    batch: int = 0
    peaks: PeakModel = field(default_factory=PeakModel)
    times: TimeModel = field(default_factory=TimeModel)
    p: float = 0.0
    i: float = 0.0
    d: float = 0.0
    error: float = 0.0
    smoothed: float = 0.0
    calm_steps: int = 0
    """Steps since the micro-batch last changed."""
    disturbed: bool = False
    """Whether memory ever forced the micro-batch down; until then growth does not wait."""
    ceiling_work: float = math.inf
    """Work that ran out of memory and is not tried again before `ceiling_step`, unless the budget grows."""
    ceiling_budget: float = 0.0
    ceiling_step: int = 0
    ceiling_wait: int = _CEILING_STEPS
    knee_batch: int = 0
    """Largest micro-batch worth its memory, once two neighbours have been timed; 0: not known."""

    @property
    def trim(self) -> float:
        """Share by which the PID moves the target: never above 0."""
        return min(0.0, max(_TRIM_LOWEST, self.p + self.i + self.d))


@dataclass(frozen=True)
class Decision:
    """The next micro-batch, and why it is this one."""

    batch: int
    reason: str
    """cold | hold | grow | shrink | max_batch | min_batch | below_min | knee | calm | ceiling | budget"""
    predicted_peak_bytes: float
    target_bytes: float
    feed_forward: float
    """Samples that the model and the trim allow, before buckets and bounds; inf before the first step."""
    p: float
    i: float
    d: float
    trim: float


def buckets(config: CurriculumConfig) -> tuple[int, ...]:
    """Micro-batch sizes that may be launched.

    With batch_policy hold: the near-equal parts of the effective batch, so that accumulation leaves no odd remainder.
    With free: four an octave, rounded to multiples of 8 from 32 on (tensor cores). Powers of two go below
    min_batch_size for recovery.
    """
    low, high = config.min_batch_size, config.max_batch_size
    sizes: set[int] = set()
    if config.batch_policy == "hold":
        total = config.step_samples
        parts = 1
        while parts <= total:
            sizes.add(math.ceil(total / parts))
            parts += max(1, parts // 4)
        sizes = {size for size in sizes if size <= high}
    else:
        size = float(low)
        while size < high:
            sizes.add(round(size / 8) * 8 if size >= 32 else round(size))
            size *= 2**0.25
        sizes |= {low, high}
    power = 1
    while power < low:
        sizes.add(power)
        power *= 2
    return tuple(sorted(size for size in sizes if 1 <= size <= high))


def first_batch(limits: Limits) -> int:
    """Where a run starts: the smallest bucket that is not for recovery only."""
    return next((size for size in limits.buckets if size >= limits.min_batch), limits.buckets[-1])


def observe(state: State, seen: Observation, limits: Limits) -> State:
    """The state after a step: the models learn, the PID moves."""
    target = _target(seen.budget_bytes, limits)
    raw = (target - seen.peak_bytes) / max(target, 1.0)
    smoothed = limits.smoothing * state.smoothed + (1.0 - limits.smoothing) * raw
    error = min(raw, smoothed)  # shrink on what is, grow on what lasts
    error = max(-1.0, min(1.0, error))
    if 0.0 <= error < _DEAD_BAND:
        error = 0.0
    return replace(
        state,
        batch=state.batch or seen.batch,
        peaks=state.peaks.observe(seen.work, seen.peak_bytes, seen.base_bytes, seen.step),
        error=error,
        smoothed=smoothed,
        p=limits.kp * error,
        # conditional integration: only what takes away is ever stored, so a clamped controller cannot wind up
        i=min(0.0, max(_TRIM_LOWEST, state.i + limits.ki * error)),
        d=limits.kd * (error - state.error),
        calm_steps=state.calm_steps + 1,
    )


def time(state: State, batch: int, seconds: float, limits: Limits) -> State:
    """The state after one more timing of a micro-batch of `batch` samples; finds the knee."""
    times = state.times.observe(batch, seconds)
    knee_batch = state.knee_batch
    if limits.knee_gain and times.count(batch) == times.needed:
        knee_batch = _knee(times, limits) or knee_batch
    return replace(state, times=times, knee_batch=knee_batch)


def fail(state: State, failure: Failure, limits: Limits) -> tuple[State, Decision]:
    """The state after an out-of-memory error, and the size to repeat the step with.

    Shrinks by the shortage where it is known, by half where it is not or where the step fails again, to what the
    model allows, always by at least one bucket.
    """
    share = 0.5
    if failure.shortage_bytes > 0 and failure.attempt == 1:
        share = max(0.25, min(0.9, failure.budget_bytes / (failure.budget_bytes + failure.shortage_bytes)))
    allowed = failure.batch * share
    if state.peaks.known:
        allowed = min(allowed, _feed_forward(state, limits, failure.budget_bytes, failure.work / failure.batch))
    smaller = [size for size in limits.buckets if size < failure.batch]
    batch = max((size for size in smaller if size <= allowed), default=smaller[0] if smaller else 1)
    error = -min(1.0, max(0.02, failure.shortage_bytes / max(failure.budget_bytes, 1.0)))
    repeated = failure.work <= state.ceiling_work * 1.01
    wait = min(state.ceiling_wait * 2, 10_000) if repeated and state.ceiling_step else _CEILING_STEPS
    state = replace(
        state,
        batch=batch,
        i=max(_TRIM_LOWEST, state.i + limits.ki * error),
        error=error,
        smoothed=min(state.smoothed, error),
        calm_steps=0,
        disturbed=True,
        ceiling_work=min(failure.work, state.ceiling_work) if failure.step < state.ceiling_step else failure.work,
        ceiling_budget=failure.budget_bytes,
        ceiling_step=failure.step + wait,
        ceiling_wait=wait,
    )
    return state, _decision(state, batch, "out_of_memory", failure.budget_bytes, failure.work / failure.batch, limits)


def decide(
    state: State, limits: Limits, budget_bytes: float, sample_work: float = 1.0, step: int = 0
) -> tuple[State, Decision]:
    """The micro-batch for the coming step.

    Args:
        state: what was learned so far.
        limits: what the user asked for.
        budget_bytes: what the process may hold now.
        sample_work: size of the largest coming sample; 1 where all have one size.
        step: number of the coming step.

    Returns:
        The new state and the decision. More budget never gives a smaller batch.
    """
    current = state.batch or first_batch(limits)
    if not state.peaks.known:
        batch = min(current, first_batch(limits))
        return replace(state, batch=batch), _decision(state, batch, "cold", budget_bytes, sample_work, limits)

    usual = [size for size in limits.buckets if size >= limits.min_batch] or [limits.buckets[-1]]
    allowed = _feed_forward(state, limits, budget_bytes, sample_work)
    fitting = [size for size in usual if size <= allowed]
    batch, reason = (fitting[-1], "hold") if fitting else (usual[0], "min_batch")
    if batch == limits.buckets[-1] and fitting:
        reason = "max_batch"

    if batch > current:
        batch, reason = _growth(state, limits, current, batch, reason, budget_bytes, sample_work, step)
    elif batch < current:
        reason = "shrink" if fitting else "min_batch"

    # the guard: a batch whose predicted peak breaks the budget itself is split before launch
    within_budget = state.peaks.work_within(budget_bytes) / sample_work
    if batch > within_budget:
        below = [size for size in limits.buckets if size <= within_budget]
        split = below[-1] if below else limits.buckets[0]
        if split < batch:
            batch, reason = split, "below_min" if split < limits.min_batch else "budget"

    if batch != current:
        state = replace(
            state, batch=batch, calm_steps=0, disturbed=state.disturbed or (batch < current and reason != "knee")
        )
    return state, _decision(state, batch, reason, budget_bytes, sample_work, limits)


def _growth(
    state: State, limits: Limits, current: int, wanted: int, reason: str, budget: float, sample_work: float, step: int
) -> tuple[int, str]:
    """How far towards `wanted` the micro-batch may grow in one decision, and what stops it there."""
    if limits.knee_gain and state.knee_batch and wanted > state.knee_batch:
        wanted, reason = max(current, state.knee_batch), "knee"
    expired = step >= state.ceiling_step or budget > 1.05 * state.ceiling_budget
    if not expired and wanted * sample_work >= state.ceiling_work:
        below = [size for size in limits.buckets if current <= size and size * sample_work < state.ceiling_work]
        wanted, reason = (below[-1] if below else current), "ceiling"
    if wanted <= current:
        return current, reason
    larger = [size for size in limits.buckets if current < size <= wanted]
    if state.disturbed:
        if state.calm_steps < _CALM_STEPS:
            return current, "calm"
        return larger[0], "grow"
    # a new run: doubles once, then goes up by four times, as far as two sizes can be trusted to predict
    reach = max(current, state.peaks.largest_work / sample_work) * (2.0 if state.peaks.sizes < 2 else _COLD_GROWTH)
    within = [size for size in larger if size <= reach] or larger[:1]
    if limits.knee_gain and state.peaks.sizes >= 2:
        if state.times.count(current) < state.times.needed and state.calm_steps < 4 * state.times.needed:
            return current, "timing"
        gain = state.times.gain(current, within[-1])
        if gain is not None and gain < limits.knee_gain:
            return current, "knee"
    return within[-1], "grow"


def _knee(times: TimeModel, limits: Limits) -> int:
    """The smallest timed micro-batch within half the knee's gain of the fastest; 0 where only one is timed."""
    rates = {}
    for size, _ in times.timings:
        seconds = times.seconds(size)
        if seconds:
            rates[size] = size / seconds
    if len(rates) < 2:
        return 0
    best = max(rates.values())
    knee = min(size for size, rate in rates.items() if rate >= (1.0 - limits.knee_gain / 2) * best)
    return knee if knee < max(rates) else 0


def _feed_forward(state: State, limits: Limits, budget_bytes: float, sample_work: float) -> float:
    target = _target(budget_bytes, limits) * (1.0 + state.trim)
    return state.peaks.work_within(target) / sample_work


def _target(budget_bytes: float, limits: Limits) -> float:
    # where neighbours leave less than the headroom itself, a tenth of what there is stays usable
    return max(budget_bytes - limits.headroom_bytes, 0.1 * budget_bytes)


def _decision(
    state: State, batch: int, reason: str, budget_bytes: float, sample_work: float, limits: Limits
) -> Decision:
    return Decision(
        batch=batch,
        reason=reason,
        predicted_peak_bytes=state.peaks.predict(batch * sample_work),
        target_bytes=_target(budget_bytes, limits),
        feed_forward=_feed_forward(state, limits, budget_bytes, sample_work) if state.peaks.known else math.inf,
        p=state.p,
        i=state.i,
        d=state.d,
        trim=state.trim,
    )
