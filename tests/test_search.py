"""Searches through the real Ray and the real Optuna, with objectives that do not train."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from acmds_optimizer.errors import ConfigError
from acmds_tune import nvml
from acmds_tune.child import STOP_GRACE_S
from acmds_tune.cli import _conclude, main
from acmds_tune.driver import ALIKE, INTERRUPTED, OUT_OF_TIME, PRUNED, Driver
from acmds_tune.local_backend import devices
from acmds_tune.objective import Ended
from acmds_tune.progress import Display
from acmds_tune.ray_backend import _cpus, _places, _StudySearcher, quiet_ray
from acmds_tune.search import SearchResult, run_search
from acmds_tune.space import ResourceError, Resources, Space
from acmds_tune.space_load import load
from acmds_tune.study import SearchStudy
from tests.fake_objectives import figures
from tests.test_child import is_alive, wait_until

ROOT = Path(__file__).resolve().parent.parent
TEXT = """
seed: 3
trials: 6
fixed: {device: cpu, dataset: digits}
search:
  lr: {low: 0.0001, high: 0.1, log: true}
  batch_policy: {values: [hold, free]}
timeouts: {silence: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with quiet_ray(Space(resources=Resources(concurrent_trials=2))):
        yield


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., SearchResult]:
    (tmp_path / "driver.pid").write_text(str(os.getpid()), encoding="utf-8")

    def run(objective: str, text: str = TEXT, **options: Any) -> SearchResult:
        path = tmp_path / "s.yaml"
        path.write_text(text, encoding="utf-8")
        space = load(path, overrides=options.pop("overrides", None))
        directory = tmp_path / "results" / "s"
        return run_search(space, directory, text, objective=f"tests.fake_objectives:{objective}", **options)

    return run


def table(result: SearchResult) -> pd.DataFrame:
    return pd.read_csv(result.directory / "trials.csv").set_index("trial")


@pytest.mark.parametrize("backend", ["ray", "local"])
def test_every_end_of_a_trial_is_a_row_and_the_search_goes_on(
    search: Callable[..., SearchResult], capfd: pytest.CaptureFixture[str], backend: str
) -> None:
    result = search("mixed", backend=backend)
    rows = table(result)
    assert list(rows.status) == ["ok", "error", "oom", "crashed", "timeout", "ok"]
    assert list(rows.feasible) == [True, False, False, False, False, True]
    assert rows.reason[1] == "ValueError: the data are broken"
    assert list(rows.steps) == [10, 2, 3, 4, 5, 10]
    assert rows.seed.nunique() == 6
    assert (result.ending, result.missing) == ("", 0)
    assert result.best is not None
    assert result.best.number in (0, 5)
    for name in ("study.yaml", "environment.json", "journal.log", "events.csv", "best.json", "report.html"):
        assert (result.directory / name).is_file(), name
    outcome = json.loads((result.directory / "trials" / "0002" / "outcome.json").read_text(encoding="utf-8"))
    assert (outcome["trial"], outcome["status"], outcome["figures"]["oom_events"]) == (2, "oom", 1)
    output, messages = capfd.readouterr()
    assert output == ""
    assert [line.split()[0] for line in messages.splitlines()] == ["trial"] * 6


def test_what_an_objective_says_that_is_no_number_does_not_end_the_search(search: Callable[..., SearchResult]) -> None:
    result = search("junk", overrides={"trials": 2}, backend="local")
    rows = table(result)
    assert list(rows.status) == ["ok", "ok"]
    assert list(rows.samples_per_second) == [5.5, 5.5]
    assert list(rows.steps) == [7, 7]
    assert list(rows.samples) == [0, 0]
    assert rows[["val_loss", "train_loss", "val_accuracy"]].isna().all().all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_figures", "TypeError: figures and progress are mappings of names to numbers, not NoneType"),
        ("unspeakable", "UnspeakableError: UnspeakableError"),
    ],
)
def test_an_objective_that_says_nothing_is_an_error_like_any_other(
    search: Callable[..., SearchResult], name: str, reason: str
) -> None:
    rows = table(search(name, overrides={"trials": 1}, backend="local"))
    assert list(rows.status) == ["error"]
    assert list(rows.reason) == [reason]


