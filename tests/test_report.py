"""From an Optuna journal to trials.csv, events.csv, best.json and report.html."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import plotly.graph_objects as go
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from acmds_optimizer.config import TrainConfig, read_file, to_dict
from acmds_optimizer.engine import columns
from acmds_optimizer.errors import ConfigError
from acmds_tune import report, report_figures, report_html, report_text, storage
from acmds_tune.columns import EVENT_COLUMNS, STATUSES, trial_columns, with_current_tables
from acmds_tune.records import StudyRecord, choose_best, pareto_front, why_no_best, worst_first

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "max_batch_size": IntDistribution(4, 256),
    "pid_kp": FloatDistribution(0.01, 1.0),
    "direction": CategoricalDistribution(["none", "easy"]),
    "gradient_checkpointing": CategoricalDistribution([True, False]),
}
SOMETIMES = {"lr": FloatDistribution(1e-6, 1.0, log=True)}
SPEED: tuple[dict[str, Any], ...] = ({"name": "samples_per_second", "direction": "maximize"},)
PARETO = (*SPEED, {"name": "val_loss", "direction": "minimize"})
MEASURED = {
    "oom_recovered": 0,
    "alloc_retries": 1,
    "peak_reserved_gb": 9.25,
    "headroom_min_gb": 2.75,
    "headroom_breach_fraction": 0.0,
    "batch_size_mean": 30.5,
    "train_loss": 1.5,
    "val_loss": 1.25,
    "val_accuracy": 0.5,
    "steps": 100,
    "samples": 6400,
    "seconds": 12.5,
}


class Study:
    """A study in a folder, as the search writes it."""

    def __init__(self, folder: Path, objectives: tuple[dict[str, Any], ...] = SPEED, name: str = "demo") -> None:
        self.folder, self.objectives = folder, objectives
        folder.mkdir(exist_ok=True)
        self.study = optuna.create_study(
            study_name=name,
            storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
            directions=[objective["direction"] for objective in objectives],
        )
        about = {
            "name": name,
            "objectives": list(objectives),
            "constraints": ["oom_events <= 0"],
            "parameters": list(SPACE),
            "yaml": f"name: {name}\n",
            "created": "2026-01-02T03:04:05+00:00",
        }
        self.study.set_user_attr("acmds", about)
        (folder / "environment.json").write_text('{"gpu": "RTX 3090", "versions": {"torch": "2.15.0"}}')

    def add(
        self,
        speed: float | None = 100.0,
        oom_events: int = 0,
        status: str = "ok",
        state: TrialState = TrialState.COMPLETE,
        reason: str = "",
        searched: Mapping[str, Any] | None = None,
        **figures: Any,
    ) -> int:
        """One trial; without `speed` one that measured nothing. Returns its number."""
        number = len(self.study.trials)
        values: dict[str, Any] = {
            "max_batch_size": 32,
            "pid_kp": 0.25,
            "direction": "none",
            "gradient_checkpointing": False,
        }
        values.update(searched or {})
        seed = 1000 + number
        attrs: dict[str, Any] = {"seed": seed, "config": to_dict(TrainConfig(**values, seed=seed))}
        if state.is_finished():
            attrs |= {"status": status, "reason": reason, "constraints": [oom_events if status == "ok" else 1.0]}
        if speed is not None:
            attrs |= {**MEASURED, "samples_per_second": speed, "oom_events": oom_events, **figures}
        told = [attrs.get(objective["name"]) or 0.0 for objective in self.objectives]
        self.study.add_trial(
            create_trial(
                state=state,
                params=values,
                distributions={name: (SPACE | SOMETIMES)[name] for name in values},
                values=told if state == TrialState.COMPLETE else None,
                user_attrs=attrs,
            )
        )
        return number

    def add_files(self, number: int, steps: int = 40, oom_steps: tuple[int, ...] = ()) -> None:
        """steps.csv and events.csv of a trial, with the columns that the trainer writes."""
        folder = report.trial_dir(self.folder, number)
        folder.mkdir(parents=True)
        row = dict.fromkeys(columns.STEP_COLUMNS, 1.0) | {
            "budget_gb": 10.0,
            "target_headroom_gb": 2.0,
            "reason": "hold",
        }
        rows = [{**row, "step": step, "micro_batch": 16, "peak_allocated_gb": 5 + step % 7} for step in range(steps)]
        pd.DataFrame(rows).to_csv(folder / "steps.csv", index=False)
        event = dict.fromkeys(columns.EVENT_COLUMNS, 1) | {
            "kind": "out_of_memory",
            "recovered": True,
            "message": "a, b",
        }
        events = [{**event, "step": step} for step in oom_steps]
        pd.DataFrame(events, columns=list(columns.EVENT_COLUMNS)).to_csv(folder / "events.csv", index=False)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "demo")


@pytest.fixture
def mixed(study: Study) -> Study:
    """A trial of every kind; number 4 is the best that is feasible."""
    study.add(100.0)
    study.add(900.0, oom_events=3)
    study.add(None, status="crashed", reason="killed by signal 9")
    study.add(950.0, status="stopped", reason="pruned")
    study.add(300.0, searched={"direction": "easy", "gradient_checkpointing": True, "max_batch_size": 64})
    study.add(None, status="oom", reason="does not fit\nat micro-batch 1")
    study.add(None, state=TrialState.RUNNING)
    return study


def trials_table(study: Study) -> pd.DataFrame:
    report.write_tables(study.folder)
    return pd.read_csv(study.folder / "trials.csv")


# --- tables


def test_every_started_trial_is_a_row_whatever_became_of_it(mixed: Study) -> None:
    table = trials_table(mixed)
    assert table.status.tolist() == ["ok", "infeasible", "crashed", "stopped", "ok", "oom", "running"]
    assert table.trial.tolist() == list(range(7))
    assert table.columns.tolist() == trial_columns(list(SPACE))


def test_a_trial_that_waits_to_be_started_is_no_row(study: Study) -> None:
    study.add(100.0)
    study.study.enqueue_trial({"max_batch_size": 8})
    assert len(trials_table(study)) == 1


def test_pandas_reads_the_right_types_without_arguments(mixed: Study) -> None:
    types = {name: str(dtype) for name, dtype in trials_table(mixed).dtypes.items()}
    whole = [
        "trial",
        "oom_events",
        "oom_recovered",
        "alloc_retries",
        "steps",
        "samples",
        "seed",
        "config/max_batch_size",
    ]
    assert {name for name, dtype in types.items() if dtype == "int64"} == set(whole)
    assert {name for name, dtype in types.items() if dtype == "bool"} == {"feasible", "config/gradient_checkpointing"}
    words = ["stage", "status", "reason", "config/direction"]
    assert {types[name] for name in words} <= {"str", "object"}  # pandas 3 and pandas 2
    assert {types[name] for name in types if name not in [*whole, *words]} == {"bool", "float64"}


def test_a_trial_that_measured_nothing_has_empty_measurements_and_counts_of_zero(mixed: Study) -> None:
    row = trials_table(mixed).iloc[2]
    assert pd.isna(row.samples_per_second)
    assert row.oom_events == 0
    assert not row.feasible
    assert row.reason == "killed by signal 9"


def test_a_trial_out_of_memory_for_good_counts_at_least_one_event_and_its_reason_is_one_line(mixed: Study) -> None:
    row = trials_table(mixed).iloc[5]
    assert row.oom_events == 1
    assert row.reason == "does not fit at micro-batch 1"


def test_reasons_are_text_also_where_all_trials_are_ok(study: Study) -> None:
    study.add()
    assert trials_table(study).reason.tolist() == ["finished"]


def test_a_setting_that_was_not_searched_in_a_trial_has_the_value_it_was_run_with(study: Study) -> None:
    config = to_dict(TrainConfig(max_batch_size=48))
    study.study.add_trial(create_trial(value=1.0, user_attrs={"status": "ok", "config": config}))
    assert trials_table(study)["config/max_batch_size"].tolist() == [48]


def test_events_of_all_trials_are_in_one_table_and_a_line_cut_off_is_left_out(mixed: Study) -> None:
    mixed.add_files(1, oom_steps=(5, 7))
    mixed.add_files(2, oom_steps=(3,))
    path = report.trial_dir(mixed.folder, 2) / "events.csv"
    path.write_text(path.read_text() + "9,1,3.5,out_of_")
    report.write_tables(mixed.folder)
    events = pd.read_csv(mixed.folder / "events.csv")
    assert events[["trial", "step"]].to_numpy().tolist() == [[1, 5], [1, 7], [2, 3]]
    assert events.recovered.dtype == bool
    assert events.columns.tolist() == [column.name for column in EVENT_COLUMNS]


@pytest.mark.parametrize(
    "line",
    [
        "a,0,1,x,4,4,1,1,0,0,true,m",
        "inf,0,1,x,4,4,1,1,0,0,true,m",
        "1,0,1,x,4,4,y,1,0,0,true,m",
        '1,0,1,x,4,4,1,1,0,0,true,"' + 200_000 * "m",
    ],
)
def test_a_line_of_events_that_cannot_be_read_is_left_out_and_costs_no_table(line: str, tmp_path: Path) -> None:
    names = [column.name for column in EVENT_COLUMNS if column.name != "trial"]
    good = "7,0,1.5,out_of_memory,8,4,1.0,1.0,0.1,1,true,m"
    folder = report.trial_dir(tmp_path, 0)
    folder.mkdir(parents=True)
    (folder / "events.csv").write_text("\n".join([",".join(names), good, line]) + "\n", encoding="utf-8")
    assert [event["step"] for event in report.read_events(tmp_path, 0)] == [7]


def test_events_cut_off_within_a_letter_do_not_cost_the_table(study: Study) -> None:
    study.add(100.0)
    columns = [column.name for column in EVENT_COLUMNS if column.name != "trial"]
    row = ["1", "0", "0.5", "note", *["0"] * (len(columns) - 5), "é"]
    folder = report.trial_dir(study.folder, 0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_bytes(f"{','.join(columns)}\n{','.join(row)}".encode()[:-1])
    (event,) = report.read_events(study.folder, 0)
    assert (event["step"], event["kind"]) == (1, "note")


def test_a_failure_while_writing_leaves_the_old_file(mixed: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trials_table(mixed)
    mixed.add(1.0)

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report.write_tables(mixed.folder)
    pd.testing.assert_frame_equal(pd.read_csv(mixed.folder / "trials.csv"), before)
    assert not list(mixed.folder.glob(".*.tmp"))


def test_a_folder_without_a_study_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no journal"):
        report.write_tables(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the best


def test_the_best_is_feasible_though_others_are_faster(mixed: Study) -> None:
    best = choose_best(report.load_study(mixed.folder))
    assert best is not None
    assert best.number == 4


def test_with_two_objectives_the_best_is_nearest_to_the_ideal_point(tmp_path: Path) -> None:
    study = Study(tmp_path / "demo", PARETO)
    study.add(100.0, val_loss=1.0)
    study.add(200.0, val_loss=2.0)
    study.add(180.0, val_loss=1.2)  # 0.2 from the best in each of two
    study.add(150.0, val_loss=1.9)  # beaten by the one before
    best = choose_best(report.load_study(study.folder))
    assert best is not None
    assert best.number == 2


def test_of_two_trials_at_the_ends_of_the_front_the_first_objective_decides(tmp_path: Path) -> None:
    study = Study(tmp_path / "demo", PARETO)
    study.add(100.0, val_loss=1.0)
    study.add(200.0, val_loss=2.0)
    best = choose_best(report.load_study(study.folder))
    assert best is not None
    assert best.number == 1


def test_the_front_is_what_no_other_point_beats() -> None:
    assert pareto_front([(1, 4), (2, 2), (3, 3), (4, 1), (2, 2), (5, 1)]) == [0, 1, 3, 4]


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_front_of_many_points_is_that_of_every_pair_compared(objectives: int) -> None:
    rng = random.Random(objectives)
    points = [tuple(rng.randrange(6) for _ in range(objectives)) for _ in range(60)]

    def beats(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    slow = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert pareto_front(points) == slow


def test_the_worst_trials_are_those_with_most_errors_then_the_slowest(study: Study) -> None:
    for speed, errors in ((100.0, 0), (50.0, 2), (20.0, 2), (10.0, 0)):
        study.add(speed, oom_events=errors)
    assert [trial.number for trial in worst_first(report.load_study(study.folder).trials)] == [2, 1, 3, 0]


def test_best_json_is_read_by_the_trainer_as_the_settings_of_the_trial(mixed: Study) -> None:
    best = report.write_best(mixed.folder)
    assert best is not None
    path = mixed.folder / "best.json"
    assert TrainConfig(**read_file(path)) == TrainConfig(
        max_batch_size=64, pid_kp=0.25, direction="easy", gradient_checkpointing=True, seed=1004
    )
    about = json.loads(path.read_text())["acmds_study"]
    assert about["trial"] == 4
    assert about["objectives"] == {"samples_per_second": {"direction": "maximize", "value": 300.0}}
    assert about["figures"]["oom_events"] == 0
    assert about["versions"] == {"torch": "2.15.0"}


def test_without_a_feasible_trial_there_is_no_best_json_and_the_log_says_why(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    study.add(100.0, oom_events=2)
    study.add(None, status="crashed")
    assert report.write_best(study.folder) is None
    assert not (study.folder / "best.json").exists()
    assert "1 infeasible, 1 crashed" in caplog.text
    assert "oom_events <= 0" in caplog.text


def test_the_hint_about_memory_is_given_only_where_memory_was_the_reason(study: Study) -> None:
    study.add(100.0, oom_events=2)
    record = report.load_study(study.folder)
    assert "max_batch_size" in why_no_best(record)
    accuracy = replace(record, constraints=["val_accuracy >= 0.99"])
    text = why_no_best(accuracy)
    assert "broke the constraint val_accuracy >= 0.99" in text
    assert "max_batch_size" not in text


def test_trials_without_a_value_of_an_objective_are_counted_among_the_reasons(tmp_path: Path) -> None:
    study = Study(tmp_path / "demo", PARETO)
    study.add(100.0, val_loss=None, status="infeasible")
    study.add(120.0, val_loss=None, status="infeasible")
    study.add(None, status="crashed")
    text = why_no_best(report.load_study(study.folder))
    assert text.startswith("None of 3 trials is feasible: 2 infeasible, 1 crashed. 2 have no val_loss.")


def test_a_study_of_which_only_the_plant_has_run_has_no_best_because_nothing_was_searched(study: Study) -> None:
    study.add(100.0)
    record = report.load_study(study.folder)
    plant = replace(record.trials[0], stage="plant")
    assert why_no_best(replace(record, trials=[plant])) == "No trial of the search was started."


# --- the page


def test_the_page_loads_nothing_from_elsewhere_and_is_under_two_megabytes(mixed: Study) -> None:
    mixed.add_files(4)
    mixed.add_files(1, steps=5000, oom_steps=(5, 4000))
    page = report.write_html(mixed.folder).read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", page.split('<script id="library"')[0])
    assert page.count("<script") == page.count("</script>") == 3
    assert set(re.findall(r'class="plot" id="(\w+)"', page)) == {
        "oom",
        "pareto",
        "history",
        "slices",
        "steps_best",
        "steps_worst",
    }
    assert f"acmds-train --config {mixed.folder.parent.name}/demo/best.json" in page


def test_the_page_of_thousands_of_trials_with_many_settings_is_under_two_megabytes(mixed: Study) -> None:
    record, draw = report.load_study(mixed.folder), random.Random(0)
    best, names = next(trial for trial in record.trials if trial.feasible), [f"setting_{k}" for k in range(30)]
    trials = [
        replace(
            best,
            number=number,
            config={**best.config, **{name: draw.random() for name in names}},
            figures={**best.figures, "samples_per_second": draw.random(), "val_loss": draw.random()},
        )
        for number in range(3000)
    ]
    page = report_html.page(replace(record, trials=trials, searched=names), mixed.folder, {}, {})
    assert len(page.encode()) < 2_000_000


def test_the_journal_is_read_once_for_all_that_is_written(mixed: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    opened = storage.open_study

    def counted(folder: Path) -> optuna.Study:
        read.append(folder)
        return opened(folder)

    monkeypatch.setattr(storage, "open_study", counted)
    report.write_all(mixed.folder)
    assert read == [mixed.folder]


def test_text_of_the_user_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>{{library}}"
    study = Study(tmp_path / "demo", name=evil)
    study.add(100.0)
    study.add(None, status="error", reason=evil)
    page = report.write_html(study.folder).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;{{library}}") >= 3


@pytest.mark.parametrize("kind", ["no trial", "one trial", "one running", "none feasible"])
def test_a_study_with_little_in_it_has_a_page(study: Study, kind: str) -> None:
    if kind == "one trial":
        study.add()
    elif kind == "one running":
        study.add(None, state=TrialState.RUNNING)
    elif kind == "none feasible":
        study.add(None, status="crashed", reason="killed")
        study.add(50.0, oom_events=1)
    best = report.write_all(study.folder)
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert (best is not None) == (kind == "one trial")
    if kind == "none feasible":
        assert "None of 2 trials is feasible" in page
    assert "Needs 10 trials" in page


def test_importances_are_shares_for_each_objective_from_ten_trials_on(tmp_path: Path) -> None:
    study = Study(tmp_path / "demo", PARETO)
    for number in range(9):
        study.add(10.0 * number, searched={"max_batch_size": 8 + 10 * number, "pid_kp": 0.1 + (number * 7 % 9) / 10})
    assert report.importances(study.folder) == {}
    study.add(100.0, searched={"max_batch_size": 100})
    shares = report.importances(study.folder)
    assert list(shares) == ["samples_per_second", "val_loss"]
    assert sum(shares["samples_per_second"].values()) == pytest.approx(1.0)
    assert max(shares["samples_per_second"], key=shares["samples_per_second"].__getitem__) == "max_batch_size"


def test_what_the_sampler_settled_on_early_still_has_its_share(tmp_path: Path) -> None:
    # as a search on an H200 was: one choice is a third faster, so it is tried most of the time; the rest does nothing
    study, rng = Study(tmp_path / "demo"), random.Random(0)
    for number in range(30):
        slow = number % 6 == 1
        nothing = {"max_batch_size": rng.randint(4, 256), "pid_kp": rng.uniform(0.01, 1.0)}
        speed = (4320.0 if slow else 5700.0) + rng.gauss(0.0, 15.0)
        study.add(speed, searched={"gradient_checkpointing": slow, **nothing})
    assert report.importances(study.folder)["samples_per_second"]["gradient_checkpointing"] > 0.9


def test_importances_where_a_setting_does_not_always_apply_and_where_no_trial_differs(tmp_path: Path) -> None:
    study = Study(tmp_path / "demo", PARETO)
    for number in range(12):
        where = {"lr": 10.0 ** -(1 + number % 5)} if number % 2 else {}
        study.add(100.0 + 50.0 * (number % 2), searched={"gradient_checkpointing": bool(number % 2), **where})
    study.add(float("inf"))  # of a study from elsewhere
    shares = report.importances(study.folder)
    assert shares["samples_per_second"]["gradient_checkpointing"] > shares["samples_per_second"]["lr"]
    assert set(shares["val_loss"].values()) == {0.0}


def test_all_plots_are_valid_plotly_figures(mixed: Study) -> None:
    mixed.add_files(4, oom_steps=(3,))
    record = report.load_study(mixed.folder)
    marked = {"best": record.trials[4]}
    steps = report_html.read_steps(mixed.folder, 4)
    assert steps is not None
    drawn = [
        report_figures.throughput_against_oom(record, marked),
        report_figures.pareto(record, marked),
        report_figures.history(record, marked),
        report_figures.slices(record, {})[0],
        report_figures.importance({"samples_per_second": {"lr": 0.75, "pid_kp": 0.25}}),
        report_figures.memory_over_steps(steps, report.read_events(mixed.folder, 4), 12.0),
    ]
    for figure in drawn:
        assert go.Figure(figure).data  # raises for a property that plotly does not know


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (
            1e-4,
            1e-1,
            {1e-4: "10<sup>-4</sup>", 1e-3: "10<sup>-3</sup>", 1e-2: "10<sup>-2</sup>", 0.1: "10<sup>-1</sup>"},
        ),
        (1.2e-4, 8e-2, {0.001: "0.001", 0.01: "0.01"}),
        (1.1e-3, 9e-2, {0.003: "0.003", 0.03: "0.03"}),  # 0.01 alone would say nothing of the scale
        (1.1e-6, 9e-5, {3e-6: "3×10<sup>-6</sup>", 3e-5: "3×10<sup>-5</sup>"}),
        (8, 512, {10.0: "10", 100.0: "100"}),
        (1e-6, 1.0, {1e-6: "10<sup>-6</sup>", 1e-4: "10<sup>-4</sup>", 0.01: "10<sup>-2</sup>", 1.0: "10<sup>0</sup>"}),
    ],
)
def test_a_logarithmic_axis_has_two_to_four_marks_that_do_not_run_into_each_other(
    low: float, high: float, marks: dict[float, str]
) -> None:
    axis = report_figures.log_axis(low, high)
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True)) == marks


def test_slices_over_decades_have_a_logarithmic_axis_with_marks_that_can_be_read(study: Study) -> None:
    for power in range(4):
        study.add(100.0 + power, searched={"lr": 10.0 ** (power - 4)})
    record = replace(report.load_study(study.folder), searched=["lr"])
    figure, _ = report_figures.slices(record, {})
    assert figure is not None
    axis = figure["layout"]["xaxis"]
    assert (axis["type"], axis["tickvals"]) == ("log", [1e-4, 1e-3, 1e-2, 1e-1])
    assert go.Figure(figure).data


def test_a_setting_drawn_evenly_has_a_linear_slice_however_far_it_spreads(study: Study) -> None:
    for power in range(3):
        study.add(100.0 + power, searched={"pid_kp": 10.0 ** (power - 2)})
    figure, _ = report_figures.slices(replace(report.load_study(study.folder), searched=["pid_kp"]), {})
    assert figure is not None
    assert "type" not in figure["layout"]["xaxis"]


def test_speed_is_drawn_against_the_validation_loss_even_where_no_trial_is_feasible(study: Study) -> None:
    for speed in (90.0, 100.0):
        study.add(speed, oom_events=1, val_loss=0.5, peak_reserved_gb=6.0)
    figure = report_figures.pareto(report.load_study(study.folder), {})
    assert figure is not None
    assert figure["data"][0]["y"] == [0.5, 0.5]


def test_speed_without_a_validation_loss_is_drawn_against_memory(study: Study) -> None:
    for speed, memory in ((90.0, 6.0), (100.0, 8.0), (110.0, 9.0), (100.0, 9.5)):
        study.add(speed, val_loss=None, peak_reserved_gb=memory)
    front = report_figures.pareto(report.load_study(study.folder), {})
    assert front is not None
    assert (front["data"][0]["x"], front["data"][0]["y"]) == ([90.0, 100.0, 110.0], [6.0, 8.0, 9.0])
    assert "GB" in front["layout"]["yaxis"]["title"]["text"]


def baseline_study(study: Study, confirmed: bool) -> StudyRecord:
    """A trial of the search, fixed batches of which the second is the best, halving, and perhaps confirmations."""
    rows = [
        ("search", "", 200.0), ("baseline", "halving", 90.0), ("baseline", "fixed batch 64", 110.0),
        ("baseline", "fixed batch 32", 120.0), ("baseline", "fixed batch 16", 100.0),
    ]  # fmt: skip
    if confirmed:
        rows += [("confirm", "trial 0", 190.0), ("confirm", "fixed batch 32", 115.0), ("confirm", "default", 105.0)]
    for _, _, speed in rows:
        study.add(speed)
    record = report.load_study(study.folder)
    trials = [replace(t, stage=s, label=what) for t, (s, what, _) in zip(record.trials, rows, strict=True)]
    return replace(record, trials=trials)


@pytest.mark.parametrize("confirmed", [False, True])
def test_the_lines_of_the_history_are_the_means_of_the_confirmed_baselines_else_the_best_fixed_batch(
    study: Study, confirmed: bool
) -> None:
    record = baseline_study(study, confirmed)
    page: dict[str, Any] = {}
    lines = report_figures.baseline_values(record)
    report_html.comparisons(replace(record, trials=record.trials[:5]), {}, {}, page, lines)
    dashed = {each["name"]: each["y"][0] for each in page["history"]["data"] if each["mode"] == "lines"}
    del dashed["best so far"]
    means = {"fixed batch 32": 115.0, "default": 105.0, "halving": 90.0}
    assert dashed == (means if confirmed else {"fixed batch 32": 120.0, "halving": 90.0})


def test_of_bad_trials_only_those_the_sampler_proposed_and_that_ended_are_said_to_be_told_to_it(mixed: Study) -> None:
    record = report.load_study(mixed.folder)
    told = "The sampler is told that those it proposed are bad"
    assert told in report_text.bad_ends(record)
    crashed = record.trials[2]
    other = [replace(crashed, stage="baseline", label="halving"), replace(crashed, interrupted=True)]
    words = report_text.bad_ends(replace(record, trials=other))
    assert told not in words
    assert "<td>baseline halving<td>crashed" in words
    assert "<td>crashed, interrupted<td>" in words


def test_slices_say_what_they_leave_out_and_keep_what_matters_most(mixed: Study) -> None:
    record = report.load_study(mixed.folder)
    names = [f"setting_{number}" for number in range(15)]
    trials = [replace(record.trials[0], number=number, config=dict.fromkeys(names, number)) for number in range(1000)]
    few = replace(record, trials=trials[:20], searched=names[:3])
    assert report_figures.slices(few, {})[1] == ""
    figure, left_out = report_figures.slices(replace(record, trials=trials, searched=names), {"setting_14": 0.9})
    assert figure is not None
    assert figure["layout"]["xaxis"]["title"]["text"] == "setting_14"
    assert left_out == " Drawn are the 12 settings with the largest importance. One trial of 2 is drawn."


def test_only_feasible_trials_are_on_the_front_and_in_the_best_so_far(mixed: Study) -> None:
    record = report.load_study(mixed.folder)
    front, history = report_figures.pareto(record, {}), report_figures.history(record, {})
    assert front is not None
    assert front["data"][0]["x"] == [300.0]
    assert history is not None
    assert (history["data"][0]["x"], history["data"][0]["y"]) == ([0, 4, 6], [100.0, 300.0, 300.0])


@pytest.mark.parametrize(
    ("batches", "ticks"),
    [
        ([128, 66, 90], [66, 128]),
        ([75, 250, 80], [75, 128, 250]),
        ([4, 512], [4, 8, 32, 128, 512]),
        ([64, 64], [64]),
        ([1, 2, 3], [1, 3]),
    ],
)
def test_the_axis_of_micro_batches_has_its_ends_and_powers_of_two_between(batches, ticks) -> None:
    assert report_figures.batch_ticks(batches) == ticks


def test_thinning_keeps_the_ends_the_steps_asked_for_and_the_highest_peak() -> None:
    steps = pd.DataFrame({"step": range(10_000), "peak_allocated_gb": 1.0})
    steps.loc[7777, "peak_allocated_gb"] = 9.0
    thin = report_figures.thinned(steps, keep=[1234, 4321])
    assert len(thin) <= 2000
    assert {0, 1234, 4321, 7777, 9999} <= set(thin.step)
    assert thin.step.is_monotonic_increasing


def test_a_broken_step_file_costs_the_plot_and_not_the_page(study: Study) -> None:
    study.add()
    folder = report.trial_dir(study.folder, 0)
    folder.mkdir(parents=True)
    (folder / "steps.csv").write_bytes(b"\x00\xff not a table")
    assert "No trial left step records" in report.write_html(study.folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ["0,inf,1,1,1,1", "inf,4,1,1,1,1", "0,4,1e999,1,1,1", "0,4,1,1,1,1"])
def test_a_number_without_end_in_the_records_of_a_trial_does_not_cost_the_page(study: Study, row: str) -> None:
    study.add()
    folder = report.trial_dir(study.folder, 0)
    folder.mkdir(parents=True)
    head = "step,micro_batch,peak_allocated_gb,reserved_gb,budget_gb,target_headroom_gb"
    (folder / "steps.csv").write_text(f"{head}\n1,4,1,1,1,1\n{row}\n", encoding="utf-8")
    names = [column.name for column in EVENT_COLUMNS if column.name != "trial"]
    event = "1,0,1.5,out_of_memory,8,4,inf,1.0,0.1,1,true,m"
    (folder / "events.csv").write_text(f"{','.join(names)}\n{event}\n", encoding="utf-8")
    assert report.read_events(study.folder, 0)[0]["budget_gb"] == ""
    assert report.write_html(study.folder).is_file()


def test_only_the_worker_of_the_maps_is_taken_out_of_the_plot_library() -> None:
    assert report_html.without_maps(r"a='var t1=Object;\'x\'';b='c'") == "a='';b='c'"
    assert report_html.without_maps("a='other'") == "a='other'"


# --- columns


def test_the_tables_in_the_documentation_are_current() -> None:
    text = (Path(__file__).parent.parent / "docs" / "reports.md").read_text(encoding="utf-8")
    assert with_current_tables(text) == text, "run: python -m acmds_tune.columns docs/reports.md"
    assert all(f"`{status}`" in text for status in STATUSES)


@pytest.mark.parametrize("line", [b'{"op_code": 0, "worker_id"', b"\xff\xfe", b"[1]", b'{"op_code": 4}'])
def test_a_journal_that_is_damaged_before_its_end_is_named(tmp_path, line):
    (tmp_path / "journal.log").write_bytes(line + b'\n{"op_code": 0}\n{"op_code": 0}\n')
    with pytest.raises(ConfigError, match=r"journal\.log: 1 problem\n  is damaged: a line is not what was written"):
        report.load_study(tmp_path)
