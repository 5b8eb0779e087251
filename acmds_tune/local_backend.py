"""The backend without Ray: this process starts the trials and watches over them, on the GPUs of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from acmds_tune import nvml
from acmds_tune.child import TrialProcess
from acmds_tune.driver import Driver
from acmds_tune.space import ResourceError, Space

TURN_S = 0.1
"""Seconds between looks at all running trials."""


class LocalBackend:
    """Trials as children of this process. Use `opened`.

    Attributes:
        places: trials at once.
        resources: the GPUs of this machine.
    """

    def __init__(self, space: Space) -> None:
        self._devices = devices(space)
        self.places = len(self._devices)
        self.resources: dict[str, Any] = {
            f"GPU {gpu}": nvml.name(gpu) or "unknown"
            for gpu in (nvml.visible_devices() if space.device != "cpu" else [])
        }
        self._running: dict[int, tuple[TrialProcess, str | None]] = {}

    def run(self, driver: Driver) -> None:
        """Run trials until the driver has enough."""
        free = list(self._devices)
        while True:
            while free and (task := driver.next_task()) is not None:
                device = free.pop(0)
                self._running[task.number] = (TrialProcess(replace(task, visible_devices=device)), device)
            if not self._running:
                return
            wait([each for process, _ in self._running.values() for each in process.waitables], TURN_S)
            for number, (process, device) in list(self._running.items()):
                progress = process.poll(0.0)
                if process.ended is not None:
                    del self._running[number]
                    free.append(device)
                    driver.ended(number, process.ended, progress)
                else:
                    driver.heard(number, progress)

    def kill(self) -> None:
        """End all running trials now."""
        for process, _ in self._running.values():
            process.kill()


@contextlib.contextmanager
def opened(space: Space) -> Iterator[LocalBackend]:
    """Trials on this machine; none of them outlives the context.

    Raises:
        ResourceError: the trials need GPUs that are not there.
    """
    backend = LocalBackend(space)
    try:
        yield backend
    finally:
        backend.kill()


def devices(space: Space) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each trial that may run at once; None each on the CPU."""
    wanted = space.resources.concurrent_trials
    if space.device == "cpu":
        return [None] * (wanted or 1)
    found, each = nvml.visible_devices(), space.resources.gpus_per_trial
    if each >= 1:
        groups = [found[start : start + int(each)] for start in range(0, len(found), int(each))]
        places = [",".join(group) for group in groups if len(group) == int(each)]
    else:
        places = found * int(1 / each + 1e-6)
    if len(places) < (wanted or 1):
        needed = (wanted or 1) * each
        raise ResourceError(
            f"device {space.device}: the trials need {needed:g} GPU{'s' if needed > 1 else ''}, but NVIDIA's driver "
            f"shows {len(found) or 'none'} here. Put `device: cpu` under fixed, or see what `acmds-tune doctor` says"
        )
    return list(places[: wanted or len(places)])
