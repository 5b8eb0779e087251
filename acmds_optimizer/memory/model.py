"""Peak memory and time of a step as functions of its work, learned while training. No torch, no clock.

Every moment of a step holds `a + b * work` bytes (work: samples times the size of a sample) above what lies there
between steps, and `a` is never negative. The peak is the largest of these lines, so it is a hinge and then a
straight line, or several: it bends upwards only. Between two amounts of work that were seen, the straight line is
therefore never too low; beyond the largest, neither is the line from the origin through it. A log-log line is 40 % too
low when it is extrapolated (docs/memory.md). What lies there between steps is measured, not learned: when it changes,
all predictions do at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

_BINS_PER_OCTAVE = 8
_FIT_OCTAVES = 4.0
_STRAIGHT = 0.05
_LEAST_RISE = 0.1
_EXTRAPOLATION = 1.05
_RESIDUALS = 200
_STRAYS_FROM = 20
_SURPRISE = 0.1
_SAME_WORK = 0.01
_LEAST_MARGIN = 0.005
_BELIEF_STEPS = 500
_LINE_REACH = 4
_LEAST_SAMPLES_SHARE = 0.1


@dataclass(frozen=True)
class Bin:
    """What was seen at about one amount of work."""

    key: int
    """Eighths of an octave."""
    work: float
    excess: float
    """Bytes of the peak above what lay there between steps."""
    count: int
    step: int


_ORIGIN = Bin(0, 0.0, 0.0, 0, 0)


@dataclass(frozen=True)
class PeakModel:
    """Peak bytes of a step from its work, with the margin that its own errors ask for.

    Observations are kept as moving means in bins of work, eight an octave, joined by straight lines. What was seen n
    times (at most 8) is believed for 500 n steps. Two errors of 10 % in a row and in one direction, at work between
    what was seen before, say that the step itself has changed: all else is then forgotten.
    """

    bins: tuple[Bin, ...] = ()
    residuals: tuple[float, ...] = ()
    """Errors of the last 200 predictions, relative; those that extrapolated are not among them."""
    base: float = 0.0
    """Bytes allocated between steps."""
    slope: float = 0.0
    """Bytes a unit of work beyond the largest work seen, at most: what predictions use."""
    least_slope: float = 0.0
    """The same at least."""
    margin_fraction: float = 0.05
    """Share of a prediction to keep in reserve: 5 % until ten residuals are known, then their 99 % quantile, at
    least 0.5 %."""
    strays: tuple[tuple[float, float], ...] = ()
    """Work and residual of strays, where nothing was seen since of about as much work."""

    @property
    def known(self) -> bool:
        """Whether any step has been seen."""
        return bool(self.bins)

    @property
    def sizes(self) -> int:
        """How many distinct amounts of work are remembered."""
        return len(self.bins)

    @property
    def largest_work(self) -> float:
        """The largest work remembered; 0 before the first step."""
        return self.bins[-1].work if self.bins else 0.0

    @property
    def largest_peak(self) -> float:
        """Peak bytes at the largest work remembered; 0 before the first step."""
        return self.predict(self.largest_work)

    def predict(self, work: float) -> float:
        """Expected peak bytes of a step with this much work; grows with it, but for noise; 0 before the first step."""
        if not self.bins:
            return 0.0
        place = bisect_left(self.bins, work, key=_work)
        if place == len(self.bins):
            return self.base + self.bins[-1].excess + self.slope * (work - self.bins[-1].work)
        high = self.bins[place]
        low = self.bins[place - 1] if place else _ORIGIN
        return self.base + low.excess + (high.excess - low.excess) * (work - low.work) / (high.work - low.work)

    def extrapolates(self, work: float) -> bool:
        """Whether this is more work than the model knows of."""
        return work > _EXTRAPOLATION * self.largest_work

    def least(self, work: float) -> float:
        """The least peak bytes to expect of a step with more work than any seen, margin included."""
        return (self.largest_peak + self.least_slope * (work - self.largest_work)) * (1.0 + self.margin_fraction)

    def work_within(self, limit_bytes: float) -> float:
        """The most work whose expected peak, margin included, is at most `limit_bytes`; 0 where none is."""
        usable = limit_bytes / (1.0 + self.margin_fraction) - self.base
        if not self.bins or usable < 0.0:
            return 0.0
        low = self.bins[-1]
        if low.excess <= usable:
            return low.work + (usable - low.excess) / self.slope if self.slope > 0.0 else math.inf
        for place in range(len(self.bins) - 1, -1, -1):
            high = self.bins[place]
            low = self.bins[place - 1] if place else _ORIGIN
            if low.excess <= usable:
                return low.work + (high.work - low.work) * (usable - low.excess) / (high.excess - low.excess)
        return 0.0

    def observe(self, work: float, peak: float, base: float, step: int) -> PeakModel:
        """The model after a step with `work` reached `peak` bytes, `base` bytes of which were there before it."""
        residuals, expected = self.residuals, replace(self, base=base).predict(work)
        key, again = _key(work), False
        strays = tuple(stray for stray in self.strays if _key(stray[0]) != key)
        if not self.extrapolates(work):
            error = peak / max(expected, 1.0) - 1.0
            residuals = (*residuals[1 - _RESIDUALS :], error)
            if abs(error) > _SURPRISE and len(residuals) > 1:
                if min(residuals[-2:]) > _SURPRISE or max(residuals[-2:]) < -_SURPRISE:
                    return PeakModel().observe(work, peak, base, step)
                before = next((e for w, e in self.strays if abs(w / work - 1.0) < _SAME_WORK), 0.0)
                again = before * error > 0.0
                if again:  # no error of the others: they need no margin for it
                    residuals = tuple(residual for residual in residuals[:-1] if residual != before)
                elif len(residuals) >= _STRAYS_FROM:  # one alone is not learned from: it may be a stray
                    margin, strays = _margin(residuals), (*strays, (work, error))
                    return replace(self, residuals=residuals, base=base, margin_fraction=margin, strays=strays)
        bins = []
        excess = max(0.0, peak - base)
        seen = Bin(key, work, excess, 1 + again, step)
        for place, old in enumerate(self.bins):
            if old.key == key and again:
                continue
            if old.key == key:
                # the first step at a size may have searched for kernels: the second replaces it
                share = max(1.0 / old.count, 0.2)
                mean_work = old.work + share * (work - old.work)
                seen = Bin(key, mean_work, old.excess + share * (excess - old.excess), old.count + 1, step)
            elif place == 0 or step - old.step < _BELIEF_STEPS * min(old.count, 8):
                bins.append(old)
        bins.insert(bisect_left(bins, seen.work, key=_work), seen)
        return PeakModel(tuple(bins), residuals, base, *_slopes(bins), _margin(residuals), strays)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Plain numbers, for a checkpoint."""
        rows = [[bin_.work, bin_.excess, float(bin_.count), float(bin_.step)] for bin_ in self.bins]
        return {
            "bins": rows,
            "residuals": [list(self.residuals)],
            "line": [[self.base, self.slope, self.least_slope, self.margin_fraction]],
            "strays": [list(stray) for stray in self.strays],
        }

    @staticmethod
    def from_state_dict(state: dict[str, list[list[float]]]) -> PeakModel:
        """The model that gave this `state_dict`."""
        bins = tuple(
            Bin(_key(work), work, excess, int(count), int(step)) for work, excess, count, step in state["bins"]
        )
        strays = tuple((work, residual) for work, residual in state.get("strays", []))
        base, slope, least_slope, margin = state["line"][0]
        return PeakModel(bins, tuple(state["residuals"][0]), base, slope, least_slope, margin, strays)


