"""What others do about memory, run as a trial like any other, so that a search can be compared with it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acmds_optimizer.errors import OutOfMemoryForGoodError
from acmds_tune.objective import Report, ShouldStop, run


def halving(settings: Mapping[str, Any], directory: Path, report: Report, should_stop: ShouldStop) -> dict[str, Any]:
    """Start with the largest batch; at the first out-of-memory error start again from nothing with half of it.

    As accelerate's find_executable_batch_size does. The time of the attempts that failed is part of the throughput.
    """
    began, errors, batch = time.monotonic(), 0, int(settings["max_batch_size"])
    while True:
        started = time.monotonic()
        attempt = directory / f"batch_{batch}"
        held = {**settings, "min_batch_size": batch, "max_batch_size": batch, "max_oom_retries": 1}
        try:
            figures = until_error(held, attempt, report, should_stop, errors)
        finally:
            _add_events(attempt, directory)
        if figures is not None:
            break
        if batch == 1:  # there is no half of it, and the same again might go on for ever
            raise OutOfMemoryForGoodError("no batch runs without an out-of-memory error, not even one of 1 sample")
        errors += 1
        batch //= 2
        report({"step": 0, "seconds": 0.0, "oom_events": errors})  # before its first step, for the neighbour's script
    for name in ("steps.csv", "config.json", "environment.json"):
        if (attempt / name).exists():
            shutil.copy(attempt / name, directory / name)
    speed = figures.get("samples_per_second")
    if errors and speed:  # the start of the last attempt is no more lost than that of any trial
        figures["samples_per_second"] = figures["samples"] / (figures["samples"] / speed + started - began)
    return {**figures, "oom_events": errors, "oom_recovered": errors}


def _add_events(attempt: Path, directory: Path) -> None:
    """Add what happened in one attempt to the events of the trial, as soon as it is over: the next one may crash."""
    if not (attempt / "events.csv").exists():
        return
    header, _, rows = (attempt / "events.csv").read_bytes().partition(b"\n")
    with (directory / "events.csv").open("ab") as file:
        file.write(rows if file.tell() else header + b"\n" + rows)


def until_error(
    settings: Mapping[str, Any], directory: Path, report: Report, should_stop: ShouldStop, errors: int = 0
) -> dict[str, Any] | None:
    """The figures of a whole run; None where it met an out-of-memory error, at which it is ended."""
    failed = False

    def pass_on(progress: dict[str, Any]) -> None:
        nonlocal failed
        failed = failed or progress.get("oom_events", 0) > 0
        report({**progress, "oom_events": errors + progress.get("oom_events", 0)})

    try:
        figures = run(settings, directory, pass_on, lambda: should_stop() or failed)
    except OutOfMemoryForGoodError:
        if settings["max_batch_size"] == 1:
            raise
        return None
    if should_stop():
        return figures
    return None if figures.get("oom_events", 0) else figures
