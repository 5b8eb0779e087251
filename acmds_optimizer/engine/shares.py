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
_LEAST_GAIN = 0.05
_LEAST_GAIN_IN_MORE_PIECES = 0.15
"""A share just above a micro-batch takes two pieces, and what they lose is not in the times that it is judged by."""
_MOST_PIECES = 4
"""With batch_policy free, so that one very slow process does not make the others' steps, and their inputs, huge."""
_GRAIN = 8
"""Shares are multiples of it where they are large, which suits tensor cores and keeps the number of shapes small."""


@dataclass(frozen=True)
class Standing:
    """What a process tells the others once a step."""

    micro_batch: int
    """Samples that its memory, and the knee, allow at once."""
    seconds_per_sample: float = math.nan
    """Of its own forward and backward, at about that size; NaN while it is not known."""
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

    That is its samples a second, once all of them have timed theirs, and until then its micro-batch. A process with
    less memory is not slower for it as long as its micro-batch lies above the knee; it takes its share in more pieces.

    Args:
        standings: of all processes.
        held: samples of a step; None (batch_policy free): what all do in the time of the slowest one's micro-batch.
        step: number of the coming step.
        present: the shares in force, which stay for at least 20 steps, and until others are 5 % faster (15 % where they
            take more pieces); with `held` None also until a micro-batch changes. None: the first ones.
    """
    micro_batches = tuple(standing.micro_batch for standing in standings)
    seconds = [standing.seconds_per_sample for standing in standings]
    timed = all(math.isfinite(value) and value > 0 for value in seconds)
    if present is None or (held is None and present.micro_batches != micro_batches):
        present = Division(micro_batches if held is None else split(held, micro_batches), micro_batches, step)
    elif step - present.step < _PATIENCE_STEPS:
        return present
    if not timed:
        return present
    if held is not None:
        shares = split(held, [1.0 / value for value in seconds])
    else:
        slowest = max(size * value for size, value in zip(micro_batches, seconds, strict=True))
        most = [_MOST_PIECES * size for size in micro_batches]
        shares = tuple(min(limit, max(1, round(slowest / value))) for limit, value in zip(most, seconds, strict=True))
    gain = _rate(shares, seconds) / _rate(present.shares, seconds) - 1.0
    more_pieces = _pieces(shares, micro_batches) > _pieces(present.shares, micro_batches)
    needed = _LEAST_GAIN_IN_MORE_PIECES if more_pieces else _LEAST_GAIN
    return Division(shares, micro_batches, step) if gain >= needed else present


def _rate(shares: Sequence[int], seconds: Sequence[float]) -> float:
    """Samples a second of all together: the slowest share ends the step."""
    return sum(shares) / max(share * value for share, value in zip(shares, seconds, strict=True))


def _pieces(shares: Sequence[int], micro_batches: Sequence[int]) -> int:
    return sum(math.ceil(share / max(1, size)) for share, size in zip(shares, micro_batches, strict=True))


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