def _work(bin_: Bin) -> float:
    return bin_.work


def _key(work: float) -> int:
    return round(_BINS_PER_OCTAVE * math.log2(max(work, 1e-9)))


def _margin(residuals: tuple[float, ...]) -> float:
    if len(residuals) < 10:
        return min(1.0, max(0.05, max(residuals, default=0.0)))
    # one stray in twenty or more does not count; of 200 the two largest do not
    strays = 0 if len(residuals) < _STRAYS_FROM else max(1, len(residuals) // 100)
    return min(1.0, max(_LEAST_MARGIN, sorted(residuals)[-1 - strays]))


def _slopes(bins: list[Bin]) -> tuple[float, float]:
    """Bytes a unit of work beyond the largest seen, at most and at least.

    At least what least squares say of the upper four octaves, or the line through the largest and the next smaller one
    where that is further below. That is also the most where three or more lie on one rising line; else it is the line
    from the origin through the largest, which is never too low.
    """
    top = bins[-1]
    ray = top.excess / top.work
    if len(bins) < 2:
        return ray, 0.0
    chosen = [bin_ for bin_ in bins if bin_.work >= top.work / 2**_FIT_OCTAVES]
    if len(chosen) < 2:
        chosen = bins[-2:]
    weights = [min(bin_.count, 8) for bin_ in chosen]
    total = sum(weights)
    mean_work = sum(w * bin_.work for w, bin_ in zip(weights, chosen, strict=True)) / total
    mean = sum(w * bin_.excess for w, bin_ in zip(weights, chosen, strict=True)) / total
    spread = sum(w * (bin_.work - mean_work) ** 2 for w, bin_ in zip(weights, chosen, strict=True))
    slope = sum(w * (b.work - mean_work) * (b.excess - mean) for w, b in zip(weights, chosen, strict=True)) / spread
    slope = max(0.0, slope)
    rise = top.excess - chosen[0].excess
    if len(chosen) >= 3 and rise >= _LEAST_RISE * top.excess:  # less may be a hinge's floor, and noise
        furthest = max(abs(bin_.excess - mean - slope * (bin_.work - mean_work)) for bin_ in chosen)
        if furthest <= _STRAIGHT * rise:
            return slope, slope
    return max(slope, ray), slope


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a micro-batch by its size: medians of the last few timings, so that one slow step does not count."""

    timings: tuple[tuple[int, tuple[float, ...]], ...] = ()
    needed: int = 3

    def observe(self, batch: int, seconds: float) -> TimeModel:
        """The model after one more timing of a micro-batch of `batch` samples; 0 s, by a coarse clock, are none."""
        if not 0.0 < seconds < math.inf:
            return self
        table = dict(self.timings)
        table[batch] = (*table.get(batch, ())[-8:], seconds)
        return replace(self, timings=tuple(sorted(table.items())))

    def count(self, batch: int) -> int:
        """How many timings of this size are remembered, at most 9."""
        return next((len(values) for size, values in self.timings if size == batch), 0)

    def medians(self) -> dict[int, float]:
        """Median seconds by size, ascending; only sizes with enough timings."""
        return {size: sorted(values)[len(values) // 2] for size, values in self.timings if len(values) >= self.needed}

    def line(self, batch: int) -> tuple[float, float]:
        """Seconds of a micro-batch about as large as `batch`: those of any, and those of each sample.

        On the line through the timed size nearest to it and the next smaller one of at least a quarter; where there is
        none, a tenth of the seconds are taken for those of any. NaN and NaN where no size has enough timings.
        """
        medians = self.medians()
        if not medians:
            return math.nan, math.nan
        size = min(medians, key=lambda size: abs(math.log(size / max(1, batch))))
        smaller = max((other for other in medians if size / _LINE_REACH <= other < size), default=None)
        share = 0.9
        if smaller is not None:
            slope = (medians[size] - medians[smaller]) / (size - smaller)
            share = min(1.0, max(_LEAST_SAMPLES_SHARE, slope * size / medians[size]))
        return (1.0 - share) * medians[size], share * medians[size] / size

    def gain(self, batch: int, larger: list[int]) -> float | None:
        """The best relative gain in samples per second from `batch` to any of `larger`; None where it cannot be told.

        The time of a larger one is measured, or lies on the line through `batch` and the next smaller timed size.
        """
        medians = self.medians()
        now = medians.get(batch)
        smaller = [size for size in medians if size < batch]
        if now is None or not smaller:
            return None
        slope = max(0.0, (now - medians[smaller[-1]]) / (batch - smaller[-1]))
        return max(size / medians.get(size, now + slope * (size - batch)) * (now / batch) - 1.0 for size in larger)

    def knee(self, tolerance: float) -> int:
        """The smallest timed size whose rate is within `tolerance` (a share) of the fastest; 0 if that is the largest,
        or where only one is timed.
        """
        rates = {size: size / seconds for size, seconds in self.medians().items()}
        if len(rates) < 2:
            return 0
        enough = (1.0 - tolerance) * max(rates.values())
        size = min(size for size, rate in rates.items() if rate >= enough)
        return size if size < max(rates) else 0
