"""What the memory benchmark puts its systems through: the settings they share, and the scenarios. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from acmds_optimizer.config import GIB

SCENARIOS = ("static", "neighbour", "growing", "heavy", "cold")
_SIDES = (4 / 7, 5 / 7, 6 / 7, 1.0)
_PARETO_SHAPE = 5.0
_SLACK_SHARE = 0.02


@dataclass(frozen=True)
class Setting:
    """What every system of a table has in common."""

    device: str
    model: str
    image_size: int
    """Side of the largest image, in pixels."""
    cap_gb: float
    headroom_gb: float
    amp: str
    """bf16 | fp16 | off"""
    max_batch: int
    """Largest micro-batch of ours, and its effective batch with batch_policy hold."""
    seconds: float
    """A run ends after so many seconds of training, search apart ..."""
    images: int | None
    """... or after so many images, whichever comes first."""
    first_images: int
    """Cold start: images a second over so many, search included."""
    classes: int = 1000
    seed: int = 0

    @property
    def search_limit(self) -> int:
        """Where searches that start from above begin; the largest size that anything but Lightning tries."""
        return 2 * self.max_batch

    @property
    def headroom_bytes(self) -> int:
        return int(self.headroom_gb * GIB)

    @property
    def cap_bytes(self) -> int:
        return int(self.cap_gb * GIB)

    @property
    def neighbour_bytes(self) -> int:
        """8 GB of a 23.2 GB card, and the same share of others."""
        return round(self.cap_bytes * 8 / 23.2)

    @property
    def left_bytes(self) -> int:
        """What the ballast leaves free of a larger card: the cap, and a little for the driver's own use."""
        return int(self.cap_bytes * (1 + _SLACK_SHARE))


@dataclass(frozen=True)
class Scenario:
    """How image size and neighbour change with the share of the run that is done, `progress` in [0, 1]."""

    name: str
    setting: Setting

    @property
    def sides(self) -> tuple[int, ...]:
        """Image sides that occur, in pixels, ascending."""
        if self.name in ("growing", "heavy"):
            return tuple(round(self.setting.image_size * share) for share in _SIDES)
        return (self.setting.image_size,)

    def side(self, progress: float, step: int) -> int:
        """Side of the images of the coming step, known before it is launched.

        growing: four equal phases. heavy: each step's is drawn, 4/7 of the image size times a Pareto variable of shape
        5, rounded to the nearest of four sizes; the same for every system by the number of its step.
        """
        sides = self.sides
        if self.name == "growing":
            return sides[min(len(sides) - 1, int(progress * len(sides)))]
        if self.name == "heavy":
            drawn = sides[0] * (1.0 + np.random.default_rng((self.setting.seed, step)).pareto(_PARETO_SHAPE))
            return min(sides, key=lambda side: abs(side - drawn))
        return sides[0]

    def work(self, side: int) -> float:
        """Work of one image relative to the largest: its share of pixels."""
        return (side / self.setting.image_size) ** 2

    def has_neighbour(self, progress: float) -> bool:
        """Whether the neighbour wants its memory now: in the middle third."""
        return self.name == "neighbour" and 1 / 3 <= progress < 2 / 3


@dataclass(frozen=True)
class Probe:
    """One batch size tried offline: what it reserves, and how fast it is."""

    side: int
    batch: int
    reserved_bytes: int
    images_per_second: float


def best_batch(probes: list[Probe], side: int, budget_bytes: int) -> int:
    """The fastest batch of images of `side` px that reserves at most `budget_bytes`; 0 where none does."""
    fitting = [probe for probe in probes if probe.side == side and probe.reserved_bytes <= budget_bytes]
    return max(fitting, key=lambda probe: probe.images_per_second).batch if fitting else 0


def largest_batch(probes: list[Probe], side: int) -> int:
    """The largest batch of images of `side` px that ran at all; 0 where none did."""
    return max((probe.batch for probe in probes if probe.side == side), default=0)


def grid(limit: int) -> list[int]:
    """Batch sizes to try offline: four an octave over the three octaves below `limit`, multiples of 8 from 32 on."""
    sizes = {limit / 8 * 2 ** (i / 4) for i in range(13)}
    return sorted({round(size / 8) * 8 if size >= 32 else round(size) for size in sizes})
