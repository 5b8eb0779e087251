"""One trial in a process of its own, watched from outside. Knows nothing of Ray or Optuna.

The process is forked from a fork server that has torch imported already, so it starts in a fraction of a second, and
whatever the trial leaves behind (a CUDA context, leaked memory, worker processes) goes when it goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from acmds_optimizer.files import replacing
from acmds_tune import host_memory, nvml
from acmds_tune.neighbour import Neighbour, Script
from acmds_tune.objective import (
    DEFAULT_OBJECTIVE,
    Ended,
    evaluate,
    figures_so_far,
    load_objective,
    read_outcome,
    write_outcome,
)

logger = logging.getLogger(__name__)

TRAINER_MODULES = ["torch", "acmds_optimizer.engine.run", "torchmetrics.classification"]
"""Imported once in the fork server, not again in every trial that trains."""

DATASET_MODULES = {"digits": ["sklearn.datasets"]}
"""More of that, for the data sets that need it: 1.6 s a trial."""

STOP_GRACE_S = 20.0
"""Seconds that a trial has for its last step and its files after it is asked to stop."""

STOP_FILE = "stop"
"""In a trial's folder: asks the trial to stop, for the reason that is written in it."""

START_S = 120.0
"""Seconds more that a trial may be silent before its process has begun."""

LOOK_S = 0.1
"""Seconds between looks at the stop file, and at the clock."""

MEASURE_S = 1.0
"""Seconds between readings of host memory and of how busy the GPU is."""

GPU_CLEAN_BYTES = 64 * 2**20
"""A GPU with this much more in use than before the trial counts as clean: neighbours breathe."""

GPU_CLEAN_S, GPU_CALM_S = 10.0, 1.0
"""Seconds to wait at most until a GPU is as it was before the trial, or its memory has stopped falling."""

