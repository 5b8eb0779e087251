"""The examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """All that an example prints, and the JSON in its last line."""
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / script), *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def check(figures: dict[str, Any], errors: int = 1) -> None:
    assert figures["oom_caught"] >= errors
    assert figures["steps"] == 16  # 4 epochs of 4 batches: the step that failed was repeated, not skipped
    assert figures["times_seen"] == [4]  # every sample once an epoch
    sizes = figures["micro_batches"]
    assert max(sizes[:8]) > sizes[0]  # it grew while there was room
    assert sizes[-1] < sizes[7]  # and shrank when half of it was gone
    losses = figures["losses"]
    assert sum(losses[-4:]) < sum(losses[4:8]) < sum(losses[:4])  # training went on after the error


def test_the_bare_loop_trains_on_after_an_out_of_memory_error_with_nothing_lost():
    printed, figures = run("bare_loop.py")
    check(figures)
    assert "out of memory" in printed


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_the_lightning_module_trains_on_after_an_out_of_memory_error_with_nothing_lost():
    check(run("lightning_loop.py")[1])


@pytest.mark.gpu
@pytest.mark.parametrize("script", ["bare_loop.py", "lightning_loop.py"])
def test_the_examples_make_room_on_a_gpu(script):
    if script.startswith("lightning") and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    # the cap is read before each step, so it may shrink without an error
    check(run(script, "--device", "cuda")[1], errors=0)
