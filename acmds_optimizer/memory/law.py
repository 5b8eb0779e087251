"""The control law: from what a step needed to how large the next micro-batch may be. No torch, no clock, no I/O.

Feed-forward: an online model of peak bytes as a function of work says how many samples fit under the target. Feedback:
a PID on the dimensionless headroom error trims that; it only takes away, for what the model does not explain. The
result is rounded down to a bucket, so that few distinct shapes are ever launched.

Tried and rejected (docs/memory.md has the figures):
1. PID on the sample count alone: with samples of varying size it has to discover every change through an error.
2. PID on reserved memory: reserved is the allocator's high-water mark, so the batch ratchets down.
3. A trim that may also add: the rounding to buckets keeps the error positive for ever, the integral winds up, and the
   next larger bucket is tried, breaches and is left again, for ever.
4. Growth held back in samples (one bucket every ten steps): with samples of varying size every small one is cut to what
   the largest of late allowed. What is granted, cut and held back is work; the size in samples follows from it.
5. A trim for what the feed-forward answers by itself (a neighbour, an out-of-memory error, a first step at a new size):
   it comes on top, and costs a bucket that fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.memory.model import PeakModel, TimeModel

_TRIM_LOWEST = -0.5
_DEAD_BAND = 0.02
_COLD_GROWTH = 4.0
_CALM_STEPS = 10
_TIMING_STEPS = 8
_PROBE_STEPS = 20
_CEILING_STEPS = 500
_LONGEST_CEILING_STEPS = 10_000
_SAME = 1.0 + 1e-9
_SAME_SAMPLES = 1.05

REASONS = {
    "cold": "nothing is known yet: the smallest size",
    "hold": "as much as memory allows",
    "grow": "memory allows more, or samples are smaller",
    "shrink": "memory allows less, or samples are larger",
    "max_batch": "the largest size asked for; memory would allow more",
    "min_batch": "the smallest size asked for; the headroom is not kept",
    "below_min": "the smallest size asked for would break the budget",
    "budget": "the size would break the budget itself",
    "knee": "more samples would buy too little throughput; memory is left unused",
    "timing": "growth waits for timings of this size",
    "calm": "growth waits, since memory forced the size down lately",
    "ceiling": "the next size ran out of memory lately",
    "out_of_memory": "the step failed and is repeated smaller",
}
"""Why a micro-batch is what it is: all that `Decision.reason` can say."""


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
    """What the step needed: peak allocated bytes, those above `base_bytes` times the ratio of reserved to allocated; of
    a replayed graph peak reserved bytes."""
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
    base_bytes: float | None = None
    """Allocated once the step was undone; None where it is not known."""


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
    target: float = 0.0
    """Bytes that the present size was chosen for."""
    work: float = 0.0
    """Work granted: what may run without asking whether growth should wait. A size in samples follows from it."""
    calm_steps: int = 0
    """Steps since memory last cut the work granted."""
    held_steps: int = 0
    """Steps since the work granted last grew."""
    disturbed: bool = False
    """Whether memory ever cut the work granted; until then growth does not wait to be calm."""
    ceiling_work: float = math.inf
    """Work that ran out of memory and is not tried again before `ceiling_step`, unless there is more room."""
    ceiling_room: float = 0.0
    """Bytes between what lay between steps and the budget, when it did."""
    ceiling_step: int = 0
    ceiling_wait: int = _CEILING_STEPS
    knee_batch: int = 0
    """Largest micro-batch worth its memory, once a larger one was timed; 0: not known."""
    timed_work: float = 0.0
    """Size of the samples that `times` and `knee_batch` are of."""

    @property
    def trim(self) -> float:
        """Share by which the PID moves the target: never above 0."""
        return min(0.0, max(_TRIM_LOWEST, self.p + self.i + self.d))


@dataclass(frozen=True)
class Decision:
    """The next micro-batch, and why it is this one."""

    batch: int
    reason: str
    """A key of REASONS."""
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
    sizes = {1}
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
    """The state after a step: the models learn, the PID moves.

    Steps that are smaller than was decided, such as the last of an epoch, or larger than any before, teach the model
    and leave the PID alone.
    """
    peaks = state.peaks.observe(seen.work, seen.peak_bytes, seen.base_bytes, seen.step)
    changed: dict[str, Any] = {
        "batch": state.batch or seen.batch,
        "work": state.work or seen.work,
        "peaks": peaks,
        "calm_steps": state.calm_steps + 1,
        "held_steps": state.held_steps + 1,
    }
    if state.times.timings and peaks.sizes == 1 and not peaks.residuals:  # another step now: so are its times
        changed.update(times=TimeModel(), knee_batch=0)
    if seen.batch >= state.batch and not state.peaks.extrapolates(seen.work):
        changed.update(_pid(state, seen, limits))
    return replace(state, **changed)


def _pid(state: State, seen: Observation, limits: Limits) -> dict[str, float]:
    """What the PID makes of a step: the fields of State that change."""
    # judged by the target that the size was chosen for: a change of the budget since is the feed-forward's to answer
    target = state.target or _target(seen.budget_bytes, limits)
    raw = max(-1.0, min(1.0, (target - seen.peak_bytes) / max(target, 1.0)))
    smoothed = limits.smoothing * state.smoothed + (1.0 - limits.smoothing) * raw
    error = min(raw, smoothed)  # shrink on what is, grow on what lasts
    if 0.0 <= error < _DEAD_BAND:
        error = 0.0
    # conditional integration: only what takes away is stored, and nothing where the size cannot go lower anyway
    change = 0.0 if error < 0.0 and seen.batch <= limits.min_batch else limits.ki * error
    return {
        "error": error,
        "smoothed": smoothed,
        "p": limits.kp * error,
        "i": min(0.0, max(_TRIM_LOWEST, state.i + change)),
        # of the breach alone: below the target the error moves with the rounding to buckets
        "d": limits.kd * (min(0.0, error) - min(0.0, state.error)),
    }


def time(state: State, batch: int, seconds: float, limits: Limits) -> State:
    """The state after one more timing of a micro-batch of `batch` samples; finds the knee."""
    times = state.times.observe(batch, seconds)
    knee_batch = state.knee_batch
    if limits.knee_gain and times.count(batch) == times.needed:
        knee_batch = times.knee(limits.knee_gain / 2) or knee_batch
    return replace(state, times=times, knee_batch=knee_batch)


def fail(state: State, failure: Failure, limits: Limits) -> tuple[State, Decision]:
    """The state after an out-of-memory error, and the size to repeat the step with.

    Shrinks by the shortage where it is known, by half where it is not or where the step fails again, to what the
    model allows, always by at least one bucket. The work that failed is not tried again for 500 steps, then 1,000,
    and so on, unless the room above what lies between steps grows by 5 %.
    """
    sample_work = failure.work / failure.batch
    if failure.base_bytes is not None:
        state = replace(state, peaks=replace(state.peaks, base=failure.base_bytes))
    share = 0.5
    if failure.shortage_bytes > 0 and failure.attempt == 1:
        usable = max(0.0, failure.budget_bytes - state.peaks.base)
        share = max(0.25, min(0.9, usable / (usable + failure.shortage_bytes)))
    capacity = work_that_fits(state, limits, failure.budget_bytes) if state.peaks.known else math.inf
    allowed = min(failure.batch * share, capacity / sample_work)
    smaller = [size for size in limits.buckets if size < failure.batch]
    batch = max((size for size in smaller if size <= allowed), default=smaller[0] if smaller else 1)
    active = failure.step < state.ceiling_step
    repeated = state.ceiling_step > 0 and failure.work <= state.ceiling_work * _SAME and not active
    wait = min(state.ceiling_wait * 2, _LONGEST_CEILING_STEPS) if repeated else _CEILING_STEPS
    state = replace(
        state,
        batch=batch,
        work=batch * sample_work,
        calm_steps=0,
        disturbed=True,
        ceiling_work=min(failure.work, state.ceiling_work) if active else failure.work,
        ceiling_room=failure.budget_bytes - state.peaks.base,
        ceiling_step=failure.step + wait,
        ceiling_wait=wait,
    )
    return state, _decision(state, batch, "out_of_memory", failure.budget_bytes, sample_work, limits, capacity)


def decide(
    state: State,
    limits: Limits,
    budget_bytes: float,
    sample_work: float = 1.0,
    step: int = 0,
    rehearsal: bool = False,
) -> tuple[State, Decision]:
    """The micro-batch for the coming step.

    Args:
        state: what was learned so far.
        limits: what the user asked for.
        budget_bytes: what the process may hold now.
        sample_work: size of the largest coming sample; 1 where all have one size.
        step: number of the coming step.
        rehearsal: whether it will be undone, so that growth may go as far as the model allows at once.

    Returns:
        The new state and the decision. More budget never gives a smaller batch.
    """
    current = state.batch or first_batch(limits)
    if not state.peaks.known:
        batch = min(current, first_batch(limits))
        state = replace(state, batch=batch, target=_target(budget_bytes, limits))
        return state, _decision(state, batch, "cold", budget_bytes, sample_work, limits)
    if not 1 / _SAME_SAMPLES < sample_work / (state.timed_work or math.inf) < _SAME_SAMPLES:
        state = replace(state, times=TimeModel(), knee_batch=0, timed_work=sample_work)  # they are of other samples

    usual = [size for size in limits.buckets if size >= limits.min_batch] or [limits.buckets[-1]]
    capacity = work_that_fits(state, limits, budget_bytes)
    barred = step < state.ceiling_step and budget_bytes - state.peaks.base <= 1.05 * state.ceiling_room
    ceiling = 0.999 * state.ceiling_work if barred else math.inf
    bearable = min(capacity, ceiling) * _SAME
    changed: dict[str, Any] = {"target": _target(budget_bytes, limits), "work": state.work}
    if bearable < state.work:  # shrink at once; what is left of the work may be used at any size
        changed.update(work=min(capacity, ceiling), calm_steps=0, disturbed=True)
    fitting = [size for size in usual if size * sample_work <= bearable]
    if len(fitting) < len(usual):
        probe = usual[len(fitting)]
        if probe * sample_work < ceiling and _worth_a_probe(state, limits, budget_bytes, probe * sample_work):
            fitting.append(probe)
    granted = [size for size in fitting if size * sample_work <= changed["work"] * _SAME]
    batch = granted[-1] if granted else usual[0]
    if not fitting:
        reason = "min_batch"
    elif limits.knee_gain and 0 < state.knee_batch < batch:
        batch, reason = max((size for size in usual if size <= state.knee_batch), default=usual[0]), "knee"
    elif fitting[-1] > batch:
        larger = [size for size in fitting if size > batch]
        batch, reason = _growth(replace(state, **changed), limits, batch, larger, sample_work, rehearsal)
        if reason == "grow":
            changed.update(work=max(changed["work"], batch * sample_work), held_steps=0)
    elif batch == usual[-1]:
        reason = "max_batch"
    elif ceiling < capacity and usual[usual.index(batch) + 1] * sample_work <= capacity:
        reason = "ceiling"
    else:
        reason = "shrink" if batch < current else "grow" if batch > current else "hold"

    # the guard: a batch whose predicted peak breaks the budget itself, or that just failed, is split before launch
    bearable = min(state.peaks.work_within(budget_bytes), ceiling) * _SAME
    if batch * sample_work > bearable and batch > limits.buckets[0] and (not fitting or batch != fitting[-1]):
        batch = max((size for size in limits.buckets if size * sample_work <= bearable), default=limits.buckets[0])
        reason = "below_min" if batch < limits.min_batch else "budget"
    state = replace(state, batch=batch, **changed)
    return state, _decision(state, batch, reason, budget_bytes, sample_work, limits, capacity)


def _worth_a_probe(state: State, limits: Limits, budget_bytes: float, work: float) -> bool:
    """Whether work beyond the largest seen, which the model cannot promise to fit, may be tried once.

    The first steps may all lie on a hinge's floor, of which the model must fear that it rises with the work. A probe
    may cost headroom, once, but not the budget; with one size known it may, since nothing else can be learned there.
    Once memory has cut the work, only where all sizes but one are forgotten: nothing else would ever be tried again.
    """
    peaks = state.peaks
    if work <= peaks.largest_work or peaks.least(work) > _target(budget_bytes, limits) * (1.0 + state.trim):
        return False
    within = peaks.predict(work) * (1.0 + peaks.margin_fraction) <= budget_bytes
    if state.disturbed:
        return within and peaks.sizes < 2 and state.calm_steps >= _PROBE_STEPS
    return state.held_steps < _PROBE_STEPS and (within or peaks.sizes < 2)


def _growth(
    state: State, limits: Limits, current: int, larger: list[int], sample_work: float, rehearsal: bool
) -> tuple[int, str]:
    """How far the micro-batch may grow from `current` into `larger`, all of which fit, and what stops it there."""
    if state.disturbed and state.calm_steps < _CALM_STEPS:
        return current, "calm"
    if limits.knee_gain and state.knee_batch:
        larger = [size for size in larger if size <= state.knee_batch]
    # work never seen before: double once, then up to four times, as far as two sizes can be trusted to predict
    reach = max(state.work, state.peaks.largest_work) * (2.0 if state.peaks.sizes < 2 else _COLD_GROWTH) * _SAME
    within = [size for size in larger if rehearsal or size * sample_work <= reach] or larger[:1]
    if not within:
        return current, "knee"
    if limits.knee_gain and state.peaks.sizes >= 2:
        # a loop that never tells its times does not wait for them
        waits = state.times.timings and state.held_steps < _TIMING_STEPS
        if waits and state.times.count(current) < state.times.needed:
            return current, "timing"
        gain = state.times.gain(current, within)
        if gain is not None and gain < limits.knee_gain:
            return current, "knee"
    return within[-1], "grow"


def work_that_fits(state: State, limits: Limits, budget_bytes: float) -> float:
    """The most work that keeps the headroom, by the model and the trim."""
    return state.peaks.work_within(_target(budget_bytes, limits) * (1.0 + state.trim))


def _target(budget_bytes: float, limits: Limits) -> float:
    # where neighbours leave less than the headroom itself, a tenth of what there is stays usable
    return max(budget_bytes - limits.headroom_bytes, 0.1 * budget_bytes)


def _decision(
    state: State,
    batch: int,
    reason: str,
    budget_bytes: float,
    sample_work: float,
    limits: Limits,
    capacity: float = math.inf,
) -> Decision:
    return Decision(
        batch=batch,
        reason=reason,
        predicted_peak_bytes=state.peaks.predict(batch * sample_work),
        target_bytes=_target(budget_bytes, limits),
        feed_forward=capacity / sample_work,
        p=state.p,
        i=state.i,
        d=state.d,
        trim=state.trim,
    )
