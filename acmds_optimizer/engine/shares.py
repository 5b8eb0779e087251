"""How several processes divide what they train on: a share of every step for each, and the samples that follow from it.

Pure functions of what all processes know of one another, so all of them come to the same result by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PATIENCE_STEPS = 20
_HALVINGS = 30
_LEAST_GAIN = 0.05
_MOST_PIECES = 4
"""With batch_policy free, so that one very slow process does not make the others' steps, and their inputs, huge."""
_GRAIN = 8
"""Shares are multiples of it where they are large, which suits tensor cores and keeps the number of shapes small."""


@dataclass(frozen=True)
class Standing:
    """What a process tells the others once a step."""

    micro_batch: int
    """Samples that its memory, and the knee, allow at once."""
    seconds_per_piece: float = math.nan
    """Of forward and backward of a micro-batch of about that size, apart from its samples; NaN while not known."""
    seconds_per_sample: float = math.nan
    seconds: float = 0.0
    """Training time so far. That of the first process counts for all."""
    stop: bool = False
    """Whether it was asked to stop; all stop then."""


@dataclass(frozen=True)
class Division:
    """The shares in force.

    Attributes:
        shares: samples of an optimizer step, for each process.
        micro_batches: what the processes could run at once when it was made.
        step: when it was made.
    """

    shares: tuple[int, ...]
    micro_batches: tuple[int, ...]
    step: int


def split(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`total` samples in proportion to `weights`, at least two each where there are enough, else one.

    Args:
        total: 0 or more.
        weights: positive.

    Returns:
        Shares that add up to `total`.
    """
    count = len(weights)
    grain = _GRAIN if total >= 8 * _GRAIN * count else 1
    units, odd = divmod(total, grain)
    least = 1 if grain > 1 else min(2, units // count)
    ideal = [units * weight / sum(weights) for weight in weights]
    sizes = [max(least, math.floor(share)) for share in ideal]
    while (lacking := units - sum(sizes)) != 0:
        sign = 1 if lacking > 0 else -1
        able = [i for i in range(count) if sign > 0 or sizes[i] > least]
        sizes[max(able, key=lambda i: sign * (ideal[i] - sizes[i]))] += sign
    shares = [size * grain for size in sizes]
    shares[max(range(count), key=lambda i: weights[i])] += odd
    return tuple(shares)


def divide(standings: Sequence[Standing], held: int | None, step: int, present: Division | None = None) -> Division:
    """The shares of the next step: by what each process can do, so that all of them end it together.

    That is as much as it does in the same seconds, once all of them have timed theirs, and until then its micro-batch.
    A process with less memory takes its share in more pieces, each of which costs some time of its own.

    Args:
        standings: of all processes.
        held: samples of a step; None (batch_policy free): what all do in the time of the slowest one's micro-batch.
        step: number of the coming step.
        present: the shares in force; every 20 steps others take their place if they are 5 % faster, with `held` None
            also as soon as a micro-batch changes. None: the first ones.
    """
    micro_batches = tuple(standing.micro_batch for standing in standings)
    timed = all(standing.seconds_per_piece >= 0 and standing.seconds_per_sample > 0 for standing in standings)
    if present is None or (held is None and present.micro_batches != micro_batches):
        present = Division(micro_batches if held is None else split(held, micro_batches), micro_batches, step)
    elif step == present.step or (step - present.step) % _PATIENCE_STEPS:
        return present
    if not timed:
        return present
    if held is not None:
        low, high = 0.0, max(_seconds(held, standing) for standing in standings)
        for _ in range(_HALVINGS):  # the least time in which they do it all
            middle = (low + high) / 2
            enough = sum(_samples_within(middle, standing, held) for standing in standings) >= held
            low, high = (low, middle) if enough else (middle, high)
        shares = split(held, [_samples_within(high, standing, held) for standing in standings])
    else:
        slowest = max(_seconds(standing.micro_batch, standing) for standing in standings)
        most = [_MOST_PIECES * size for size in micro_batches]
        shares = tuple(
            max(1, round(_samples_within(slowest, standing, limit)))
            for standing, limit in zip(standings, most, strict=True)
        )
    gain = _rate(shares, standings) / _rate(present.shares, standings) - 1.0
    return Division(shares, micro_batches, step) if gain >= _LEAST_GAIN else present


def _seconds(share: int, standing: Standing) -> float:
    """What a process takes for a share, in as few pieces as it can."""
    pieces = math.ceil(share / max(1, standing.micro_batch))
    return pieces * standing.seconds_per_piece + share * standing.seconds_per_sample


def _samples_within(seconds: float, standing: Standing, most: int) -> float:
    """How many samples, at most `most`, a process does in so many seconds."""
    size, best = max(1, standing.micro_batch), 0.0
    for pieces in range(1, math.ceil(most / size) + 1):
        left = (seconds - pieces * standing.seconds_per_piece) / standing.seconds_per_sample
        if left <= best:
            break
        best = min(left, pieces * size, most)
        if best < pieces * size:
            break
    return best


def _rate(shares: Sequence[int], standings: Sequence[Standing]) -> float:
    """Samples a second of all together: the slowest share ends the step."""
    return sum(shares) / max(_seconds(share, standing) for share, standing in zip(shares, standings, strict=True))


@dataclass(frozen=True)
class Deal:
    """What one process feeds of the rest of an epoch.

    Attributes:
        positions: (m,) int64, ascending, of its samples in the epoch's order.
        own: its samples of each step.
        totals: samples of each step, of all processes.
    """

    positions: NDArray[np.int64]
    own: tuple[int, ...]
    totals: tuple[int, ...]


def deal(start: int, stop: int, shares: Sequence[int], rank: int) -> Deal:
    """The part that process `rank` feeds of positions `start` to `stop` of an epoch's order.

    A step takes the next `sum(shares)` positions, as one process would, and each process a run of them. The last step
    is smaller; a rest of fewer than two samples for each process is fed with the step before it.

    Raises:
        ValueError: `rank` is not one of them.
    """
    if not 0 <= rank < len(shares):
        raise ValueError(f"rank {rank} is not in a world of {len(shares)}")
    block = sum(shares)
    full, rest = divmod(max(0, stop - start), block)
    if full and 0 < rest < 2 * len(shares):
        full, rest = full - 1, rest + block
    before = sum(shares[:rank])
    firsts = start + block * np.arange(full, dtype=np.int64)
    positions = (firsts[:, None] + np.arange(before, before + shares[rank], dtype=np.int64)).reshape(-1)
    own, totals = [shares[rank]] * full, [block] * full
    if rest:
        sizes = split(rest, shares)
        first = start + full * block + sum(sizes[:rank])
        positions = np.concatenate((positions, np.arange(first, first + sizes[rank], dtype=np.int64)))
        own.append(sizes[rank])
        totals.append(rest)
    return Deal(positions, tuple(own), tuple(totals))