TO_A_WHOLE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a terminal, `timeout` or a batch system sends to all processes of the search at once."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """What one trial needs to know. Plain values, so that it can travel as JSON."""

    number: int
    seed: int
    settings: Mapping[str, Any]
    directory: str
    """Absolute path of the trial's folder."""

    objective: str = DEFAULT_OBJECTIVE
    working_directory: str = ""
    """Where relative paths of the settings start; empty: wherever the process is."""

    import_path: list[str] = field(default_factory=list)
    """Entries of sys.path of the search, so that the user's own modules are found."""

    sharers: int = 1
    """Trials at once on this machine; each takes its part of the cores."""

    gpu_shared: bool = False
    """Others train on its GPU at the same time, so nobody can tell when that is as it was before."""

    trial_timeout_s: float | None = None
    silence_timeout_s: float | None = None
    neighbour: Sequence[tuple[float, float]] = ()
    """Another process on the card: (share of the trial that is done, GB that it holds from then on)."""

    host_memory_gb: float | None = None
    """Host memory that the trial and its workers may hold; none: as long as the host has some left."""

    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the trial; none: that of the process that starts it."""


class TrialProcess:
    """A running trial. `poll` until `ended` is set; `kill` at any time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.ended: Ended | None = None
        self._progress: dict[str, Any] | None = None
        self._message: Ended | None = None
        self._alive = False
        self._stop_reason = ""
        self._stop_deadline = float("inf")
        self._stop_file = Path(task.directory) / STOP_FILE
        self._kernel_kills = host_memory.kills()
        self._busy_seconds = self._busy_measured = 0.0
        self._started = self._heard = self._measured = time.monotonic()
        # Ray sets 1; torch reads it when the fork server imports it
        os.environ["OMP_NUM_THREADS"] = str(_threads(task.sharers))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preloaded(task))
        self._receive, send = context.Pipe(duplex=False)
        lifeline, self._lifeline = context.Pipe(duplex=False)  # its other end closes when this process ends
        with _main_module_hidden():
            _start_fork_server()
            self._neighbour = _take_neighbour(task)
            self._gpus = _gpus(task)
            self._gpu_bytes = {gpu: nvml.used_bytes(gpu) for gpu in self._gpus if not task.gpu_shared}
            orders = self._neighbour.orders if self._neighbour is not None else None
            arguments = (task, send, lifeline, orders)
            self._process = context.Process(target=_main, args=arguments, name=f"trial-{task.number}")
            self._process.start()  # the first one returns when the fork server has imported torch
        self._began = time.monotonic()
        send.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        """Process id of the trial, which also leads its process group."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def waitables(self) -> list[Any]:
        """What `multiprocessing.connection.wait` returns of once there is news."""
        return [self._receive, self._process.sentinel]

    def poll(self, wait_s: float) -> dict[str, Any] | None:
        """Wait for news, `wait_s` seconds at most. Returns the newest progress report if there is one.

        Sets `ended` once the trial is over and its process gone.
        """
        until = time.monotonic() + wait_s
        news = None
        while self.ended is None and news is None:
            left = until - time.monotonic()
            news = self._look(max(0.0, min(left, LOOK_S)))
            if left <= LOOK_S:
                break
        return news

    def _look(self, wait_s: float) -> dict[str, Any] | None:
        ready = wait(self.waitables, wait_s)
        news = self._drain() if ready else None
        now = time.monotonic()
        if not self._stop_reason and self._stop_file.exists():
            self.stop(self._stop_file.read_text(encoding="utf-8"))
        if self._message is not None:
            self._process.join(STOP_GRACE_S)  # its memory is free only when it is gone
            self._finish(self._message)
        elif self._process.sentinel in ready:
            self._process.join()
            self._finish(self._death())
        elif now > self._stop_deadline:
            self._finish(self._so_far("stopped", self._stop_reason))
        elif self.task.trial_timeout_s is not None and now - self._began > self.task.trial_timeout_s:
            self._finish(self._so_far("timeout", f"had not ended after {self.task.trial_timeout_s:g} s"))
        elif self.task.silence_timeout_s is not None and now - self._heard > self._silence_s:
            self._finish(self._so_far("timeout", f"gave no sign of progress for {self.task.silence_timeout_s:g} s"))
        elif now - self._measured > MEASURE_S:
            self._measure_busy(now)
            reason = self._too_much_host_memory()
            if reason:
                self._finish(self._so_far("host_oom", reason))
        return news

    def _measure_busy(self, now: float) -> None:
        """Count how busy the GPUs are now for all the time since the last reading: PyTorch's import has only one."""
        readings = [busy for gpu in self._gpus if (busy := nvml.busy_fraction(gpu)) is not None]
        if readings:
            self._busy_seconds += (now - self._measured) * sum(readings) / len(readings)
            self._busy_measured += now - self._measured
        self._measured = now

    @property
    def _silence_s(self) -> float:
        """The first trial waits for the fork server, which imports torch: on a busy machine that takes a while."""
        return (self.task.silence_timeout_s or 0.0) + (0.0 if self._alive else START_S)

    def _too_much_host_memory(self) -> str:
        limit = self.task.host_memory_gb
        short = host_memory.is_short()
        if limit is None and not short:
            return ""
        held = host_memory.held_bytes(self.pid) / 2**30
        if limit is not None and held > limit:
            return f"held {held:.2f} GB of host memory, more than resources.host_memory_gb, {limit:g}"
        if short and held > host_memory.MOST_RESERVE_BYTES / 2**30:  # else it is not the one that fills it
            return f"host memory was nearly full, and it held {held:.2f} GB of it; lower num_workers"
        return ""

    def stop(self, reason: str) -> None:
        """Ask the trial to end at its next step; after STOP_GRACE_S it is killed. Its status is then `stopped`."""
        if self._stop_reason or self.ended is not None:
            return
        self._stop_reason = reason
        self._stop_deadline = time.monotonic() + STOP_GRACE_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the trial's process and its workers now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._process.exitcode is None:  # it has not made its own group yet
            self._process.kill()
        self._process.join(STOP_GRACE_S)  # not for ever: a process stuck in a driver cannot be killed
        if self._neighbour is not None:
            _give_back(self.task, self._neighbour)
            self._neighbour = None

    def _drain(self) -> dict[str, Any] | None:
        news = None
        with contextlib.suppress(EOFError, OSError):  # cut off in the middle of a message
            while self._receive.poll():
                kind, content = self._receive.recv()
                self._heard, self._alive = time.monotonic(), True
                if kind == "ended":
                    self._message = content
                elif kind == "progress":
                    known = {key: value for key, value in content.items() if value is not None}
                    self._progress = {**(self._progress or {}), **known}
                    news = content
        return news

    def _death(self) -> Ended:
        told = read_outcome(Path(self.task.directory))
        if told is not None:
            return told
        if self._stop_reason:
            return self._so_far("stopped", self._stop_reason)
        code = self._process.exitcode
        if code == -signal.SIGKILL and host_memory.kills() > self._kernel_kills:
            return self._so_far("host_oom", "the system killed it because host memory was full; lower num_workers")
        if code is not None and code < 0:
            how = f"its process was killed by {signal.Signals(-code).name}"
        else:
            how = f"its process ended with exit code {code} and without a result"
        return self._so_far("crashed", f"{how}; see trials/{self.task.number:04d}/log.txt")

    def _so_far(self, status: str, reason: str) -> Ended:
        return Ended(status, reason, figures_so_far(self._progress))

    def _finish(self, ended: Ended) -> None:
        self._measure_busy(time.monotonic())
        self.kill()
        self._receive.close()
        self._lifeline.close()
        if ended.status == "stopped" and self._stop_reason:
            ended = replace(ended, reason=self._stop_reason)
        if self._busy_measured:
            busy = self._busy_seconds / self._busy_measured
            ended = replace(ended, figures={**ended.figures, "gpu_busy_fraction": busy})
        self._wait_until_clean()
        self.ended = replace(ended, seconds=time.monotonic() - self._started)
        write_outcome(Path(self.task.directory), self.task.number, self.task.seed, self.ended)

    def _wait_until_clean(self) -> None:
        """Wait until the GPU's memory is as it was before the trial: the driver takes a moment to give it back."""
        for gpu, before in self._gpu_bytes.items():
            began = fell = time.monotonic()
            least = nvml.used_bytes(gpu)
            while before is not None and least is not None and least > before + GPU_CLEAN_BYTES:
                now = time.monotonic()
                if now - began > GPU_CLEAN_S or now - fell > GPU_CALM_S:
                    extra = (least - before) / 2**30
                    logger.warning("trial %d: GPU %s has %.2f GB more in use than before", self.task.number, gpu, extra)
                    break
                time.sleep(0.02)
                used = nvml.used_bytes(gpu)
                if used is not None and used < least:
                    least, fell = used, now