def test_a_study_is_never_written_over(search: Callable[..., SearchResult]) -> None:
    before = (search("ok", TEXT.replace("trials: 6", "trials: 1")).directory / "journal.log").read_bytes()
    with pytest.raises(ConfigError, match="add --resume to go on with it, or give another one with --name") as caught:
        search("ok")
    assert caught.value.exit_code == 2
    assert (Path(caught.value.source) / "journal.log").read_bytes() == before


@pytest.mark.parametrize("backend", ["ray", "local"])
def test_ctrl_c_stops_a_search_after_the_running_trial(search: Callable[..., SearchResult], backend: str) -> None:
    result = search("interrupts", backend=backend)
    assert (result.ending, result.interrupted, result.missing) == (INTERRUPTED, True, 4)
    assert list(table(result).status) == ["ok", "ok"]
    assert (result.directory / "report.html").is_file()


def test_ctrl_c_in_the_last_trial_leaves_nothing_to_go_on_with(search: Callable[..., SearchResult]) -> None:
    result = search("interrupts", TEXT.replace("trials: 6", "trials: 2"), backend="local")
    assert (result.ending, result.interrupted, result.missing) == ("", False, 0)


def test_sigterm_ends_the_running_trial_and_a_resumed_search_makes_up_for_it(
    search: Callable[..., SearchResult],
) -> None:
    result = search("terminates")
    rows = table(result)
    assert (result.ending, result.interrupted, result.missing) == (INTERRUPTED, True, 5)
    assert list(rows.status) == ["ok", "stopped"]
    assert rows.reason[1] == INTERRUPTED
    assert (result.directory / "report.html").is_file()
    resumed = search("terminates", resume=True, backend="local")
    rows = table(resumed)
    assert (resumed.ending, resumed.missing) == ("", 0)
    assert list(rows.status) == ["ok", "stopped", "ok", "ok", "ok", "ok", "ok"]
    assert rows["config/lr"][2] == rows["config/lr"][1]
    assert rows["config/lr"].nunique() == 6


def test_a_third_ctrl_c_ends_the_search_at_once_and_still_writes_the_page(
    search: Callable[..., SearchResult],
) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        search("interrupts_thrice", TEXT.replace("silence: 1", "silence: 60"), backend="local")
    assert time.monotonic() - began < STOP_GRACE_S
    result = search("interrupts_thrice", resume=True, backend="local", overrides={"trials": 3})
    rows = table(result)
    assert list(rows.status) == ["ok", "stopped", "ok", "ok"]
    assert rows.reason[1] == INTERRUPTED


def test_sigterm_while_ray_starts_is_like_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), quiet_ray(Space()):
        os.kill(os.getpid(), signal.SIGTERM)  # Ray's own handler would end the process without a word


def test_ctrl_c_while_ray_starts_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def init(**_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        started.append("whole")  # cut off here, the process could end by SIGSEGV

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), quiet_ray(Space()):
        started.append("used")
    assert started == ["whole"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_search_whose_trials_all_fail_alike_is_ended_early_and_says_why(
    search: Callable[..., SearchResult], capsys: pytest.CaptureFixture[str]
) -> None:
    result = search("raises", TEXT.replace("trials: 6", "trials: 30"), backend="local")
    assert list(table(result).status) == ["error"] * ALIKE
    assert result.ending == f"the first {ALIKE} trials all ended alike (error: ValueError: the data are broken)"
    assert (result.best, result.missing) == (None, 25)
    assert _conclude(result, result.directory) == 1
    said = capsys.readouterr().err
    assert f"25 trials are left. Go on with: acmds-tune resume {result.directory}" in said
    assert "under another --name" in said


def test_one_trial_that_ends_well_or_otherwise_shows_that_not_all_fail_alike(
    search: Callable[..., SearchResult],
) -> None:
    assert search("fails_after_the_first", TEXT.replace("trials: 6", "trials: 8"), backend="local").ending == ""


def test_the_local_backend_shares_the_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "visible_devices", lambda: ["2", "3", "5"])
    assert devices(Space(fixed={"device": "cuda"})) == ["2", "3", "5"]
    assert devices(Space(fixed={"device": "cuda"}, resources=Resources(concurrent_trials=2))) == ["2", "3"]
    assert devices(Space(fixed={"device": "cuda"}, resources=Resources(gpus_per_trial=2))) == ["2,3"]
    assert devices(Space(fixed={"device": "cuda"}, resources=Resources(gpus_per_trial=0.5))) == [
        "2",
        "3",
        "5",
        "2",
        "3",
        "5",
    ]
    assert devices(Space(fixed={"device": "cpu"}, resources=Resources(concurrent_trials=2))) == [None, None]
    with pytest.raises(ResourceError, match="need 8 GPUs, but NVIDIA's driver shows 3 here"):
        devices(Space(fixed={"device": "cuda"}, resources=Resources(gpus_per_trial=4, concurrent_trials=2)))


