"""The backend that runs trials with Ray Tune, on this machine or on a cluster.

The study's journal is the truth; Ray keeps nothing that is read again. Its own files go to a temporary folder.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from acmds_tune import nvml
from acmds_tune.driver import INTERRUPTED, Driver
from acmds_tune.objective import Ended
from acmds_tune.report import write_html
from acmds_tune.space import ResourceError, Space

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

from acmds_tune.trainable import TrialRunner  # noqa: E402

logger = logging.getLogger(__name__)

SCRATCH_PREFIX = "acmds-ray-"
"""Of the temporary folder for Ray's files; the process id comes next."""


class RayBackend:
    """Trials as Ray sees them. Use `opened`.

    Attributes:
        places: trials at once.
        resources: what Ray sees of the machines.
    """

    def __init__(self, space: Space, scratch: Path) -> None:
        found = ray.cluster_resources()
        self.resources = {key: value for key, value in found.items() if key in ("CPU", "GPU")}
        self.resources |= {key: value for key, value in found.items() if key.startswith("accelerator_type:")}
        self.places = _places(space, float(found.get("GPU", 0)))
        self._space = space
        self._scratch = scratch

    def run(self, driver: Driver) -> None:
        """Run trials until the driver has enough."""
        _fit(driver, self._space, self._scratch)


@contextlib.contextmanager
def opened(space: Space, address: str | None = None) -> Iterator[RayBackend]:
    """Ray, started here or joined at `address`.

    Raises:
        ResourceError: the trials need GPUs that are not there.
    """
    if address is None and not ray.is_initialized() and space.device != "cpu" and not nvml.visible_devices():
        _places(space, 0)  # Ray asks the same library, but only after seconds
    with quiet_ray(space, address) as scratch:
        yield RayBackend(space, scratch)


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
            self._driver.heard(self._numbers[trial_id], _progress(result))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result and "ended" in result:
            ended = Ended(**json.loads(result["ended"]))
        else:
            ended = Ended("crashed", "the process that watched over it died")
        self._driver.ended(self._numbers[trial_id], ended, _progress(result or {}))
        if self._driver.ending == INTERRUPTED and self._driver.idle:
            # A signal to the whole process group ends Ray's server too: the next call of Ray then waits for it and
            # aborts this process. So the page is written before that call.
            write_html(self._driver.study.directory)

    def save(self, checkpoint_path: str) -> None:
        """The journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """The journal has it all."""


def _progress(result: dict[str, Any]) -> dict[str, Any] | None:
    return json.loads(result["progress"]) if "progress" in result else None


def _fit(driver: Driver, space: Space, scratch: Path) -> None:
    gpus = space.resources.gpus_per_trial
    resources = {"cpu": 1, "gpu": gpus} if space.device != "cpu" else {"cpu": 1}
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
def quiet_ray(space: Space, address: str | None = None) -> Iterator[Path]:
    """Ray without its output. Yields a folder for its files, which is removed at the end.

    Ray that runs already in this process is used and left running. `address` joins a cluster instead of starting one.
    """
    _remove_left_scratch()
    # a short path: sockets in it must have less than 108 characters
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    ours = not ray.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ours and address is not None:
                _check_answers(address)
                try:
                    with _ctrl_c_afterwards():
                        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise _no_cluster(address, str(error)) from None
            elif ours:
                with _ctrl_c_afterwards():
                    ray.init(
                        address="local",
                        num_cpus=_cpus(space),
                        object_store_memory=100 * 1024**2,  # nothing large travels through it
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=str(scratch),
                    )
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            yield scratch
    except SystemExit:  # Ray's own answer to SIGTERM, from its start on
        raise KeyboardInterrupt from None
    finally:
        if ours:
            gc.collect()  # a Ray object that is collected after the shutdown ends the process
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back while Ray starts, a second or two: a start that is cut off can end the process by SIGSEGV.

    The second one is not held back.
    """
    asked = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, hold) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _check_answers(address: str) -> None:
    """Ray itself ends this process, after half a minute, where nobody answers."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # auto
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, why: str) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address}: {' '.join(why.split())[:200]}")


def _remove_left_scratch() -> None:
    """Remove the folders of searches that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        pid = folder.name.removeprefix(SCRATCH_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _cpus(space: Space) -> int:
    """At least one for each trial: so many Ray counts for it, and would let the others wait for one."""
    gpus = len(nvml.visible_devices()) if space.device != "cpu" else 0
    return max(space.resources.concurrent_trials or 1, os.cpu_count() or 1, int(gpus / space.resources.gpus_per_trial))


def _places(space: Space, gpus: float) -> int:
    """Trials at once. Ray itself would wait for ever for a GPU that is not there."""
    wanted = space.resources.concurrent_trials
    if space.device == "cpu":
        return wanted or 1
    each = space.resources.gpus_per_trial
    fit = int(gpus) * int(1 / each + 1e-6) if each < 1 else int(gpus / each + 1e-6)  # no trial has parts of two
    if fit < (wanted or 1):
        needed = (wanted or 1) * each
        raise ResourceError(
            f"device {space.device}: the trials need {needed:g} GPU{'s' if needed > 1 else ''}, but Ray sees "
            f"{gpus or 'none'} here. Put `device: cpu` under fixed, or see what `acmds-tune doctor` says"
        )
    return wanted or fit
