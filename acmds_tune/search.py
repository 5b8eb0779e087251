"""A search from beginning to end: a backend runs the trials that the study proposes. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from acmds_optimizer.console import console
from acmds_optimizer.files import write_json
from acmds_tune.commands import summary
from acmds_tune.driver import INTERRUPTED, Driver
from acmds_tune.journal import make_room
from acmds_tune.objective import DEFAULT_OBJECTIVE
from acmds_tune.progress import Display
from acmds_tune.records import TrialRecord, against_baselines, confirmations
from acmds_tune.report import write_all, write_data
from acmds_tune.space import Space
from acmds_tune.stages import planned
from acmds_tune.study import CACHE, SearchStudy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """How a search ended."""

    directory: Path
    best: TrialRecord | None
    """The best feasible trial."""

    ending: str
    """Why it ended before all trials were run; empty where they were."""

    missing: int
    """Trials that were not run."""

    compared: Mapping[str, float] = field(default_factory=dict)
    """The confirmed best's first objective as a multiple of that of each baseline."""

    confirmed: str = ""
    """The objectives of the best, means and deviations, where it was run again on other seeds."""

    @property
    def interrupted(self) -> bool:
        """Somebody asked it to stop."""
        return self.ending == INTERRUPTED


class Backend(Protocol):
    """Runs trials."""

    @property
    def places(self) -> int:
        """Trials at once."""
        ...

    @property
    def resources(self) -> Mapping[str, Any]:
        """What it has, for environment.json."""
        ...

    def run(self, driver: Driver) -> None:
        """Run trials until the driver has enough."""
        ...


def open_backend(name: str, space: Space, ray_address: str | None = None) -> AbstractContextManager[Backend]:
    """`ray`, or `local`: the same trial processes, started by this one.

    Raises:
        ResourceError: the device of the trials does not exist; only once it is entered.
    """
    if name == "local":
        from acmds_tune import local_backend

        return local_backend.opened(space)
    if console().is_terminal:
        console().print("starting Ray, which takes a few seconds")
    from acmds_tune import ray_backend

    return ray_backend.opened(space, ray_address)


def run_search(
    space: Space,
    directory: Path,
    yaml_text: str,
    *,
    fixed: Mapping[str, str] | None = None,
    resume: bool = False,
    objective: str | None = None,
    backend: str = "ray",
    ray_address: str | None = None,
) -> SearchResult:
    """Search `space` and write everything to the folder `directory`.

    Args:
        space: what to search.
        directory: folder of the study; must be new, unless `resume`.
        yaml_text: the search-space file as it was given.
        fixed: what `--set` added to it.
        resume: go on with the study in `directory`.
        objective: `package.module:function` that every trial runs; None: that of the study which is gone on with, or
            the trainer's.
        backend: `ray` or `local`.
        ray_address: of a cluster to join; None: Ray is started on this machine.

    Raises:
        ConfigError: the study exists and `resume` is false, or does not fit to `space` or `objective` and it is true.
        ResourceError: the device of the trials does not exist.
    """
    directory = directory.resolve()
    if not resume:
        make_room(directory)
    study = SearchStudy.resume(directory, space, yaml_text, fixed, objective) if resume else None
    driver = None
    try:
        with open_backend(backend, space, ray_address) as machine:
            if study is None:
                study = SearchStudy.create(directory, space, yaml_text, fixed or {}, objective or DEFAULT_OBJECTIVE)
            _write_environment(directory, machine.resources)
            with Display(space.name, planned(space), list(space.search), told=study.told) as display:
                driver = Driver(study, space, objective=study.objective, sharers=machine.places, display=display)
                with _interruptible(driver):
                    machine.run(driver)
            if study.missing == 0:
                shutil.rmtree(directory / CACHE, ignore_errors=True)
            # while Ray still runs: nothing that goes wrong in its shutdown can cost the report
            best = write_all(directory)
            record = study.record()
            confirmed = summary(record, best) if best and f"trial {best.number}" in confirmations(record) else ""
            compared = against_baselines(record)
            ending = driver.ending if study.missing else ""  # the trial that Ctrl-C let end may have been the last
            return SearchResult(directory, best, ending, study.missing, compared, confirmed)
    except BaseException as error:
        if study is not None:
            with _signals_to(signal.SIG_IGN):  # takes a second or two, and is all that is left of the search
                if driver is not None:
                    driver.abandon()
                if isinstance(error, KeyboardInterrupt):
                    write_all(directory)
                else:
                    write_data(directory)
        raise
    finally:
        if study is not None:
            study.close()


def _interruptible(driver: Driver) -> AbstractContextManager[None]:
    """The first Ctrl-C makes the running trial the last, the second (or SIGTERM) ends it, the third ends all."""

    def handle(number: int, frame: object) -> None:
        if driver.stopping:
            raise KeyboardInterrupt
        last = number == signal.SIGINT and driver.ending != INTERRUPTED and not driver.idle
        driver.interrupt(stop=not last)
        if last:
            console().print("the running trial is the last one; press Ctrl-C again to end it now")
        else:
            console().print("ending the running trial; press Ctrl-C again to stop at once")

    return _signals_to(handle)


@contextlib.contextmanager
def _signals_to(handle: Any) -> Iterator[None]:
    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_environment(directory: Path, resources: Mapping[str, Any]) -> None:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("acmds", "torch", "torchvision", "ray", "optuna", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "resources": dict(resources),
    }
    write_json(directory / "environment.json", content)