def _gpus(task: Task) -> list[str]:
    """The cards that the trial may use."""
    if str(task.settings.get("device", "cuda")) == "cpu":
        return []
    return nvml.visible_devices() if task.visible_devices is None else task.visible_devices.split(",")


_neighbours: dict[tuple[str, str | None], list[Neighbour]] = {}
"""Those that no trial has now, by their device and CUDA_VISIBLE_DEVICES."""


def _place_of(task: Task) -> tuple[str, str | None]:
    return str(task.settings.get("device", "cuda")), task.visible_devices


def _take_neighbour(task: Task) -> Neighbour | None:
    """A cleared one; None where the trial has none, or only the CPU's number."""
    place = _place_of(task)
    if not task.neighbour or place[0] == "cpu":
        return None
    waiting = _neighbours.get(place, [])
    neighbour = waiting.pop() if waiting else Neighbour(*place)
    if neighbour.clear():
        return neighbour
    neighbour.end()  # killed, say; a second one that does not answer is for the trial to tell
    neighbour = Neighbour(*place)
    neighbour.clear()
    return neighbour


def _give_back(task: Task, neighbour: Neighbour) -> None:
    if neighbour.clear():
        _neighbours.setdefault(_place_of(task), []).append(neighbour)
    else:
        neighbour.end()


