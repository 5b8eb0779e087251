"""Pacing functions: the share of the samples that is admitted, as a function of progress.

Every function maps progress t in [0, 1] and a start share s in (0, 1] to a share: s at t = 0, 1 at t = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

PACING: dict[str, Callable[[float, float], float]] = {
    "none": lambda t, s: 1.0,
    "linear": lambda t, s: s + (1.0 - s) * t,
    "root": lambda t, s: math.sqrt(s * s + (1.0 - s * s) * t),
    "quadratic": lambda t, s: s + (1.0 - s) * t * t,
    "exponential": lambda t, s: s + (1.0 - s) * math.expm1(10.0 * t) / math.expm1(10.0),
    "logarithmic": lambda t, s: s + (1.0 - s) * max(0.0, 1.0 + 0.1 * math.log(t + math.exp(-10.0))),
    "step": lambda t, s: 1.0 if t >= 1.0 else s,
}
"""By name. linear and root: Platanios et al., 2019 (competence-based curriculum). quadratic, exponential,
logarithmic and step: Wu, Dyer and Neyshabur, 2021 (When do curricula work?), appendix."""


def admitted_share(name: str, progress: float, start: float, end: float) -> float:
    """Share of the samples admitted at `progress`.

    Args:
        name: a key of PACING.
        progress: share of the training that is done, in [0, 1].
        start: share admitted at the start, in (0, 1].
        end: progress from which every sample is admitted, in (0, 1].

    Returns:
        A share in [start, 1].
    """
    return min(1.0, PACING[name](min(1.0, max(0.0, progress) / end), start))
