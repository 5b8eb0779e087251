"""A search from beginning to end: Ray Tune runs the trials that the study proposes.

The study's journal is the truth; Ray keeps nothing that is read again. Its own files go to a temporary folder.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acmds_optimizer.console import console
from acmds_optimizer.errors import ACMDSError
from acmds_tune.journal import make_room
from acmds_tune.objective import DEFAULT_OBJECTIVE, Ended
from acmds_tune.records import TrialRecord
from acmds_tune.space import Space

# Ray reads these when it is imported or started; what a user has set stays as it is.
RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a kill by it aborts the whole search
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # not 60: its server, once gone, never comes back
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
}
for _name, _value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402 - after its environment
from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from acmds_tune.driver import INTERRUPTED, Driver, request_stop_by_file  # noqa: E402
from acmds_tune.progress import Display  # noqa: E402
from acmds_tune.report import write_all, write_data, write_html  # noqa: E402
from acmds_tune.study import SearchStudy  # noqa: E402
from acmds_tune.trainable import TrialRunner  # noqa: E402

logger = logging.getLogger(__name__)


SCRATCH_PREFIX = "acmds-ray-"
"""Of the temporary folder for Ray's files; the process id comes next."""


class ResourceError(ACMDSError):
    """The machine has not what the trials need."""


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

    @property
    def interrupted(self) -> bool:
        """Somebody asked it to stop."""
        return self.ending == INTERRUPTED


def run_search(
    space: Space,
    directory: Path,
    yaml_text: str,
    *,
    fixed: Mapping[str, str] | None = None,
    resume: bool = False,
    objective: str = DEFAULT_OBJECTIVE,
) -> SearchResult:
    """Search `space` and write everything to the folder `directory`.

    Args:
        space: what to search.
        directory: folder of the study; must be new, unless `resume`.
        yaml_text: the search-space file as it was given.
        fixed: what `--set` added to it.
        resume: go on with the study in `directory`.
        objective: `package.module:function` that every trial runs.

    Raises:
        ConfigError: the study exists and `resume` is false, or does not fit to `space` and it is true.
        ResourceError: the device of the trials does not exist.
    """
    directory = directory.resolve()
    if not resume:
        make_room(directory)
    study = SearchStudy.resume(directory, space) if resume else None
    if console().is_terminal:
        console().print("starting Ray, which takes a few seconds")
    try:
        with quiet_ray(space) as scratch:
            sharers = _sharers(space)
            if study is None:
                study = SearchStudy.create(directory, space, yaml_text, fixed or {})
            _write_environment(directory)
            with Display(space.name, space.trials, list(space.search), told=study.told) as display:
                driver = Driver(
                    study,
                    space,
                    objective=objective,
                    sharers=sharers,
                    request_stop=request_stop_by_file,
                    display=display,
                )
                with _interruptible(driver):
                    _fit(driver, space, scratch)
            # while Ray still runs: nothing that goes wrong in its shutdown can cost the report
            return SearchResult(directory, write_all(directory), driver.ending, study.missing)
    except BaseException:
        if study is not None:
            write_data(directory)
        raise
    finally:
        if study is not None:
            study.close()


class _StudySearcher(Searcher):
    """Ray's view of the driver. Ray's own OptunaSearch cannot set constraints, and tells failures as FAIL."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._driver.done:
            return str(Searcher.FINISHED)
        task = self._driver.next_task()
        if task is None:
            return None
        self._numbers[trial_id] = task.number
        return {"task": asdict(task)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "ended" not in result:
            progress = json.loads(result["progress"]) if "progress" in result else None
            self._driver.heard(self._numbers[trial_id], progress)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result and "ended" in result:
            ended = Ended(**json.loads(result["ended"]))
        else:
            ended = Ended("crashed", "the process that watched over it died")
        self._driver.ended(self._numbers[trial_id], ended)
        if self._driver.ending == INTERRUPTED and self._driver.idle:
            # A signal to the whole process group ends Ray's server too: the next call of Ray then waits for it and
            # aborts this process. So the page is written before that call.
            write_html(self._driver.study.directory)

    def save(self, checkpoint_path: str) -> None:
        """The journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal has it all."""


def _fit(driver: Driver, space: Space, scratch: Path) -> None:
    resources = {"cpu": 1, "gpu": 1} if space.device != "cpu" else {"cpu": 1}
    tune.run(
        TrialRunner,
        name=space.name,
        storage_path=str(scratch / "tune"),
        resources_per_trial=resources,
        num_samples=-1,  # the driver says when it is enough
        search_alg=_StudySearcher(driver),
        reuse_actors=True,
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        raise_on_failed_trial=False,
        verbose=0,
    )


@contextlib.contextmanager
def quiet_ray(space: Space) -> Iterator[Path]:
    """Ray without its output. Yields a folder for its files, which is removed at the end.

    Ray that runs already in this process is used and left running.
    """
    _remove_left_scratch()
    # a short path: sockets in it must have less than 108 characters
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    ours = not ray.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ours:
                ray.init(
                    address="local",
                    num_cpus=max(space.resources.concurrent_trials or 1, os.cpu_count() or 1),
                    object_store_memory=100 * 1024**2,  # nothing large travels through it
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(scratch),
                )
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            yield scratch
    finally:
        if ours:
            gc.collect()  # a Ray object that is collected after the shutdown ends the process
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_left_scratch() -> None:
    """Remove the folders of searches that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        pid = folder.name.removeprefix(SCRATCH_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _sharers(space: Space) -> int:
    """Trials at once, now that Ray knows the machine. Ray itself would wait for ever for a GPU that is not there."""
    wanted = space.resources.concurrent_trials
    if space.device == "cpu":
        return wanted or 1
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus < (wanted or 1):
        raise ResourceError(
            f"device {space.device}: the trials need {wanted or 1} GPU{'s' if (wanted or 1) > 1 else ''}, but Ray sees "
            f"{gpus or 'none'} here. Put `device: cpu` under fixed, or see what `acmds-tune doctor` says"
        )
    return wanted or gpus


@contextlib.contextmanager
def _interruptible(driver: Driver) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the running trial and the search in order; the second ends it at once."""

    def handle(number: int, frame: object) -> None:
        if driver.ending == INTERRUPTED:
            raise KeyboardInterrupt
        driver.interrupt()
        console().print("ending the running trial; press Ctrl-C again to stop at once")

    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_environment(directory: Path) -> None:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("acmds", "torch", "torchvision", "ray", "optuna", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "resources": {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")},
        "accelerators": [key for key in ray.cluster_resources() if key.startswith("accelerator_type:")],
    }
    (directory / "environment.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
