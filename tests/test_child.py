"""One trial in its own process: every way it can end, and that it never outlives what started it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from acmds_optimizer.memory.device import BudgetedCpuMemory, occupy_cpu_cards
from acmds_tune import child, host_memory, nvml
from acmds_tune.child import Task, TrialProcess, _preloaded
from acmds_tune.neighbour import PIECE_BYTES, Holder, Neighbour, Script, serve
from acmds_tune.objective import Ended, evaluate, figures_of, figures_so_far, read_outcome

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


def test_an_error_with_the_name_of_a_file_that_is_no_utf_8_is_an_error_like_any_other(tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise ValueError("cannot read \udcff.jpg")  # as os.fsdecode gives it

    ended = evaluate(broken, {}, tmp_path, lambda _: None, lambda: False)
    assert (ended.status, ended.reason) == ("error", "ValueError: cannot read \\udcff.jpg")
    assert "\\udcff.jpg" in (tmp_path / "traceback.txt").read_text(encoding="utf-8")


def test_the_speed_of_a_trial_that_was_stopped_before_its_first_step_was_not_measured() -> None:
    assert figures_of({"samples_per_second": 0.0, "steps": 0, "samples": 0}) == {"steps": 0, "samples": 0}
    assert figures_so_far({"samples_per_second": 0.0, "step": 0, "oom_events": 2}) == {"oom_events": 2, "steps": 0}
    assert figures_of({"samples_per_second": 0.0, "steps": 3}) == {"samples_per_second": 0.0, "steps": 3}
    assert figures_of({"samples_per_second": 5.0, "steps": 0})["samples_per_second"] == 5.0  # of one's own objective


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


def test_the_time_of_a_trial_begins_when_the_fork_server_has_started_it(start: Callable[..., TrialProcess]) -> None:
    end_of(start("ok"))
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # private
    os.kill(server, signal.SIGSTOP)  # as while it imports PyTorch
    threading.Timer(1.0, os.kill, (server, signal.SIGCONT)).start()
    assert end_of(start("ok", trial_timeout_s=0.8)).status == "ok"


def test_a_trial_that_holds_more_host_memory_than_it_may_is_ended(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "MEASURE_S", 0.05)
    ended = end_of(start("eats_host_memory", host_memory_gb=0.19))
    assert ended.status == "host_oom"
    assert ended.reason.endswith("GB of host memory, more than resources.host_memory_gb, 0.19")
    assert ended.figures["steps"] >= 1


def test_where_the_host_runs_short_only_a_trial_that_fills_it_is_ended(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "MEASURE_S", 0.05)
    monkeypatch.setattr(host_memory, "is_short", lambda: True)
    assert end_of(start("ok")).status == "ok"
    monkeypatch.setattr(host_memory, "MOST_RESERVE_BYTES", 100 * 2**20)
    assert "host memory was nearly full" in end_of(start("eats_host_memory")).reason


def test_the_memory_of_a_container_counts_where_it_has_less_than_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "PROC", tmp_path)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    assert host_memory.available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 600 kB\n", encoding="ascii")
    assert host_memory.available_bytes() == (600 * 1024, 1000 * 1024)
    for name, text in (("max", "500000"), ("current", "490000"), ("stat", "file 9\ninactive_file 5000")):
        (tmp_path / f"memory.{name}").write_text(text + "\n", encoding="ascii")
    assert host_memory.available_bytes() == (15000, 500000)
    assert host_memory.is_short()
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert not host_memory.is_short()


def test_a_stop_file_in_its_folder_ends_a_trial(start: Callable[..., TrialProcess], tmp_path: Path) -> None:
    trial = start("goes_on")
    wait_until(lambda: trial.poll(0.1) is not None)
    child.request_stop(tmp_path / "0007", "enough")
    assert (end_of(trial).status, end_of(trial).reason) == ("stopped", "enough")


def test_the_gpu_is_awaited_until_it_is_as_it_was_before_the_trial(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter([1000, 400 * 2**20, 300 * 2**20, 1000])  # before; then the driver gives it back bit by bit
    monkeypatch.setattr(nvml, "visible_devices", lambda: ["0"])
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: next(used))
    monkeypatch.setattr(nvml, "busy_fraction", lambda gpu: 0.5)
    monkeypatch.setattr(child, "MEASURE_S", 0.0)
    trial = start("goes_on")
    wait_until(lambda: trial.poll(0.1) is not None)
    trial.stop("enough")
    assert end_of(trial).figures["gpu_busy_fraction"] == 0.5
    assert next(used, "all read") == "all read"


def test_the_gpu_counts_as_idle_while_the_first_trial_waits_for_pytorch(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        time.sleep(1.5)
        yield

    readings = chain([0.0], repeat(1.0))  # the first one comes when the import is over, and stands for all of it
    monkeypatch.setattr(nvml, "visible_devices", lambda: ["0"])
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: 1000)
    monkeypatch.setattr(nvml, "busy_fraction", lambda gpu: next(readings))
    monkeypatch.setattr(child, "MEASURE_S", 0.05)
    monkeypatch.setattr(child, "_main_module_hidden", slow)
    trial = start("goes_on")
    began = time.monotonic()
    wait_until(lambda: trial.poll(0.05) is not None and time.monotonic() - began > 1.0)
    trial.stop("enough")
    ended = end_of(trial)
    idle = (1.0 - ended.figures["gpu_busy_fraction"]) * ended.seconds
    assert 1.5 <= idle < ended.seconds - 0.5


def test_a_gpu_that_others_use_as_well_is_not_awaited(
    start: Callable[..., TrialProcess], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = iter(range(0, 2**40, 2**30))  # another trial takes more and more of it
    monkeypatch.setattr(nvml, "visible_devices", lambda: ["0"])
    monkeypatch.setattr(nvml, "used_bytes", lambda gpu: next(used))
    monkeypatch.setattr(nvml, "busy_fraction", lambda gpu: 0.5)
    assert end_of(start("ok", gpu_shared=True)).status == "ok"
    assert caplog.text == ""


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


def test_signals_to_the_whole_group_while_the_fork_server_imports_cost_no_trial(tmp_path: Path) -> None:
    # as Ctrl-C in a terminal and `timeout` send them; PyTorch's import takes seconds
    imported = "import os, signal\nos.killpg(0, signal.SIGINT)\nos.killpg(0, signal.SIGTERM)\n"
    (tmp_path / "signals_its_group.py").write_text(imported, encoding="utf-8")
    code = (
        "import signal\n"
        "from acmds_tune import child\n"
        "heard = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, frame: heard.append(number))\n"
        "child._preloaded = lambda task: ['signals_its_group']\n"
        f"task = child.Task(0, 0, {{}}, {str(tmp_path)!r}, 'tests.fake_objectives:ok')\n"
        "trial = child.TrialProcess(task)\n"
        "while trial.ended is None: trial.poll(1.0)\n"
        "print(trial.ended.status, *sorted(map(int, heard)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False,
        start_new_session=True, timeout=60,
    )  # fmt: skip
    assert ended.stdout.split() == ["ok", "2", "15"], ended.stderr


def test_a_trial_that_the_search_gave_up_before_it_began_says_nothing(tmp_path: Path) -> None:
    # the third Ctrl-C, while the fork server imports: it forks the trial all the same
    (tmp_path / "interrupts_its_parent.py").write_text(
        "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\n", encoding="utf-8"
    )
    code = (
        "import signal\n"
        "from acmds_tune import child\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "child._preloaded = lambda task: ['interrupts_its_parent']\n"
        f"task = child.Task(0, 0, {{}}, {str(tmp_path / '0')!r}, 'tests.fake_objectives:hangs')\n"
        "try:\n"
        "    child.TrialProcess(task)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
        f"task = child.Task(1, 0, {{}}, {str(tmp_path / '1')!r}, 'tests.fake_objectives:ok')\n"
        "trial = child.TrialProcess(task)\n"
        "while trial.ended is None: trial.poll(1.0)\n"
        "print(trial.ended.status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.stdout.split(), ended.stderr) == (["interrupted", "ok"], "")


@pytest.fixture
def alone_again() -> Iterator[None]:
    """Cards on the CPU without a neighbour, for the tests after this one."""
    yield
    occupy_cpu_cards(0)


@pytest.mark.usefixtures("alone_again")
def test_a_neighbour_on_the_cpu_card_takes_and_gives_back_as_the_trial_goes_on() -> None:
    card = BudgetedCpuMemory(8 * 2**30)
    script = Script([(0.0, 1.0), (0.5, 3.0), (0.75, 0.0)], {"device": "cpu", "max_seconds": 10.0})
    seen = []
    for progress in (
        {"step": 0, "total_steps": 0},
        {"step": 49, "total_steps": 100},
        {"seconds": 6.0},
        {"seconds": 9.0},
    ):
        script.follow(progress)
        seen.append(card.read().budget_bytes / 2**30)
    assert seen == [7.0, 7.0, 5.0, 8.0]


@pytest.mark.usefixtures("alone_again")
def test_a_neighbour_starts_again_where_the_trial_begins_anew() -> None:
    script = Script([(0.0, 1.0), (0.3, 3.0), (0.6, 2.0)], {"device": "cpu"})
    seen = []
    # the halving baseline: each attempt has a card of its own, and begins with the first step
    for steps in ((1, 70), (1, 20, 30), (1, 65)):
        card = BudgetedCpuMemory(8 * 2**30)
        for step in steps:
            script.follow({"step": step, "total_steps": 100, "seconds": step / 10})
            seen.append(8.0 - card.read().budget_bytes / 2**30)
    assert seen == [1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 2.0]


@pytest.mark.usefixtures("alone_again")
def test_a_neighbour_does_not_go_back_where_only_the_expected_number_of_steps_grows() -> None:
    card = BudgetedCpuMemory(8 * 2**30)
    script = Script([(0.5, 3.0)], {"device": "cpu"})
    for step, total in ((10, 20), (11, 23)):  # 0.5 of it, then 0.48
        script.follow({"step": step, "total_steps": total, "seconds": step / 10})
        assert card.read().budget_bytes == 5 * 2**30


def test_a_neighbour_that_is_to_hold_less_gives_the_rest_back() -> None:
    holder = Holder("cpu")
    for wanted, held in ((5 * PIECE_BYTES, 5), (2 * PIECE_BYTES, 2), (3 * PIECE_BYTES, 3)):
        holder.take(wanted)
        holder.poll()
        assert holder.held_bytes == held * PIECE_BYTES


def test_a_neighbour_process_holds_what_it_is_told_and_ends_with_its_connection() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    held = context.Value("d", 0.0)

    def serve_alone() -> None:
        ours.close()
        serve(theirs, held, "cpu")

    process = context.Process(target=serve_alone, daemon=True)
    process.start()
    theirs.close()
    ours.send(("take", 3 * 2**20))
    wait_until(lambda: held.value == 3 * 2**20)
    ours.send(("leave", 0))
    ours.send(("clear", 0))
    assert [ours.recv(), ours.recv()] == ["leave", "clear"]
    wait_until(lambda: held.value == 0)
    ours.close()
    process.join(SOON_S)
    assert process.exitcode == 0


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, list[Neighbour]]]:
    """Those that wait for a trial; they hold memory of the CPU, for trials that think they have a GPU."""
    waiting: dict[Any, list[Neighbour]] = {}
    monkeypatch.setattr(child, "_neighbours", waiting)
    monkeypatch.setattr(child, "Neighbour", lambda device, visible: Neighbour("cpu", visible))
    yield waiting
    for each in chain.from_iterable(waiting.values()):
        each.end()


BESIDE = {"settings": {"device": "cuda", "memory_limit_gb": 1.0}, "neighbour": [(0.0, 1.0)]}


def test_a_trial_looks_for_garbage_only_in_what_it_makes_itself(start: Callable[..., TrialProcess]) -> None:
    assert end_of(start("counts_frozen_objects")).figures["steps"] > 10_000


def test_one_neighbour_serves_trial_after_trial_also_where_one_is_killed(
    start: Callable[..., TrialProcess], neighbours: dict[Any, list[Neighbour]]
) -> None:
    served = []
    for killed in (False, True, False):
        trial = start("goes_on" if killed else "ok", **BESIDE)
        assert not any(neighbours.values()), "the trial has it"
        if killed:
            while trial.poll(0.1) is None:  # then it has told the neighbour what to hold
                pass
            trial.kill()
        else:
            assert end_of(trial).status == "ok"
        served += neighbours["cuda", None]
    assert len({neighbour.pid for neighbour in served}) == 1
    assert len(served) == 3
    assert is_alive(served[0].pid or 0)


def test_a_neighbour_that_was_killed_is_replaced(
    start: Callable[..., TrialProcess], neighbours: dict[Any, list[Neighbour]]
) -> None:
    assert end_of(start("ok", **BESIDE)).status == "ok"
    [[neighbour]] = neighbours.values()
    os.kill(neighbour.pid or 0, signal.SIGKILL)
    assert end_of(start("ok", **BESIDE)).status == "ok"
    [[another]] = neighbours.values()
    assert another is not neighbour
    assert is_alive(another.pid or 0)


def test_a_trial_whose_neighbour_cannot_live_ends_with_an_error(
    start: Callable[..., TrialProcess], neighbours: dict[Any, list[Neighbour]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "Neighbour", lambda device, visible: Neighbour("no device", visible))
    ended = end_of(start("ok", **BESIDE))
    assert (ended.status, ended.reason) == (
        "error",
        "the neighbour's process has died, so the trial would have had none",
    )
    assert not any(neighbours.values())


def test_the_fork_server_imports_the_trainer_also_where_the_first_trial_is_the_plants_short_runs() -> None:
    def task(objective: str) -> Task:
        return Task(0, 0, {"dataset": "digits"}, "", objective)

    assert {"torch", "sklearn.datasets"} < set(_preloaded(task("acmds_tune.plant:measure")))
    assert _preloaded(task("mine:objective")) == ["acmds_tune.child"]