def request_stop(directory: Path, reason: str) -> None:
    """Ask the trial in `directory` to stop, on whatever machine it runs that shares the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / STOP_FILE) as temporary:
        temporary.write_text(reason, encoding="utf-8")


def _preloaded(task: Task) -> list[str]:
    own = ["acmds_tune.child"]
    if not task.objective.startswith("acmds_tune."):  # whatever it imports might not bear to be forked
        return own
    return [*own, *TRAINER_MODULES, *DATASET_MODULES.get(task.settings.get("dataset", ""), [])]


def _threads(sharers: int) -> int:
    """Threads of one trial: its part of the cores, less one that is left to the search itself.

    With a thread on every core, each parallel loop waits for the one that the search has pushed aside: on 2 cores a
    step of the small CNN then took between 1 and 20 times as long.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // sharers - 1)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the main script (of Ray, of pytest) again in every trial."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_fork_server() -> None:
    """Start the fork server, where none runs, with the signals blocked that are meant for the search.

    It would itself ignore Ctrl-C, but only once it has imported torch, and SIGTERM never: its death is that of every
    trial. It ends when the search does. What it forks has the signals blocked as well, until `_main` has its handlers.
    """
    multiprocessing.resource_tracker.ensure_running()  # before: its start unblocks the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, TO_A_WHOLE_GROUP)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:  # a moment later: whoever presses Ctrl-C does not have to wait for torch
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _main(task: Task, send: Connection, lifeline: Connection, orders: Connection | None = None) -> None:
    """What the trial's process does."""
    with contextlib.suppress(BrokenPipeError):  # the search has given it up already, and the lifeline ends it
        send.send(("alive", None))
    gc.freeze()  # PyTorch's 400,000 objects, through which each collection would look for 0.2 s while the GPU waits
    os.setsid()  # a group of its own: Ctrl-C goes to the search only, and its workers can be ended with it
    _die_with_parent(lifeline)
    stop_asked = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop_asked
        stop_asked = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_A_WHOLE_GROUP)
    directory = Path(task.directory)
    directory.mkdir(parents=True, exist_ok=True)
    _log_to(directory / "log.txt")
    if task.visible_devices is not None:  # before anything here starts CUDA
        os.environ["CUDA_VISIBLE_DEVICES"] = task.visible_devices
    if task.working_directory:
        os.chdir(task.working_directory)
    sys.path[:0] = [entry for entry in task.import_path if entry not in sys.path]
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    script: Script | None = None

    def report(progress: dict[str, Any]) -> None:
        if script is not None:
            script.follow(progress)
        with contextlib.suppress(BrokenPipeError):  # the search is gone, and so will this process be
            send.send(("progress", progress))

    ended: Ended | None = None
    if task.neighbour:
        try:
            script = Script(task.neighbour, task.settings, orders)
        except (EOFError, OSError):
            ended = Ended("error", "the neighbour's process has died, so the trial would have had none")
    try:
        objective = load_objective(task.objective)
    except Exception as error:  # noqa: BLE001 - a module that cannot be imported is an outcome like any other
        ended = Ended("error", f"{type(error).__name__}: {' '.join(str(error).split())}")
    if ended is None:
        ended = evaluate(objective, task.settings, directory, report, lambda: stop_asked)
    write_outcome(directory, task.number, task.seed, ended)
    send.send(("ended", ended))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing that the trial left running may delay the next one


def _die_with_parent(lifeline: Connection) -> None:
    """End this process and its workers when the process that started it ends, or the fork server between them."""

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()  # nothing is ever sent
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os._exit(1)
    with contextlib.suppress(OSError):  # where host memory is full, the trial goes first, not the search
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _log_to(path: Path) -> None:
    """Send all that this process prints or logs to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115 - a descriptor
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115 - a descriptor
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
