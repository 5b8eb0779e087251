"""Peak memory and time of a step as functions of its work, learned while training. No torch, no clock.

The peak of a training step is a hinge, then a straight line in work (samples times the size of a sample):
`peak(work) = max(floor, a + b * work)`. A log-log line is 40 % too low when it is extrapolated (docs/memory.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_BINS_PER_OCTAVE = 8
_FIT_OCTAVES = 4.0
_HALF_LIFE_STEPS = 500.0
_RESIDUALS = 100


@dataclass(frozen=True)
class Bin:
    """What was seen at about one amount of work."""

    work: float
    peak: float
    count: int
    step: int


@dataclass(frozen=True)
class PeakModel:
    """Peak bytes of a step from its work, with the margin that its own errors ask for.

    Observations are kept as running means in bins of work, eight an octave, so that thousands of steps at one size do
    not make the model forget what it knew of the others. The line is fitted to the upper four octaves of work seen,
    where the hinge of small batches does not bend it.
    """

    bins: tuple[Bin, ...] = ()
    residuals: tuple[float, ...] = ()
    intercept: float = 0.0
    slope: float = 0.0
    margin_fraction: float = 0.05
    """Share of a prediction to keep in reserve: 5 % until ten residuals are known, then their largest, at least 1 %."""

    @property
    def known(self) -> bool:
        """Whether any step has been seen."""
        return bool(self.bins)

    @property
    def sizes(self) -> int:
        """How many distinct amounts of work have been seen."""
        return len(self.bins)

    @property
    def largest_work(self) -> float:
        return self.bins[-1].work if self.bins else 0.0

    def predict(self, work: float) -> float:
        """Expected peak bytes of a step with this much work."""
        if not self.bins:
            return 0.0
        floor = min(bin_.peak for bin_ in self.bins)
        return max(floor, self.intercept + self.slope * work)

    def work_within(self, limit_bytes: float) -> float:
        """The most work whose expected peak, margin included, is at most `limit_bytes`; 0 where none is."""
        usable = limit_bytes / (1.0 + self.margin_fraction)
        if not self.bins or usable < min(bin_.peak for bin_ in self.bins):
            # below every peak seen: only the line can say, and where it starts above the limit nothing fits
            return max(0.0, (usable - self.intercept) / self.slope) if self.slope > 0 else 0.0
        return (usable - self.intercept) / self.slope if self.slope > 0 else math.inf

    def observe(self, work: float, peak: float, base: float, step: int) -> PeakModel:
        """The model after a step with `work` reached `peak` bytes, `base` bytes of which were there before it."""
        known = bool(self.bins)
        residual = peak / max(self.predict(work), 1.0) - 1.0 if known else 0.0
        key = _key(work)
        bins = list(self.bins)
        place = next((i for i, bin_ in enumerate(bins) if _key(bin_.work) == key), None)
        if place is None:
            bins.append(Bin(work, peak, 1, step))
            bins.sort(key=lambda bin_: bin_.work)
        else:
            old = bins[place]
            share = max(1.0 / (old.count + 1), 0.2)
            bins[place] = Bin(
                old.work + share * (work - old.work), old.peak + share * (peak - old.peak), old.count + 1, step
            )
        residuals = (*self.residuals[-(_RESIDUALS - 1) :], residual) if known else ()
        # the first step at a size tests an extrapolation; later ones test the fit
        margin = max(0.01, max(residuals)) if len(residuals) >= 10 else max(0.05, max(residuals, default=0.0))
        intercept, slope = _fit(bins, base, step)
        return PeakModel(tuple(bins), residuals, intercept, slope, min(margin, 1.0))

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Plain numbers, for a checkpoint."""
        rows = [[bin_.work, bin_.peak, float(bin_.count), float(bin_.step)] for bin_ in self.bins]
        return {
            "bins": rows,
            "residuals": [list(self.residuals)],
            "line": [[self.intercept, self.slope, self.margin_fraction]],
        }

    @staticmethod
    def from_state_dict(state: dict[str, list[list[float]]]) -> PeakModel:
        bins = tuple(Bin(work, peak, int(count), int(step)) for work, peak, count, step in state["bins"])
        return PeakModel(bins, tuple(state["residuals"][0]), *state["line"][0])


def _key(work: float) -> int:
    return round(_BINS_PER_OCTAVE * math.log2(max(work, 1e-9)))


def _fit(bins: list[Bin], base: float, step: int) -> tuple[float, float]:
    """Intercept and slope of the line through the upper bins, newer and better-known ones weighing more."""
    top = bins[-1]
    # with one size, or sizes that all lie on the floor, what was there before the step is the line's other point
    single = (min(base, top.peak), max(top.peak - base, 1.0) / top.work)
    chosen = [bin_ for bin_ in bins if bin_.work >= top.work / 2**_FIT_OCTAVES]
    if len(chosen) < 2:
        return single
    weights = [min(bin_.count, 8) * 0.5 ** ((step - bin_.step) / _HALF_LIFE_STEPS) + 1e-6 for bin_ in chosen]
    total = sum(weights)
    mean_work = sum(w * bin_.work for w, bin_ in zip(weights, chosen, strict=True)) / total
    mean_peak = sum(w * bin_.peak for w, bin_ in zip(weights, chosen, strict=True)) / total
    spread = sum(w * (bin_.work - mean_work) ** 2 for w, bin_ in zip(weights, chosen, strict=True))
    slope = sum(w * (b.work - mean_work) * (b.peak - mean_peak) for w, b in zip(weights, chosen, strict=True)) / spread
    if slope <= 0.05 * single[1]:
        return single
    return mean_peak - slope * mean_work, slope


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a micro-batch by its size: medians of the last few timings, so that one slow step does not count."""

    timings: tuple[tuple[int, tuple[float, ...]], ...] = ()
    needed: int = 3

    def observe(self, batch: int, seconds: float) -> TimeModel:
        """The model after one more timing of a micro-batch of `batch` samples."""
        table = dict(self.timings)
        table[batch] = (*table.get(batch, ())[-8:], seconds)
        return replace(self, timings=tuple(sorted(table.items())))

    def count(self, batch: int) -> int:
        return len(dict(self.timings).get(batch, ()))

    def seconds(self, batch: int) -> float | None:
        """Median seconds of a micro-batch of this size; None before enough timings are known."""
        values = sorted(dict(self.timings).get(batch, ()))
        return values[len(values) // 2] if len(values) >= self.needed else None

    def gain(self, batch: int, larger: int) -> float | None:
        """Predicted relative gain in samples per second from `batch` to `larger`; None where it cannot be told.

        The time of the larger one is measured, or lies on the line through `batch` and the next smaller timed size.
        """
        now = self.seconds(batch)
        if now is None:
            return None
        then = self.seconds(larger)
        if then is None:
            smaller = [size for size, _ in self.timings if size < batch and self.seconds(size) is not None]
            if not smaller:
                return None
            before = self.seconds(smaller[-1])
            assert before is not None
            slope = max(0.0, (now - before) / (batch - smaller[-1]))
            then = now + slope * (larger - batch)
        return (larger / then) / (batch / now) - 1.0
