"""One trial in its own process: every way it can end, and that it never outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acmds_tune import child
from acmds_tune.child import Task, TrialProcess
from acmds_tune.objective import Ended, read_outcome

ROOT = Path(__file__).resolve().parent.parent
SOON_S = 20.0
"""A limit for what takes a fraction of a second, on a machine that is busy with other things."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., TrialProcess]]:
    started: list[TrialProcess] = []

    def begin(objective: str, **options: Any) -> TrialProcess:
        task = Task(
            number=7,
            seed=5,
            settings=options.pop("settings", {"lr": 0.01}),
            directory=str(tmp_path / "0007"),
            objective=f"tests.fake_objectives:{objective}",
            import_path=[str(ROOT)],
            **options,
        )
        started.append(TrialProcess(task))
        return started[-1]

    yield begin
    for trial in started:
        if trial.ended is None:
            trial.kill()


def end_of(trial: TrialProcess) -> Ended:
    deadline = time.monotonic() + SOON_S
    while trial.ended is None:
        assert time.monotonic() < deadline, "the trial did not end"
        trial.poll(0.5)
    return trial.ended


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("objective", "status", "reason", "steps"),
    [
        ("ok", "ok", "finished", 10),
        ("raises", "error", "ValueError: the data are broken", 2),
        ("out_of_memory", "oom", "nothing fits; lower min_batch_size", 3),
        ("exits", "crashed", "its process ended with exit code 3 and without a result", 4),
        ("is_killed", "crashed", "its process was killed by SIGKILL", None),
        ("missing", "error", "is not an importable function", None),
    ],
)
def test_every_end_has_its_status_its_reason_and_what_was_measured(
    start: Callable[..., TrialProcess], tmp_path: Path, objective: str, status: str, reason: str, steps: int | None
) -> None:
    trial = start(objective)
    ended = end_of(trial)
    assert ended.status == status
    assert reason in ended.reason
    assert ended.figures.get("steps") == steps
    assert ended.seconds > 0
    assert read_outcome(tmp_path / "0007") == ended
    assert not is_alive(trial.pid)


def test_out_of_memory_for_good_counts_as_an_event_beside_the_last_measured_figures(
    start: Callable[..., TrialProcess],
) -> None:
    figures = end_of(start("out_of_memory")).figures
    assert figures == {"samples_per_second": 300.0, "oom_events": 1, "train_loss": pytest.approx(2 / 3), "steps": 3}


def test_a_trial_that_says_nothing_is_killed_after_the_silence_timeout(start: Callable[..., TrialProcess]) -> None:
    trial = start("hangs", silence_timeout_s=0.3)
    ended = end_of(trial)
    assert (ended.status, ended.reason) == ("timeout", "gave no sign of progress for 0.3 s")
    assert ended.figures["steps"] == 5
    assert not is_alive(trial.pid)


def test_a_trial_that_takes_too_long_is_killed_although_it_reports(start: Callable[..., TrialProcess]) -> None:
    ended = end_of(start("goes_on", trial_timeout_s=0.5, silence_timeout_s=30.0))
    assert (ended.status, ended.reason) == ("timeout", "had not ended after 0.5 s")
    assert ended.figures["steps"] > 1


def test_a_trial_that_is_asked_to_stop_ends_itself_with_whole_figures(start: Callable[..., TrialProcess]) -> None:
    trial = start("goes_on")
    wait_until(lambda: trial.poll(0.1) is not None)
    trial.stop("enough")
    ended = end_of(trial)
    assert (ended.status, ended.reason) == ("stopped", "enough")
    assert ended.figures["val_accuracy"] == 0.9


def test_a_trial_that_does_not_stop_is_killed_after_the_grace(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STOP_GRACE_S", 0.2)
    trial = start("hangs")
    wait_until(lambda: trial.poll(0.1) is not None)
    trial.stop("enough")
    assert (end_of(trial).status, is_alive(trial.pid)) == ("stopped", False)


def test_killing_a_trial_ends_the_processes_that_it_started(start: Callable[..., TrialProcess], tmp_path: Path) -> None:
    trial = start("starts_a_worker")
    wait_until(lambda: trial.poll(0.1) is not None)
    worker = int((tmp_path / "0007" / "worker.pid").read_text(encoding="utf-8"))
    assert is_alive(worker)
    trial.kill()
    wait_until(lambda: not is_alive(worker))


def test_what_a_trial_prints_goes_to_its_log_and_nowhere_else(
    start: Callable[..., TrialProcess], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    end_of(start("prints"))
    assert "to stdout\nto stderr\n" in (tmp_path / "0007" / "log.txt").read_text(encoding="utf-8")
    assert "std" not in "".join(capfd.readouterr())


def test_a_trial_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "from acmds_tune import child\n"
        f"task = child.Task(0, 0, {{}}, {str(tmp_path)!r}, 'tests.fake_objectives:hangs')\n"
        "trial = child.TrialProcess(task)\n"
        "while trial.poll(1.0) is None: pass\n"
        "print(trial.pid, flush=True)\n"
        "trial.poll(1000.0)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        trial = int(parent.stdout.readline())
        assert is_alive(trial)
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(trial))
    finally:
        parent.kill()
        parent.wait()
