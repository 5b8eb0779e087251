"""Objectives that end in every way a trial can end, without training. Named in tests as `module:function`."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acmds_optimizer.errors import OutOfMemoryForGoodError


def figures(lr: float = 1e-3, oom_events: int = 0) -> dict[str, Any]:
    """What a whole trial measures; fastest at lr = 0.01."""
    return {
        "samples_per_second": 1000.0 - 1e5 * abs(lr - 0.01),
        "oom_events": oom_events,
        "oom_recovered": oom_events,
        "alloc_retries": 0,
        "peak_reserved_gb": 1.0,
        "headroom_min_gb": 0.5,
        "headroom_breach_fraction": 0.0,
        "batch_size_mean": 32.0,
        "train_loss": 0.5,
        "val_loss": 0.4,
        "val_accuracy": 0.9,
        "steps": 10,
        "samples": 320,
    }


def progress(step: int, total: int = 10) -> dict[str, Any]:
    """One progress report."""
    return {
        "step": step,
        "total_steps": total,
        "samples_per_second": 100.0 * step,
        "loss": 2.0 / step,
        "val_loss": None,
        "oom_events": 1,
    }


def ok(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    report(progress(1))
    return figures(settings.get("lr", 1e-3))


def junk(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """Says what no table can hold, beside what one can."""
    report(progress(1) | {"step": "one", "total_steps": 10**400, "samples_per_second": np.float32(3), "loss": junk})
    report(progress(2) | {"val_loss": 10**400, "step": float("-inf")})
    time.sleep(0.3)  # until the search has heard it
    odd = {"samples_per_second": np.float32(5.5), "steps": np.int64(7), "samples": 2**70, "val_loss": "low"}
    return figures() | odd | {"train_loss": 10**400, "val_accuracy": np.ones(2)}


def no_figures(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> None:
    return None


def unspeakable(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    raise UnspeakableError


def raises(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    report(progress(2))
    raise ValueError("the data\nare broken")


def out_of_memory(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    report(progress(3))
    raise OutOfMemoryForGoodError("nothing fits; lower min_batch_size")


def exits(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    report(progress(4))
    os._exit(3)


def is_killed(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hangs(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    report(progress(5))
    while True:
        signal.pause()


def goes_on(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """Reports steps until it is asked to stop."""
    for step in range(1, 1_000_000):
        report(progress(step, 1_000_000))
        if should_stop():
            return figures() | {"steps": step, "stopped_early": True}
        time.sleep(0.01)
    raise AssertionError("nobody asked to stop")


def mixed(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """A different end for every trial: its folder's number says which."""
    ends = {1: raises, 2: out_of_memory, 3: exits, 4: hangs}
    return ends.get(int(directory.name), ok)(settings, directory, report, should_stop)


def starts_a_worker(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    (directory / "worker.pid").write_text(str(worker.pid), encoding="utf-8")
    return hangs(settings, directory, report, should_stop)


def prints(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return figures()


def _tell_search(directory: Path, number: int) -> None:
    """Send a signal to the search, whose pid the test has written down."""
    os.kill(int((directory.parents[3] / "driver.pid").read_text(encoding="utf-8")), number)


def interrupts(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """As the second trial presses Ctrl-C in the search, and goes on for a second."""
    if directory.name == "0001":
        _tell_search(directory, signal.SIGINT)
        for step in range(1, 101):
            report(progress(step))
            if should_stop():
                return figures() | {"steps": step, "stopped_early": True}
            time.sleep(0.01)
    return ok(settings, directory, report, should_stop)


def terminates(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """As the second trial sends SIGTERM to the search."""
    if directory.name == "0001":
        _tell_search(directory, signal.SIGTERM)
        return goes_on(settings, directory, report, should_stop)
    return ok(settings, directory, report, should_stop)


def kills_its_actor(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    """As the second trial, kills the Ray actor that watches it: the parent of the fork server, its own parent."""
    if directory.name == "0001":
        report(progress(1))
        status = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8")
        os.kill(int(status.rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
        return hangs(settings, directory, report, should_stop)
    return ok(settings, directory, report, should_stop)


def ever_worse(settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable) -> dict[str, Any]:
    """Each trial has a higher loss than the one before; from the sixth on it waits to be pruned."""
    loss = 1.0 + int(directory.name)
    for step in range(1, 11):
        report(progress(step) | {"val_loss": loss})
    while loss > 6 and not should_stop():
        time.sleep(0.01)
    return figures() | {"val_loss": loss, "stopped_early": loss > 6}


def waits_as_the_third(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    return (goes_on if directory.name == "0002" else ok)(settings, directory, report, should_stop)


def meets_another(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    """Ends only when its neighbour in the pairs (0, 1), (2, 3), ... has started as well."""
    with (directory / "started").open("a", encoding="utf-8") as file:
        file.write("once\n")
    neighbour = directory.parent / f"{int(directory.name) ^ 1:04d}" / "started"
    while not neighbour.exists():
        time.sleep(0.01)
    return figures()


def eats_host_memory(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    """Holds 200 MB, and goes on."""
    report(progress(1))  # before, since it may be ended as soon as it holds them
    held = bytearray(os.urandom(1024)) * 200 * 1024
    assert len(held) == 200 * 2**20
    return goes_on(settings, directory, report, should_stop)


def counts_frozen_objects(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    return figures() | {"steps": gc.get_freeze_count()}


def says_where_it_is(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    (directory / "cwd").write_text(str(Path.cwd()), encoding="utf-8")
    return figures()


def interrupts_thrice(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    """As the second trial presses Ctrl-C in the search until it is asked to stop, does not, and presses it again."""
    if directory.name == "0001":
        for _ in range(2):
            _tell_search(directory, signal.SIGINT)
            time.sleep(0.5)
        while not should_stop():
            report(progress(1))
            time.sleep(0.01)
        _tell_search(directory, signal.SIGINT)
        return hangs(settings, directory, report, should_stop)
    return ok(settings, directory, report, should_stop)


def fails_after_the_first(
    settings: Mapping[str, Any], directory: Path, report: Callable, should_stop: Callable
) -> dict[str, Any]:
    return (ok if directory.name == "0000" else raises)(settings, directory, report, should_stop)
