"""Is this machine ready? One line a check: ok, warn (works, but perhaps not as wanted) or fail."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "ray", "optuna", "pydantic", "pandas", "plotly", "scikit-learn", "torchmetrics")
"""Distributions that a search needs."""

TRIAL_LIMIT_S = 120.0
"""The training run of the check takes a few seconds; a machine on which it takes this long is not usable."""


@dataclass(frozen=True)
class Finding:
    """What one check found. `level` is ok, warn or fail."""

    level: str
    text: str


def examine() -> int:
    """Make every check and print its line. Returns 1 if one failed, else 0."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("installed", check_packages),
        ("cuda", check_cuda),
        ("trainer on the CPU", check_cpu_training),
        ("trainer on the GPU", check_gpu_training),
        ("optuna journal", check_journal),
        ("ray", check_ray),
    ]
    failed = False
    for name, check in checks:
        for finding in _findings(check):
            failed |= finding.level == "fail"
            print(f"{finding.level:<5} {name}: {finding.text}", flush=True)
    return 1 if failed else 0


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, and the others are still made
        yield Finding("fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def check_packages() -> Iterator[Finding]:
    """Versions of what is installed, and whether it can be imported."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            import_module({"scikit-learn": "sklearn"}.get(package, package))
            found.append(f"{package} {version(package)}")
        except (ImportError, OSError, PackageNotFoundError) as error:
            yield Finding(
                "fail", f"{package} cannot be imported: {error}; install this project again: pip install -e ."
            )
    yield Finding("ok", ", ".join(found))


def check_cuda() -> Iterator[Finding]:
    """Every GPU with its memory; without one, why."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("warn", f"{_why_no_cuda()}; searches need `device: cpu` under fixed")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if properties.major >= 8 else "fp16 only"
        yield Finding(
            "ok",
            f"GPU {index}: {properties.name}, {total / 2**30:.1f} GB, {free / 2**30:.1f} GB free, "
            f"compute capability {properties.major}.{properties.minor} ({bf16}), CUDA {torch.version.cuda}",
        )
        if free < 0.8 * total:
            yield Finding("warn", f"GPU {index}: {(total - free) / 2**30:.1f} GB are held by other processes")


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"no CUDA: torch {torch.__version__} is a build without it; install a CUDA build of PyTorch"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"no CUDA: CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU"
    if not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None:
        return "no CUDA: no NVIDIA driver is installed"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"no CUDA: {' '.join(str(error).split())}"
    return "no CUDA: the driver reports no GPU"


def check_cpu_training() -> Iterator[Finding]:
    """A trial in its own process that must meet an out-of-memory error on the CPU card, and get over it."""
    # 4 MB hold no micro-batch of 128 digits
    settings = {"device": "cpu", "memory_limit_gb": 0.004, "target_headroom_gb": 0.0, "min_batch_size": 128}
    yield from _train(settings, expect_oom=True)


def check_gpu_training() -> Iterator[Finding]:
    """A trial on the first GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        yield from _train({"device": "cuda"}, expect_oom=False)


def _train(settings: dict[str, object], *, expect_oom: bool) -> Iterator[Finding]:
    from acmds_tune.child import Task, TrialProcess

    common = {"model": "small_cnn", "dataset": "digits", "epochs": 1, "max_batch_size": 128, "checkpoint_every": 0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="acmds-doctor-") as folder:
        task = Task(
            0, 0, {**common, **settings}, folder, import_path=[p for p in sys.path if p], trial_timeout_s=TRIAL_LIMIT_S
        )
        trial = TrialProcess(task)
        try:
            while trial.ended is None:
                trial.poll(1.0)
        finally:
            if trial.ended is None:
                trial.kill()
    ended = trial.ended
    if ended.status != "ok":
        yield Finding("fail", f"the training run ended with {ended.status}: {ended.reason}")
        return
    events, recovered = int(ended.figures["oom_events"]), int(ended.figures["oom_recovered"])
    text = (
        f"{ended.figures['steps']} steps forward and backward in a process of its own, "
        f"{events} out-of-memory events, {recovered} recovered, {time.monotonic() - began:.1f} s"
    )
    if recovered != events or (expect_oom and not events):
        yield Finding("fail", f"{text}; expected {'at least one, all' if expect_oom else 'all'} recovered")
    else:
        yield Finding("ok", text)


def check_journal() -> Iterator[Finding]:
    """A study written to a journal file and read back."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="acmds-doctor-") as folder:
        path = str(Path(folder) / "journal.log")
        study = optuna.create_study(study_name="doctor", storage=JournalStorage(JournalFileBackend(path)))
        trial = study.ask()
        study.tell(trial, trial.suggest_float("x", 0.0, 1.0))
        read = optuna.load_study(study_name="doctor", storage=JournalStorage(JournalFileBackend(path)))
        if len(read.trials) != 1:
            yield Finding("fail", f"wrote 1 trial, read {len(read.trials)}")
            return
    yield Finding("ok", f"a trial written and read back, {1000 * (time.monotonic() - began):.0f} ms")


def check_ray() -> Iterator[Finding]:
    """Ray's start and stop, and whether it sees the GPUs that torch sees."""
    import torch

    from acmds_tune.ray_backend import quiet_ray
    from acmds_tune.space import Space

    import ray  # isort: skip - after its environment, which the search sets

    began = time.monotonic()
    with quiet_ray(Space()):
        started = time.monotonic() - began
        gpus = int(ray.cluster_resources().get("GPU", 0))
    stopped = time.monotonic() - began - started
    yield Finding(
        "ok", f"started in {started:.1f} s, stopped in {stopped:.1f} s, sees {gpus} GPU{'s' if gpus != 1 else ''}"
    )
    if gpus != torch.cuda.device_count():
        yield Finding("fail", f"Ray sees {gpus} GPUs, torch {torch.cuda.device_count()}")