@pytest.mark.parametrize(("each", "gpus", "places"), [(0.4, 2, 4), (0.5, 1, 2), (0.5, 3, 6), (2, 5, 2), (1, 2, 2)])
def test_ray_has_places_for_as_many_trials_as_fit_on_whole_gpus(
    tmp_path: Path, each: float, gpus: int, places: int
) -> None:
    text = TEXT.replace("device: cpu", "device: cuda") + f"resources: {{gpus_per_trial: {each}}}\n"
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    assert _places(load(tmp_path / "s.yaml"), float(gpus)) == places


def test_ray_has_a_cpu_for_each_trial_also_where_gpus_are_shared_by_more_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "visible_devices", lambda: ["0", "1"])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    text = TEXT.replace("device: cpu", "device: cuda") + "resources: {gpus_per_trial: 0.25}\n"
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    space = load(tmp_path / "s.yaml")
    assert _cpus(space) == _places(space, 2.0) == 8


def test_a_trial_runs_where_the_search_was_started_first(
    search: Callable[..., SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = search("says_where_it_is", backend="local", overrides={"trials": 1})
    monkeypatch.chdir(result.directory)
    search("says_where_it_is", backend="local", overrides={"trials": 2}, resume=True)
    assert (result.directory / "trials" / "0001" / "cwd").read_text(encoding="utf-8") == str(tmp_path)


@pytest.mark.parametrize("command", ["resume", "extend"])
def test_a_study_with_an_objective_of_ones_own_is_gone_on_with_by_that_objective(
    search: Callable[..., SearchResult], command: str
) -> None:
    result = search("says_where_it_is", backend="local", overrides={"trials": 1})
    more = "2" if command == "resume" else "+1"
    assert main([command, str(result.directory), "--trials", more, "--backend", "local"]) == 0
    assert list(table(result).status) == ["ok", "ok"]
    assert (result.directory / "trials" / "0001" / "cwd").is_file(), "it is the objective that writes it"


def test_a_study_is_not_gone_on_with_by_another_objective(search: Callable[..., SearchResult]) -> None:
    result = search("ok", backend="local", overrides={"trials": 1})
    with pytest.raises(ConfigError) as caught:
        search("mixed", backend="local", overrides={"trials": 2}, resume=True)
    here = "tests.fake_objectives"
    assert caught.value.problems[0] == f"objective function: {here}:ok in the study, {here}:mixed now"
    assert len(table(result)) == 1


def new_driver(folder: Path, text: str, console: Console | None = None) -> Driver:
    """Of a new study in `folder`."""
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    space = load(folder / "s.yaml")
    study = SearchStudy.create(folder / "s", space, text, {})
    return Driver(study, space, objective="", sharers=1, display=Display("s", 6, [], console=console))


def test_after_ctrl_c_everything_is_written_before_ray_is_called_again(tmp_path: Path) -> None:
    driver = new_driver(tmp_path, TEXT)
    searcher = _StudySearcher(driver)
    for name, ended in (("a", Ended("ok", "finished", figures(), 1.0)), ("b", Ended("stopped", INTERRUPTED, {}, 1.0))):
        searcher.suggest(name)
        assert searcher.suggest("") is None  # as Ray asks at once; the trial need not wait for the files
        if ended.status == "stopped":
            assert (tmp_path / "s" / "best.json").is_file()  # whatever happens to the search from now on
            driver.interrupt(stop=True)
        searcher.on_trial_complete(name, {"ended": json.dumps(asdict(ended))})
    driver.study.close()
    assert list(pd.read_csv(tmp_path / "s" / "trials.csv").status) == ["ok", "stopped"]
    assert (tmp_path / "s" / "report.html").is_file()


def test_the_tables_of_many_short_trials_take_a_tenth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [1000.0], []

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr("acmds_tune.driver.write_data", write)
    monkeypatch.setattr("acmds_tune.driver.time", SimpleNamespace(monotonic=lambda: now[0]))
    driver = new_driver(tmp_path, TEXT.replace("trials: 6", "trials: 20"))
    while (task := driver.next_task()) is not None:
        driver.heard(task.number, None)
        now[0] += 1.0
        driver.ended(task.number, Ended("ok", "finished", figures(), 1.0))
    assert len(written) == 5  # after 1, 6, 11 and 16 of the trials, and at the end
    assert written[-1] == now[0] - 0.5


def test_a_search_whose_trials_are_all_run_did_not_end_for_want_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("acmds_tune.driver.time", SimpleNamespace(monotonic=lambda: now))
    driver = new_driver(tmp_path, TEXT.replace("trials: 6", "trials: 1") + "budget: {minutes: 1}\n")
    task = driver.next_task()
    assert task is not None
    now = 59.0
    driver.ended(task.number, Ended("ok", "finished", figures(), 59.0))
    driver.study.close()
    assert (driver.done, driver.ending) == (True, "")


def test_the_line_of_an_infeasible_trial_says_which_constraint_it_broke(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = new_driver(tmp_path, TEXT + "constraints: [oom_events <= 0]\n", Console(stderr=True))
    task = driver.next_task()
    assert task is not None
    driver.ended(task.number, Ended("ok", "finished", figures(oom_events=3), 1.0))
    driver.study.close()
    assert capsys.readouterr().err.rstrip().endswith("(broke oom_events <= 0 (3))")


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(60, {"what", "headroom", "fraction"}), (80, {"headroom", "fraction"}), (120, set())],
)
def test_a_narrow_terminal_shows_fewer_columns_and_no_value_cut_off(
    width: int, left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(width=width, file=io.StringIO(), force_terminal=True)
    values = {"min_batch_size": 248, "target_headroom_gb": 0.00314, "knee_gain_fraction": 0.2739}
    with Display("s", 20, list(values), console=terminal) as display:
        display.started(0, values, "confirm trial 7")
        display.ended(0, "infeasible", Ended("infeasible", "", figures(), 20.7))
        with terminal.capture() as capture:
            terminal.print(display._render())
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get())
    assert "…" not in shown
    for word in ("trial", "what", "status", "size", "headroom", "fraction", "samples/s", "oom", "loss", "seconds"):
        assert (word in shown.split()) == (word not in left_out)


def test_the_minutes_of_a_search_leave_time_for_its_confirmation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("acmds_tune.driver.time", SimpleNamespace(monotonic=lambda: now))
    text = TEXT.replace("trials: 6", "trials: 99") + "budget: {minutes: 1.7}\nconfirm: {top: 1, seeds: 3}\n"
    driver = new_driver(tmp_path, text)
    while (task := driver.next_task()) is not None:
        now += 10.0
        driver.ended(task.number, Ended("ok", "finished", figures(), 10.0))
    stages = [row.stage for row in driver.study.record().trials]
    driver.study.close()
    assert stages == ["search"] * 7 + ["confirm"] * 3
    assert (driver.done, driver.ending, driver.study.missing) == (True, OUT_OF_TIME, 92)


@pytest.mark.parametrize("anchors", ["", "anchor_every: 4\n"])
def test_the_full_trials_after_short_ones_have_their_time(
    tmp_path: Path, anchors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("acmds_tune.driver.time", SimpleNamespace(monotonic=lambda: now))
    text = TEXT.replace("trials: 6", "trials: 2") + "budget: {seconds: 4, minutes: 0.5}\nscreen: {trials: 99}\n"
    driver = new_driver(tmp_path, text + anchors)
    while (task := driver.next_task()) is not None:
        seconds = task.settings["max_seconds"]  # 1 of a short trial, 4 of a full one
        now += seconds
        driver.ended(task.number, Ended("ok", "finished", figures(), seconds))
    stages = [row.stage for row in driver.study.record().trials]
    driver.study.close()
    # at 22 s one more short one, or anchor among them, would leave less than 2 times 4 s
    assert [stage if stage == "train" else "short" for stage in stages] == ["short"] * 22 + ["train"] * 2
    assert (now, driver.ending) == (30.0, OUT_OF_TIME)


def test_no_full_trial_is_started_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("acmds_tune.driver.time", SimpleNamespace(monotonic=lambda: now))
    text = TEXT.replace("trials: 6", "trials: 4") + "budget: {seconds: 8, minutes: 0.5}\nscreen: {trials: 6}\n"
    driver = new_driver(tmp_path, text)
    while (task := driver.next_task()) is not None:
        seconds = task.settings["max_seconds"]
        now += seconds
        driver.ended(task.number, Ended("ok", "finished", figures(), seconds))
    stages = [row.stage for row in driver.study.record().trials]
    driver.study.close()
    assert stages == ["screen"] * 6 + ["train"] * 2  # 6 times 2 s, 2 times 8 s: the third would end at 36 s
    assert (now, driver.ending) == (28.0, OUT_OF_TIME)


@pytest.mark.parametrize(
    ("status", "reason", "interrupted"),
    [
        ("stopped", "asked to stop", True),  # by the same signal as the search
        ("crashed", "its process was killed by SIGTERM", True),
        ("stopped", PRUNED, False),
        ("ok", "finished", False),
        ("error", "ValueError: the data are broken", False),
    ],
)
def test_a_trial_that_was_ended_by_a_signal_to_all_processes_does_not_count(
    tmp_path: Path, status: str, reason: str, interrupted: bool
) -> None:
    driver = new_driver(tmp_path, TEXT)
    task = driver.next_task()
    assert task is not None
    driver.interrupt(stop=True)
    driver.ended(task.number, Ended(status, reason, figures(), 1.0))
    (row,) = driver.study.record().trials
    assert (row.status, row.interrupted, driver.study.missing) == (status, interrupted, 6 if interrupted else 5)
    driver.study.close()


def test_a_trial_that_crashes_before_anybody_asks_the_search_to_stop_counts(tmp_path: Path) -> None:
    driver = new_driver(tmp_path, TEXT)
    for reason in ("its process was killed by SIGKILL", "asked to stop"):
        task = driver.next_task()
        assert task is not None
        driver.ended(task.number, Ended("crashed" if "killed" in reason else "stopped", reason, figures(), 1.0))
    driver.study.close()
    assert [row.interrupted for row in driver.study.record().trials] == [False, False]


def test_the_display_says_how_far_a_trial_is_that_its_seconds_end() -> None:
    terminal = Console(width=80, file=io.StringIO(), force_terminal=True)
    with Display("s", 2, [], console=terminal) as display:
        display.started(0, {}, max_seconds=8.0)
        display.started(1, {})
        for number in (0, 1):
            display.progressed(number, {"step": 10, "total_steps": 1000, "seconds": 6.0})
        with terminal.capture() as capture:
            terminal.print(display._render())
    assert re.findall(r"running +(\d+)%", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get())) == ["75", "1"]


def test_the_driver_tells_the_display_how_long_a_trial_trains_at_most(tmp_path: Path) -> None:
    driver = new_driver(tmp_path, TEXT + "budget: {seconds: 8}\nscreen: {trials: 6, share: 0.5}\n")
    task = driver.next_task()
    assert task is not None
    driver.heard(task.number, {"step": 1, "total_steps": 1000, "seconds": 3.0})
    assert driver._display._rows[task.number].share == 0.75  # of 4 s
    driver.study.close()


def test_a_trial_whose_watcher_dies_is_crashed_and_the_search_goes_on(search: Callable[..., SearchResult]) -> None:
    rows = table(search("kills_its_actor", TEXT.replace("trials: 6", "trials: 3")))
    assert list(rows.status) == ["ok", "crashed", "ok"]
    assert rows.reason[1] == "the process that watched over it died"
    assert rows.seconds[1] > 0


def test_a_search_stops_when_its_minutes_are_over(search: Callable[..., SearchResult]) -> None:
    result = search("goes_on", TEXT + "budget: {minutes: 0.05}\n", backend="local")
    assert (result.ending, result.missing) == (OUT_OF_TIME, 6)
    rows = table(result)
    assert list(rows.status) == ["stopped"]
    assert rows.reason[0] == OUT_OF_TIME


def test_a_trial_behind_the_others_is_pruned_with_what_it_measured(search: Callable[..., SearchResult]) -> None:
    rows = table(search("ever_worse", TEXT.replace("trials: 6", "trials: 7") + "objective: val_loss\npruner: median\n"))
    assert list(rows.status) == ["ok"] * 6 + ["stopped"]
    assert "pruned" in rows.reason[6]
    assert rows.val_loss[6] == 7.0


@pytest.mark.parametrize("backend", ["ray", "local"])
def test_two_trials_run_at_once_where_that_is_asked_for_and_each_is_started_once(
    search: Callable[..., SearchResult], backend: str
) -> None:
    text = TEXT.replace("silence: 1", "silence: 45") + "resources: {concurrent_trials: 2}\n"
    result = search("meets_another", text, backend=backend)
    assert list(table(result).status) == ["ok"] * 6
    for number in range(6):
        started = result.directory / "trials" / f"{number:04d}" / "started"
        assert started.read_text(encoding="utf-8") == "once\n"


@pytest.mark.parametrize(("backend", "who"), [("ray", "Ray sees"), ("local", "NVIDIA's driver shows")])
def test_a_gpu_that_is_not_there_is_an_error_at_once_and_leaves_no_study(
    search: Callable[..., SearchResult], backend: str, who: str
) -> None:
    began = time.monotonic()
    text = TEXT.replace("device: cpu", "device: cuda").replace("trials: 6", "trials: 1")
    with pytest.raises(ResourceError, match=f"{who} none here"):
        search("ok", text, backend=backend)
    assert time.monotonic() - began < 10


JOINING = """
import sys
from pathlib import Path
from acmds_tune.search import run_search
from acmds_tune.space_load import load
from ray.cluster_utils import Cluster

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1)
try:
    text = (folder / "s.yaml").read_text()
    objective = "tests.fake_objectives:meets_another"
    result = run_search(load(folder / "s.yaml"), folder / "s", text, objective=objective, ray_address=cluster.address)
    print(result.missing, result.directory)
finally:
    cluster.shutdown()
"""


def test_a_search_joins_a_cluster_and_has_trials_at_once_on_its_machines(tmp_path: Path) -> None:
    text = TEXT.replace("silence: 1", "silence: 45").replace("trials: 6", "trials: 2")
    (tmp_path / "s.yaml").write_text(text + "resources: {concurrent_trials: 2}\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-c", JOINING, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert ended.stdout.split() == ["0", str(tmp_path / "s")], ended.stderr
    trials = pd.read_csv(tmp_path / "s" / "trials.csv")
    # each waits for the other, and each of the two machines has a core for one
    assert list(trials.status) == ["ok", "ok"]


def test_a_cluster_that_does_not_answer_is_an_error_and_leaves_no_study(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "acmds_tune.cli",
        "search",
        str(tmp_path / "s.yaml"),
        "--ray-address",
        "127.0.0.1:9",
    ]
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    ended = subprocess.run(
        [*command, "--results-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:9: " in ended.stderr
    assert not (tmp_path / "s").exists()


def test_after_kill_9_of_the_search_nothing_runs_and_it_can_be_resumed(
    search: Callable[..., SearchResult], tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(TEXT, encoding="utf-8")
    directory = tmp_path / "results" / "s"
    code = (
        "import pathlib\n"
        "from acmds_tune.search import run_search\n"
        "from acmds_tune.space_load import load\n"
        f"path = pathlib.Path({str(tmp_path / 's.yaml')!r})\n"
        f"run_search(load(path), pathlib.Path({str(directory)!r}), path.read_text(),\n"
        "           objective='tests.fake_objectives:waits_as_the_third')\n"
    )
    running = directory / "trials" / "0002" / "log.txt"
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 150
        while not running.exists():
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.05)
        trial = next(int(path.name) for path in Path("/proc").glob("[0-9]*") if _logs_to(path, running))
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        wait_until(lambda: not is_alive(trial))
    finally:
        driver.kill()
        driver.wait()
    rows = table(search("waits_as_the_third", resume=True, backend="local"))
    assert list(rows.status) == ["ok", "ok", "crashed", "ok", "ok", "ok", "ok"]
    assert rows.reason[2] == "the search was ended while it ran"


def _logs_to(process: Path, path: Path) -> bool:
    try:
        return (process / "fd" / "1").readlink() == path
    except OSError:
        return False
