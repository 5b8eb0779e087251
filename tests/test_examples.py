"""The examples, run as a user runs them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """All that an example prints, and the JSON in its last line; with arguments in a process of its own."""
    argv = [str(REPOSITORY / "examples" / script), *arguments]
    if arguments:
        paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:  # which is there already, with all that the example imports
        with (
            pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stream,
            warnings.catch_warnings(), torch.random.fork_rng(),
        ):  # fmt: skip
            patch.setattr(sys, "argv", argv)
            runpy.run_path(argv[0], run_name="__main__")
        printed = stream.getvalue()
    return printed, json.loads(printed.splitlines()[-1])


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
