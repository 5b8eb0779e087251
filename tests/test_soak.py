"""A short soak: the full one is a command, see benchmarks/soak.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is run from the repository

from benchmarks.soak import soak


def test_no_sample_is_lost_with_heavy_tailed_sizes_and_a_neighbour_that_comes_and_goes():
    figures = soak(600)
    assert figures["oom_recovered"] > 0
    assert figures["samples_lost_or_repeated"] == 0
    assert figures["epochs"] >= 3
    assert figures["distinct_sizes"] > 5
