"""What a study starts next: the search, its promotion, baselines, anchors and confirmation; and what may be tried."""

from __future__ import annotations

import csv
import json
import random
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.errors import ConfigError, OutOfMemoryForGoodError
from acmds_tune.baselines import halving
from acmds_tune.commands import status
from acmds_tune.journal import JOURNAL
from acmds_tune.objective import Ended
from acmds_tune.plant import (
    PLANT_FILE,
    WARM_STEPS,
    Plant,
    agreement,
    fit,
    measure,
    read_plant,
    runs_to_measure,
    simulate,
    sizes_to_measure,
)
from acmds_tune.prescreen import best_on_plant
from acmds_tune.records import (
    Objective,
    StudyRecord,
    TrialRecord,
    against_baselines,
    busy_share,
    choose_best,
    confirmations,
    ranked,
    remarks,
    rule_of_choice,
)
from acmds_tune.report import load_study, write_all, write_data
from acmds_tune.report_text import anchor_drift, confirmation, default_trial, plant_words, tiles
from acmds_tune.requires import draw, nearest_allowed, parse_requirement
from acmds_tune.samplers import contains
from acmds_tune.space import Space
from acmds_tune.space_load import load
from acmds_tune.stages import MOST_TRIES, Sample, Wait, best_fixed, default_values, next_fixed_batch, next_step, planned
from acmds_tune.study import Proposal, SearchStudy
from acmds_tune.warm_start import best_settings, usable_trials
from tests.fake_objectives import figures

TEXT = """
trials: 4
fixed: {device: cpu, dataset: digits, model: small_cnn}
search:
  max_batch_size: {low: 16, high: 256, log: true}
  lr: {low: 0.0001, high: 0.1, log: true}
"""


@pytest.fixture
def space(tmp_path: Path) -> Callable[[str], Space]:
    def make(text: str) -> Space:
        (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "s.yaml")

    return make


@pytest.fixture
def run(tmp_path: Path, space: Callable[[str], Space]) -> Callable[..., tuple[SearchStudy, list[Proposal]]]:
    """Run a whole study; `end` says how each trial ends."""

    def whole(text: str, end: Callable[[Proposal], Ended], name: str = "s") -> tuple[SearchStudy, list[Proposal]]:
        study = SearchStudy.create(tmp_path / name, space(text), text, {})
        started = []
        while study.missing:
            proposal = study.propose()
            started.append(proposal)
            study.finish(proposal.number, end(proposal))
        study.close()
        return study, started

    return whole


def speed_of_lr(proposal: Proposal) -> Ended:
    """Fastest at lr 0.01; 1 slower for each unit of the seed's last digit."""
    return Ended("ok", "finished", figures(proposal.settings["lr"]), 1.0)


def fits_64(proposal: Proposal) -> Ended:
    """Batches up to 64 keep the headroom; larger is faster."""
    batch = proposal.settings["max_batch_size"]
    made = {"samples_per_second": float(batch), "oom_events": int(batch > 64), "batch_size_mean": float(batch)}
    return Ended("ok", "finished", figures() | made, 1.0)


def test_without_stages_only_the_search_runs(run: Callable[..., Any]) -> None:
    study, started = run(TEXT, speed_of_lr)
    assert [(each.stage, each.label) for each in started] == [("search", "default"), *[("search", "")] * 3]
    assert study.next_step() is None


def test_the_best_of_short_trials_are_trained_in_full_with_their_own_seeds_and_the_default_with_them(
    run: Callable[..., Any],
) -> None:
    text = TEXT.replace("trials: 4", "trials: 3") + "screen: {trials: 8, share: 0.25}\nbudget: {steps: 100}\n"
    _, started = run(text, speed_of_lr)
    screened, trained = started[:8], started[8:]
    assert {each.settings["max_steps"] for each in screened} == {25}
    assert {each.settings["max_steps"] for each in trained} == {100}
    assert [each.stage for each in trained] == ["train"] * 3
    best_first = sorted(screened, key=lambda each: abs(each.values["lr"] - 0.01))
    others = [each for each in best_first if each.number][:2]
    assert [each.label for each in trained] == ["default", *(f"trial {each.number}" for each in others)]
    assert [each.values for each in trained[1:]] == [each.values for each in others]
    assert [each.seed for each in trained[1:]] == [each.seed for each in others]


def test_the_defaults_are_trained_in_full_also_where_their_first_short_trial_was_interrupted(
    space: Callable[[str], Space], tmp_path: Path
) -> None:
    text = TEXT.replace("trials: 4", "trials: 2") + "screen: {trials: 4}\nanchor_every: 3\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    for proposal in reversed([study.propose(), study.propose()]):  # side by side
        study.finish(proposal.number, Ended("stopped", "the search was interrupted"), interrupted=True)
    while study.missing:
        proposal = study.propose()
        study.finish(proposal.number, speed_of_lr(proposal))
    rows = study.record()
    (default,) = [row for row in rows.of_stages(("screen",)) if row.label == "default" and not row.interrupted]
    assert default.number == 3
    first = rows.of_stages(("train",))[0]
    assert (first.label, first.seed, first.config["lr"]) == ("default", default.seed, default.config["lr"])
    assert [row.seed for row in rows.of_stages(("anchor",))] == [default.seed]


def test_the_best_short_trial_stays_the_best_until_one_has_ended_that_had_the_whole_budget(
    space: Callable[[str], Space], tmp_path: Path
) -> None:
    text = TEXT.replace("trials: 4", "trials: 1") + "screen: {trials: 3}\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    for _ in range(3):
        proposal = study.propose()
        study.finish(proposal.number, speed_of_lr(proposal))
    best = choose_best(study.record())
    assert best is not None
    number = study.propose().number
    assert choose_best(study.record()) == best
    study.finish(number, Ended("stopped", "the search was interrupted"), interrupted=True)
    assert choose_best(study.record()) == best
    proposal = study.propose()
    study.finish(proposal.number, speed_of_lr(proposal))
    trained = choose_best(study.record())
    assert trained is not None
    assert (proposal.stage, trained.number) == ("train", proposal.number)


def test_an_anchor_that_is_interrupted_each_time_is_passed_over_and_the_later_ones_are_run(
    space: Callable[[str], Space], tmp_path: Path
) -> None:
    text = TEXT.replace("trials: 4", "trials: 7") + "anchor_every: 2\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    stages = []
    while study.missing:
        proposal = study.propose()
        stages.append(proposal.stage)
        interrupted = stages.count("anchor") <= MOST_TRIES and proposal.stage == "anchor"
        ended = Ended("stopped", "the search was interrupted") if interrupted else speed_of_lr(proposal)
        study.finish(proposal.number, ended, interrupted=interrupted)
    assert stages == [
        *["search"] * 3,
        *["anchor"] * MOST_TRIES,
        "search",
        "search",
        "anchor",
        "search",
        "search",
        "anchor",
    ]


def test_the_best_is_a_trial_with_the_whole_budget_never_a_short_one(run: Callable[..., Any]) -> None:
    study, _ = run(TEXT.replace("trials: 4", "trials: 2") + "screen: {trials: 5}\n", speed_of_lr)
    best = choose_best(load_study(study.directory))
    assert best is not None
    assert best.stage == "train"


def test_fixed_batches_are_halved_until_a_feasible_one_is_worse_than_the_one_before(run: Callable[..., Any]) -> None:
    _, started = run(TEXT + "baselines: [default, fixed batch]\n", fits_64)
    fixed = [each for each in started if each.stage == "baseline"]
    assert [each.label for each in fixed] == [f"fixed batch {size}" for size in (256, 128, 64, 32)]
    assert [each.settings["min_batch_size"] for each in fixed] == [256, 128, 64, 32]
    assert {each.settings["effective_batch_size"] for each in fixed} == {256, 128, 64}
    assert len({each.seed for each in fixed}) == 1


def test_fixed_batches_are_halved_down_to_1_until_one_is_feasible_and_where_none_is_the_page_and_the_log_say_so(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def end(proposal: Proposal, feasible: int) -> Ended:
        fits = proposal.stage != "baseline" or proposal.settings["max_batch_size"] <= feasible
        return Ended("ok", "finished", figures(oom_events=int(not fits)) | {"batch_size_mean": None}, 1.0)

    text = TEXT.replace("high: 256", "high: 1024") + "baselines: [fixed batch]\n"
    _, started = run(text, lambda proposal: end(proposal, 2), "small")
    sizes = [1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert [each.label for each in started[4:]] == [f"fixed batch {size}" for size in sizes]
    study, started = run(text, lambda proposal: end(proposal, 0), "none")
    assert [each.label for each in started[4:]] == [f"fixed batch {size}" for size in sizes]
    said = "No fixed batch that was tried (1024 to 1) was feasible, so there is none to compare with."
    record = study.record()
    assert remarks(record) == [said]
    assert said in confirmation(record, choose_best(record))
    write_all(study.directory)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("label", "mean", "following"),
    [
        (4096, 1618.0, 1024),  # no more samples in the data set
        (128, 62.23, 64),  # 12 steps of two times 64, and a last one of 41 and 41
        (512, 212.0, 256),  # 3 steps of two times 256, and a last one of 82
        (4096, 53.0, 64),
        (300, 20.0, 16),
        (1024, 809.0, 512),  # a step of 1024 and one of 594: it ran at its size
        (64, None, 32),
    ],
)
def test_after_a_fixed_batch_that_never_ran_at_its_size_comes_the_power_of_two_that_did(
    label: int, mean: float | None, following: int
) -> None:
    row = replace(trial(0, 1.0, "baseline", f"fixed batch {label}"), figures={"batch_size_mean": mean})
    assert next_fixed_batch(study_of(row), [row], label) == following


def test_fixed_batches_that_never_ran_at_their_size_are_not_compared_with_the_next_one(run: Callable[..., Any]) -> None:
    speeds = {4096: 1500.0, 1024: 1400.0, 512: 3000.0, 256: 2900.0}  # 4096 are more than the 1618 samples

    def end(proposal: Proposal) -> Ended:
        batch = proposal.settings["max_batch_size"]
        made = {"samples_per_second": speeds.get(batch, 1.0), "batch_size_mean": min(batch, 1618.0)}
        return Ended("ok", "finished", figures() | made, 1.0)

    study, started = run(TEXT.replace("high: 256", "high: 4096") + "baselines: [fixed batch]\n", end)
    assert [each.label for each in started[4:]] == [f"fixed batch {size}" for size in speeds]
    best = best_fixed(study.record())
    assert best is not None
    assert best.label == "fixed batch 512"


def test_trials_that_share_a_device_are_said_to_be_slower_beside_each_other_where_speed_is_searched_for(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = TEXT + "baselines: [fixed batch]\nconfirm: {top: 1, seeds: 1}\n"
    shared = text + "resources: {concurrent_trials: 3}\n"
    said = "Up to 3 trials at once share a device and slow each other down. Baselines may have had fewer beside them"
    study, _ = run(shared, fits_64, "shared")
    record = study.record()
    assert said in remarks(record)[0]
    assert said in confirmation(record, choose_best(record))
    write_all(study.directory)
    assert said in caplog.text
    assert status(study.directory) == 0
    assert said in capsys.readouterr().out
    assert remarks(run(text, fits_64, "alone")[0].record()) == []
    assert remarks(run(shared + "objective: val_loss\n", fits_64, "loss")[0].record()) == []
    assert remarks(run(shared.replace("baselines: [fixed batch]\n", ""), fits_64, "none")[0].record()) == []


@pytest.mark.parametrize(
    ("lines", "most"),
    [
        ("fixed: {device: cpu}", 1),
        ("fixed: {device: cpu}\nresources: {concurrent_trials: 4}", 4),
        ("resources: {concurrent_trials: 4}", 1),
        ("resources: {gpus_per_trial: 0.3}", 3),
        ("resources: {gpus_per_trial: 0.3, concurrent_trials: 2}", 2),
        ("resources: {gpus_per_trial: 2}", 1),
    ],
)
def test_how_many_trials_share_a_device_follows_from_the_device_and_the_resources(
    space: Callable[[str], Space], lines: str, most: int
) -> None:
    assert space(f"{lines}\nsearch: {{lr: {{low: 0.1, high: 0.2}}}}\n").sharers == most


def test_a_fixed_batch_never_exceeds_an_effective_batch_that_is_asked_for(run: Callable[..., Any]) -> None:
    text = TEXT.replace("small_cnn}", "small_cnn, effective_batch_size: 64}") + "baselines: [fixed batch]\n"
    _, started = run(text, fits_64)
    fixed = [each.settings for each in started if each.stage == "baseline"]
    assert [each["max_batch_size"] for each in fixed] == [64, 32]
    assert {each["effective_batch_size"] for each in fixed} == {64}


def test_halving_on_error_runs_as_an_objective_of_its_own(run: Callable[..., Any]) -> None:
    _, started = run(TEXT + "baselines: [halving]\n", speed_of_lr)
    assert (started[-1].label, started[-1].objective) == ("halving", "acmds_tune.baselines:halving")
    assert started[-1].settings["max_batch_size"] == 256


def test_the_best_trials_and_the_baselines_are_run_again_on_the_same_seeds(run: Callable[..., Any]) -> None:
    text = TEXT + "baselines: [default, fixed batch]\nconfirm: {top: 2, seeds: 3}\n"
    _, started = run(text, speed_of_lr)
    again = [each for each in started if each.stage == "confirm"]
    seeds = {label: [each.seed for each in again if each.label == label] for label in {each.label for each in again}}
    assert len(seeds) == 4
    assert started[-len(again) :] == again
    assert {"default"} < set(seeds)
    assert sum(label.startswith("trial ") for label in seeds) == 2
    assert len({tuple(each) for each in seeds.values()}) == 1
    assert len(set(next(iter(seeds.values())))) == 3


@pytest.mark.parametrize("screen", ["", "screen: {trials: 6}\n"])
def test_the_defaults_are_confirmed_once_where_they_are_among_the_best(run: Callable[..., Any], screen: str) -> None:
    def end(proposal: Proposal) -> Ended:
        return Ended("ok", "finished", figures(0.01 if proposal.label == "default" else 0.001), 1.0)

    study, started = run(TEXT + f"{screen}baselines: [default]\nconfirm: {{top: 2, seeds: 2}}\n", end)
    again = [each.label for each in started if each.stage == "confirm"]
    first = "trial 6" if screen else "trial 0"
    assert again == [first, again[1]] * 2
    assert again[1] != "default"
    found = confirmations(study.record())
    assert found["default"] == found[first]
    assert against_baselines(study.record()) == {"default": 1.0}


def test_the_default_settings_are_run_again_now_and_then_with_the_same_seed(run: Callable[..., Any]) -> None:
    _, started = run(TEXT.replace("trials: 4", "trials: 7") + "anchor_every: 3\n", speed_of_lr)
    assert [each.stage for each in started] == [*(["search"] * 4 + ["anchor"]), *(["search"] * 3 + ["anchor"])]
    assert (started[4].seed, started[4].values) == (started[0].seed, started[0].values)


def test_defaults_that_are_run_again_among_short_trials_are_short_as_well(run: Callable[..., Any]) -> None:
    text = TEXT.replace("trials: 4", "trials: 1") + "screen: {trials: 4, share: 0.25}\nbudget: {steps: 100}\n"
    _, started = run(text + "anchor_every: 3\n", speed_of_lr)
    assert [each.stage for each in started] == [*["screen"] * 4, "anchor", "train"]
    assert [each.settings["max_steps"] for each in started] == [25, 25, 25, 25, 25, 100]


def test_drift_is_told_against_the_run_of_the_defaults_that_was_as_long() -> None:
    def ran(number: int, speed: float, stage: str, samples: int) -> TrialRecord:
        made = trial(number, speed, stage, "default")
        return replace(made, figures={"samples_per_second": speed, "samples": samples})

    screened, trained = ran(0, 100.0, "screen", 400), ran(3, 1000.0, "train", 1600)
    short, long = ran(1, 104.0, "anchor", 400), ran(2, 970.0, "anchor", 1600)
    assert "measured +4.0 %, -3.0 % against" in anchor_drift(study_of(screened, short, long, trained))


def test_later_stages_have_the_settings_of_the_first_trial_and_not_others_that_are_called_the_same(
    run: Callable[..., Any],
) -> None:
    text = """
trials: 2
anchor_every: 1
baselines: [default, halving]
confirm: {top: 1, seeds: 1}
fixed: {device: cpu}
search:
  optimizer: {values: [adamw, sgd]}
  weight_decay: {low: 0.3, high: 0.5, when: {optimizer: sgd}}
  effective_batch_size: {low: 65, high: 256}
"""
    study, _ = run(text, lambda each: Ended("ok", "finished", figures(0.001 if each.label == "default" else 0.01), 1.0))
    names = ["optimizer", "weight_decay"]
    first, *others = [row for row in study.record().trials if row.label in ("default", "halving")]
    assert first.config["weight_decay"] == 0.05, "its condition is not met"
    assert {row.stage for row in others} == {"anchor", "baseline", "confirm"}
    for row in others:
        same = names if row.label == "halving" else [*names, "effective_batch_size"]
        assert [row.config[name] for name in same] == [first.config[name] for name in same]


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_the_sampler_learns_only_from_what_it_proposed(run: Callable[..., Any], sampler: str) -> None:
    text = TEXT.replace("trials: 4", "trials: 8") + f"sampler: {sampler}\n"
    _, alone = run(text, speed_of_lr, "alone")
    _, among = run(text + "anchor_every: 2\nconfirm: {top: 1, seeds: 2}\n", speed_of_lr, "among")
    assert len(among) > len(alone)
    assert [each.values for each in among if each.stage == "search"] == [each.values for each in alone]


def test_optunas_own_readers_see_later_stages_as_ordinary_trials_with_their_settings(run: Callable[..., Any]) -> None:
    text = TEXT + "anchor_every: 2\nbaselines: [fixed batch]\nconfirm: {top: 1, seeds: 2}\n"
    study, started = run(text + "constraints: [oom_events <= 0]\n", fits_64)
    trials = optuna.load_study(study_name="s", storage=study._study._storage).get_trials()
    assert {each.state for each in trials} == {TrialState.COMPLETE}
    assert [each.user_attrs["stage"] for each in trials] == [each.stage for each in started]
    for trial, proposal in zip(trials, started, strict=True):
        assert trial.params == proposal.values
        assert trial.values == [float(proposal.settings["max_batch_size"])]
        assert trial.constraints["0"] == (proposal.settings["max_batch_size"] > 64)


def test_a_later_stage_that_a_kill_cut_off_as_it_began_is_not_taken_for_a_trial_of_the_search(
    tmp_path: Path, space: Callable[[str], Space]
) -> None:
    text = TEXT.replace("trials: 4", "trials: 1") + "confirm: {top: 1, seeds: 1}\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    study.finish(study.propose().number, Ended("ok", "", figures(), 1.0))
    study.propose()
    study.close()
    lines = (tmp_path / "s" / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    begun = max(number for number, line in enumerate(lines) if '"stage":"confirm"' in line)
    (tmp_path / "s" / JOURNAL).write_text("".join(lines[: begun + 1]), encoding="utf-8")
    again = SearchStudy.resume(tmp_path / "s", space(text))
    assert [(row.stage, row.interrupted) for row in again.record().trials] == [("search", False), ("confirm", True)]
    assert again.propose().stage == "confirm"


def test_a_later_stage_waits_for_trials_that_still_run(space: Callable[[str], Space]) -> None:
    asked = space(TEXT.replace("trials: 4", "trials: 2") + "confirm: {top: 1, seeds: 1}\n")
    goals = (Objective("samples_per_second", "maximize"),)
    config = {"lr": 0.01, "max_batch_size": 64}
    one = TrialRecord(0, "ok", "", config=config, values=(1.0,), seed=1)
    study = StudyRecord("s", goals, (), tuple(config), [one])
    assert next_step(asked, study, config) == Sample("search")
    running = TrialRecord(1, "running", "", config=config, seed=2)
    assert next_step(asked, StudyRecord("s", goals, (), tuple(config), [one, running]), config) == Wait()


def test_baselines_run_beside_the_search_one_at_a_time_where_trials_run_side_by_side(
    space: Callable[[str], Space],
) -> None:
    asked = space(TEXT + "baselines: [default, fixed batch]\nconfirm: {top: 1, seeds: 1}\n")
    goals = (Objective("samples_per_second", "maximize"),)
    config = {"lr": 0.01, "max_batch_size": 64}

    def after(*rows: TrialRecord) -> Any:
        return next_step(asked, StudyRecord("s", goals, (), tuple(config), list(rows)), config)

    first = TrialRecord(0, "ok", "", label="default", config=config, values=(1.0,), seed=1)
    running = TrialRecord(1, "running", "", config=config, seed=2)
    assert after(first) == Sample("search")  # one trial at a time: the search comes first
    largest = after(first, running)
    assert (largest.stage, largest.more["max_batch_size"]) == ("baseline", 256)
    fixed = TrialRecord(2, "running", "", stage="baseline", label=largest.label, config=config, seed=1)
    assert after(first, running, fixed) == Sample("search")  # whether the next one is needed, this one tells
    half = after(first, running, replace(fixed, status="ok", values=(2.0,)))
    assert (half.stage, half.more["max_batch_size"]) == ("baseline", 128)
    cut_off = replace(fixed, status="crashed", interrupted=True)
    assert after(first, running, cut_off) == Sample("search")  # it is tried again when the search is over


def test_while_the_last_trials_run_what_is_sure_to_come_is_run_beside_them(space: Callable[[str], Space]) -> None:
    text = TEXT.replace("trials: 4", "trials: 3") + "baselines: [default, fixed batch]\nconfirm: {top: 1, seeds: 1}\n"
    goals = (Objective("samples_per_second", "maximize"),)
    config = {"lr": 0.01, "max_batch_size": 256, "min_batch_size": 256, "effective_batch_size": None}
    default = TrialRecord(0, "ok", "", label="default", config=config, values=(1.0,), seed=1)
    better = TrialRecord(1, "ok", "", config=config, values=(2.0,), seed=2)
    running = TrialRecord(2, "running", "", config=config, seed=3)
    fixed = [
        TrialRecord(3 + place, "ok", "", stage="baseline", label=f"fixed batch {256 >> place}", config=config,
                    values=(1.5 - place,), seed=1)
        for place in range(2)
    ]  # fmt: skip

    def after(*more: TrialRecord, goals: tuple[Objective, ...] = goals) -> Any:
        rows = [default, better, running, *fixed, *more]
        return next_step(space(text), StudyRecord("s", goals, (), tuple(config), rows), config)

    def again(row: TrialRecord, step: Any) -> TrialRecord:
        return replace(row, number=9, stage="confirm", label=step.label, seed=step.seed, values=(1.0,))

    first = after()
    assert (first.stage, first.label) == ("confirm", "default")  # the best is better than it already
    second = after(again(default, first))
    assert (second.stage, second.label) == ("confirm", "fixed batch 256")
    assert after(again(default, first), again(fixed[0], second)) == Wait()  # which trial is best, nobody knows yet
    several = (*goals, Objective("val_loss", "minimize"))
    default, better = replace(default, values=(1.0, 0.5)), replace(better, values=(2.0, 0.6))
    fixed = [replace(row, values=(1.5 - place, 0.5)) for place, row in enumerate(fixed)]
    assert after(goals=several).label == "fixed batch 256"  # the front may still move, and with it what is near it


def test_the_defaults_are_trained_while_the_others_are_screened(space: Callable[[str], Space]) -> None:
    asked = space(TEXT.replace("trials: 4", "trials: 2") + "screen: {trials: 2, share: 0.2}\n")
    goals = (Objective("samples_per_second", "maximize"),)
    config = {"lr": 0.01, "max_batch_size": 64}
    default = TrialRecord(0, "ok", "", stage="screen", label="default", config=config, values=(1.0,), seed=1)
    running = TrialRecord(1, "running", "", stage="screen", config=config, seed=2)

    def after(*rows: TrialRecord) -> Any:
        return next_step(asked, StudyRecord("s", goals, (), tuple(config), list(rows)), config)

    assert after(replace(default, status="running"), running) == Wait()
    step = after(default, running)
    assert (step.stage, step.label) == ("train", "default")
    assert after(default, running, replace(default, number=2, stage="train")) == Wait()


def test_a_resumed_study_goes_on_in_the_stage_where_it_was(tmp_path: Path, space: Callable[[str], Space]) -> None:
    text = TEXT.replace("trials: 4", "trials: 2") + "baselines: [fixed batch]\nconfirm: {top: 1, seeds: 2}\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    started = []
    while study.missing:
        proposal = study.propose()
        started.append((proposal.stage, proposal.label))
        if len(started) % 2:  # every second trial is lost
            study.finish(proposal.number, fits_64(proposal))
        study.close()
        study = SearchStudy.resume(tmp_path / "s", space(text))
    rows = [row for row in study.record().trials if not row.interrupted]
    finished = [(row.stage, row.label) for row in rows]
    assert len(set(zip(finished, [row.seed for row in rows], strict=True))) == len(rows)
    assert [stage for stage, _ in finished].count("search") == 2
    assert [stage for stage, _ in finished].count("confirm") == 4


def study_of(*trials: TrialRecord) -> StudyRecord:
    return StudyRecord("s", (Objective("samples_per_second", "maximize"),), (), ("lr",), trials)


def trial(number: int, value: float, stage: str = "search", label: str = "", status: str = "ok") -> TrialRecord:
    return TrialRecord(number, status, "", values=(value,), stage=stage, label=label)


def test_a_confirmed_best_is_chosen_by_its_mean_over_the_seeds() -> None:
    study = study_of(
        trial(0, 10.0), trial(1, 9.0), trial(2, 8.0),
        trial(3, 5.0, "confirm", "trial 0"), trial(4, 9.0, "confirm", "trial 1"),
        trial(5, 9.0, "confirm", "trial 0"), trial(6, 8.0, "confirm", "trial 1"),
    )  # fmt: skip
    best = choose_best(study)
    assert best is not None
    assert best.number == 1
    found = confirmations(study)["trial 1"]
    assert found.means == (8.5,)
    assert found.deviations is not None
    assert found.deviations[0] == pytest.approx(0.5**0.5)
    assert [each.number for each in ranked(study)] == [0, 1, 2]
    assert [each.number for each in ranked(study, most=2)] == [0, 1]


def test_a_trial_that_is_confirmed_on_the_fewer_seeds_now_asked_for_can_be_the_best(
    run: Callable[..., Any], space: Callable[[str], Space], tmp_path: Path
) -> None:
    before, _ = run(TEXT + "confirm: {top: 1, seeds: 3}\n", speed_of_lr)
    assert max(row.values[0] for row in before.record().trials) < 5000.0
    fewer = TEXT.replace("trials: 4", "trials: 5") + "confirm: {top: 1, seeds: 2}\n"
    study = SearchStudy.resume(tmp_path / "s", space(fewer))
    numbers = []
    while study.missing:
        numbers.append(study.propose().number)
        study.finish(numbers[-1], Ended("ok", "finished", figures() | {"samples_per_second": 5000.0}, 1.0))
    best = choose_best(study.record())
    assert best is not None
    assert (numbers, best.number) == ([7, 8, 9], 7)


def test_the_rule_of_choice_says_whether_single_runs_or_means_decided() -> None:
    one_run = "the feasible trial with the highest samples_per_second"
    assert rule_of_choice(study_of(trial(0, 10.0))) == one_run
    confirmed = study_of(trial(0, 10.0), trial(1, 5.0, "confirm", "trial 0"))
    of_means = "of the trials that were run again and were feasible with every seed, the one with the highest mean "
    assert rule_of_choice(confirmed) == f"{of_means}samples_per_second"
    refuted = study_of(trial(0, 10.0), trial(1, 9.0), trial(2, 5.0, "confirm", "trial 0", "infeasible"))
    assert rule_of_choice(refuted) == one_run
    two = replace(confirmed, objectives=[*confirmed.objectives, Objective("val_loss", "minimize")])
    two = replace(two, trials=[replace(each, values=(1.0, 2.0)) for each in two.trials])
    assert rule_of_choice(two).endswith("the one on the Pareto front of the means of samples_per_second, val_loss that "
                                        "is nearest to the best value of each")  # fmt: skip


def test_a_winner_that_is_infeasible_with_another_seed_is_out() -> None:
    refuted = trial(2, 10.0, "confirm", "trial 0", "infeasible")
    best = choose_best(study_of(trial(0, 10.0), trial(1, 9.0), refuted))
    assert best is not None
    assert best.number == 1
    assert choose_best(study_of(trial(0, 10.0), refuted)) is None


def test_a_baseline_that_died_with_one_seed_has_no_mean_to_be_compared_with(run: Callable[..., Any]) -> None:
    def end(proposal: Proposal) -> Ended:
        if proposal.stage == "confirm" and proposal.label == "default" and proposal.number == 5:
            return Ended("crashed", "its process died", {"samples_per_second": 1.0}, 1.0)
        return speed_of_lr(proposal)

    study, started = run(TEXT + "baselines: [default]\nconfirm: {top: 1, seeds: 2}\n", end)
    assert [each.label for each in started[4:]] == [started[4].label, "default"] * 2
    found = confirmations(study.record())
    assert found["default"].means is None
    assert found[started[4].label].means is not None
    assert against_baselines(study.record()) == {}


def test_best_json_goes_where_the_confirmation_refutes_the_only_trial(
    space: Callable[[str], Space], tmp_path: Path
) -> None:
    text = TEXT.replace("trials: 4", "trials: 1") + "confirm: {top: 1, seeds: 1}\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    for errors, there in ((0, True), (3, False)):
        study.finish(study.propose().number, Ended("ok", "finished", figures(oom_events=errors), 1.0))
        write_data(study.directory)
        assert (study.directory / "best.json").is_file() == there


def test_baselines_and_confirmations_are_never_the_best() -> None:
    best = choose_best(study_of(trial(0, 1.0), trial(1, 5.0, "baseline", "fixed batch 64"), trial(2, 9.0, "anchor")))
    assert best is not None
    assert best.number == 0


def test_the_number_of_trials_of_a_whole_study_is_told_beforehand(space: Callable[[str], Space]) -> None:
    assert planned(space(TEXT)) == 4
    assert planned(space(TEXT + "anchor_every: 2\nconfirm: {top: 2, seeds: 3}\nbaselines: [default]\n")) == 4 + 2 + 9


def test_the_busy_share_counts_the_gaps_between_trials_but_not_the_time_without_a_search() -> None:
    def ran(number: int, began: float, seconds: float, busy: float) -> TrialRecord:
        made = trial(number, 1.0)
        return replace(made, began=began, seconds=seconds, figures={"gpu_busy_fraction": busy, "training_seconds": 5.0})

    study = study_of(ran(0, 100.0, 10.0, 0.9), ran(1, 112.0, 8.0, 1.0), ran(2, 5000.0, 10.0, 1.0))
    assert busy_share(study) == pytest.approx((9 + 8 + 10) / (20 + 10))
    assert busy_share(study, "training_seconds") == pytest.approx(15 / 30)
    at_once = study_of(ran(0, 0.0, 10.0, 0.9), ran(1, 0.0, 10.0, 0.9), ran(2, 10.0, 10.0, 0.9))
    assert busy_share(at_once) == pytest.approx(27 / 40)
    assert busy_share(study_of(trial(0, 1.0))) is None


# --- requires


@pytest.mark.parametrize(
    ("text", "settings", "holds"),
    [
        ("max_batch_size >= 4 * min_batch_size", {"max_batch_size": 64, "min_batch_size": 16}, True),
        ("max_batch_size >= 4 * min_batch_size", {"max_batch_size": 64, "min_batch_size": 17}, False),
        ("optimizer == sgd or lr < 0.1", {"optimizer": "adamw", "lr": 0.2}, False),
        ("optimizer == 'sgd' or lr < 0.1", {"optimizer": "sgd", "lr": 0.2}, True),
        ("not enable_amp", {"enable_amp": True}, False),
        ("enable_amp == true", {"enable_amp": True}, True),
        ("0 < pid_ki <= pid_kp", {"pid_ki": 0.2, "pid_kp": 0.1}, False),
        ("effective_batch_size >= max_batch_size", {"effective_batch_size": None, "max_batch_size": 4}, True),
        ("-lr < 0 and max_batch_size % 8 == 0", {"lr": 1.0, "max_batch_size": 12}, False),
        ("direction == none", {"direction": "none"}, True),
        ("direction != none", {"direction": "none"}, False),
        ("direction == none", {"direction": "easy"}, False),
        ("'none' != freeze", {"freeze": None}, False),
    ],
)
def test_a_requirement_says_whether_settings_fulfil_it(text: str, settings: dict[str, Any], holds: bool) -> None:
    assert parse_requirement(text).holds(settings) is holds


@pytest.mark.parametrize(
    "text", ["lr >", "lr + 1", "__import__('os').system('x')", "lr.real < 1", "[1] == lr", "7", "~lr < 1"]
)
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        parse_requirement(text)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("requires: [lr < 0.00001]", "line 7: requires: none of 4000 random configurations fulfils it"),
        ("requires: [lrr < 1]", "no setting is called lrr (did you mean 'lr'?)"),
        ("requires: [pid_kp < 1]", "names no searched setting"),
        ("screen: {trials: 2}", "2 short trials are fewer than `trials`, 4"),
        ("baselines: [default, default]", "the same one twice"),
        ("baselines: [best]", "input should be 'default', 'fixed batch' or 'halving'"),
        ("warm_start: [nowhere]", "'nowhere': no such folder"),
    ],
)
def test_what_cannot_be_asked_of_stages_is_refused_with_its_line(
    space: Callable[[str], Space], line: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        space(TEXT + line + "\n")
    assert problem in str(caught.value)


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_nothing_is_tried_that_does_not_fulfil_what_is_required(run: Callable[..., Any], sampler: str) -> None:
    text = TEXT.replace("trials: 4", "trials: 12") + f"requires: [lr * max_batch_size <= 0.1]\nsampler: {sampler}\n"
    study, started = run(text, speed_of_lr)
    assert len(started) == len(load_study(study.directory).trials) == 12
    assert all(each.values["lr"] * each.values["max_batch_size"] <= 0.1 for each in started)
    assert started[0].label == "default"


def test_the_nearest_configuration_that_may_be_tried_takes_the_place_of_one_that_may_not(
    space: Callable[[str], Space],
) -> None:
    search = space(TEXT).search
    rng = random.Random(0)
    points = [draw(search, rng) for _ in range(200)]
    assert all(16 <= point["max_batch_size"] <= 256 and isinstance(point["max_batch_size"], int) for point in points)
    wanted = {"max_batch_size": 256, "lr": 0.01}
    found = nearest_allowed(wanted, search, lambda point: point["max_batch_size"] <= 64, rng)
    assert found is not None
    assert 56 <= found["max_batch_size"] <= 64
    assert found["lr"] == pytest.approx(0.01, rel=0.5)
    assert nearest_allowed(wanted, search, lambda point: False, rng) is None


# --- the plant

PLANT = Plant((8, 16, 32, 64), (2.0, 3.0, 5.0, 9.0), (0.010, 0.012, 0.020, 0.040), 0.002, 1.0, 0.0, 0.0, 12.0)
CONTROL = {
    "min_batch_size": 8, "max_batch_size": 64, "effective_batch_size": 64, "target_headroom_gb": 2.0,
    "knee_gain_fraction": 0.0,
}  # fmt: skip


def rows_of(size: int, peak: float, seconds: float, micro_batches: int = 2, count: int = 8) -> list[dict[str, float]]:
    row = {"peak_allocated_gb": peak - 0.1, "reserved_gb": peak, "seconds": seconds, "micro_batches": micro_batches}
    return [{**row, "micro_batch": size, "budget_gb": 12.0} for _ in range(count)]


def test_a_plant_is_fitted_from_the_steps_of_runs_with_a_held_batch() -> None:
    plant = fit({16: rows_of(16, 4.0, 0.04), 8: rows_of(8, 3.0, 0.03), 4: rows_of(4, 9.0, 9.0, count=3)})
    assert (plant.sizes, plant.peaks_gb, plant.seconds) == ((8, 16), (3.0, 4.0), (0.015, 0.02))
    assert (plant.base_gb, plant.noise, plant.budget_gb) == (2.0, 0.0, 12.0)
    assert plant.peak_gb(32) == 6.0
    assert plant.micro_seconds(12) == pytest.approx(0.0175)
    assert plant.micro_seconds(1) == 0.015
    assert plant.step_seconds == 0.0
    with pytest.raises(ValueError, match="no run has enough steps"):
        fit({8: rows_of(8, 3.0, 0.03, count=3)})


def test_the_time_of_the_optimizers_step_is_told_from_that_of_the_micro_batches() -> None:
    one, four = rows_of(8, 2.5, 0.020, 1), rows_of(8, 3.0, 0.050, 4)  # 0.010 for the step and for each micro-batch
    plant = fit({8: [*one, *four], 16: rows_of(16, 4.0, 0.090, 4)})
    assert (plant.peaks_gb, plant.noise) == ((3.0, 4.0), 0.0)
    assert plant.step_seconds == pytest.approx(0.010)
    assert plant.seconds == pytest.approx((0.010, 0.020))


def test_the_noise_of_the_plants_times_is_not_that_of_a_capture_or_of_the_end_of_an_epoch() -> None:
    steady = [{**row, "seconds": 0.04 + 0.0004 * (number % 3 - 1)} for number, row in enumerate(rows_of(16, 4.0, 0.0))]
    odd = [{**rows_of(16, 4.0, 0.5)[0]}, {**rows_of(16, 4.0, 0.003)[0]}]
    assert 0.0 < fit({16: [*steady, *odd]}).time_noise < 0.02


def test_short_runs_have_steps_of_whole_micro_batches_and_the_smallest_one_alone() -> None:
    assert runs_to_measure(4, 128, 128) == [(4, 1), (4, 4), (13, 4), (40, 3), (128, 1)]
    assert runs_to_measure(64, 64, 64) == [(64, 1)]


def test_the_micro_batches_that_are_measured_are_evenly_spaced() -> None:
    assert sizes_to_measure(8, 512) == [8, 32, 128, 512]
    assert sizes_to_measure(64, 64) == [64]
    assert sizes_to_measure(4, 6) == [4, 5, 6]


def test_on_a_plant_without_noise_the_prediction_is_what_the_steps_take() -> None:
    found = simulate(PLANT, CONTROL | {"min_batch_size": 32, "max_batch_size": 32})
    assert found is not None
    assert (found.batch_size_mean, found.oom_events, found.headroom_breach_fraction) == (32.0, 0, 0.0)
    assert found.samples_per_second == pytest.approx(64 / (2 * 0.020 + 0.002))


def test_a_neighbour_on_the_plant_makes_the_batch_smaller_and_the_cpu_card_run_out() -> None:
    script = [(0.5, 5.0), (0.9, 0.0)]
    alone, beside = simulate(PLANT, CONTROL), simulate(PLANT, CONTROL, script)
    assert alone is not None
    assert beside is not None
    assert alone.batch_size_mean == 64.0
    assert beside.batch_size_mean < 55.0
    assert beside.samples_per_second < alone.samples_per_second
    on_cpu = simulate(PLANT, CONTROL | {"device": "cpu"}, script)
    assert on_cpu is not None
    assert (beside.oom_events, on_cpu.oom_events) == (0, 1)
    assert 0 < beside.headroom_breach_fraction < 0.05


def test_a_step_that_never_fits_has_no_prediction() -> None:
    assert simulate(PLANT, CONTROL | {"memory_limit_gb": 0.5, "target_headroom_gb": 0.1, "device": "cpu"}) is None


def test_a_study_tries_the_plants_best_after_the_defaults_and_predicts_every_trial(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    text = TEXT.replace("lr:", "optimizer: {values: [adamw, sgd]}\n  lr:").replace("trials: 4", "trials: 5")
    text += "prescreen: {keep: 3, settings: 40}\n"

    def end(proposal: Proposal) -> Ended:
        if proposal.stage == "plant":
            assert (proposal.objective, proposal.settings["min_batch_size"]) == ("acmds_tune.plant:measure", 4)
            folder = tmp_path / "s" / "trials" / f"{proposal.number:04d}"
            folder.mkdir(parents=True)
            (folder / PLANT_FILE).write_text(json.dumps(asdict(PLANT)), encoding="utf-8")
        return speed_of_lr(proposal)

    study, started = run(text, end)
    assert [each.stage for each in started] == ["plant"] + ["search"] * 5
    assert [each.label for each in started[1:]] == ["default", "plant", "plant", "plant", ""]
    assert [each.values["optimizer"] for each in started[2:4]] == ["adamw", "sgd"]
    rows = load_study(study.directory).of_stages(("search",))
    assert [row.predicted is not None for row in rows] == [True] * 5
    best = max(started[1:5], key=lambda each: each.values["max_batch_size"])
    assert best.label == "plant"
    assert SearchStudy.resume(study.directory, study.space)._plant == PLANT


@pytest.mark.parametrize("right", [True, False])
def test_what_the_plant_put_first_is_passed_over_once_its_first_choice_is_no_better_than_the_defaults(
    run: Callable[..., Any], tmp_path: Path, right: bool
) -> None:
    seconds = (0.10, 0.11, 0.12, 0.13)
    larger_is_faster = Plant((16, 64, 128, 256), (1.0, 2.0, 3.0, 4.0), seconds, 0.0, 0.5, 0.0, 0.0, 12.0)

    def end(proposal: Proposal) -> Ended:
        if proposal.stage == "plant":
            folder = tmp_path / "s" / "trials" / f"{proposal.number:04d}"
            folder.mkdir(parents=True)
            (folder / PLANT_FILE).write_text(json.dumps(asdict(larger_is_faster)), encoding="utf-8")
        speed = float(proposal.settings["max_batch_size"])
        return Ended("ok", "", figures() | {"samples_per_second": speed if right else 300.0 - speed}, 1.0)

    text = TEXT.replace("trials: 4", "trials: 6") + "prescreen: {keep: 3, settings: 40}\n"
    study, started = run(text.replace("digits", "digits, effective_batch_size: 256"), end)
    others = ["plant", "plant", "plant", "", ""] if right else ["plant", "", "", "", ""]
    assert [each.label for each in started[1:]] == ["default", *others]
    words = plant_words(load_study(study.directory))
    assert ("passed over" in words, "predicted badly" in words) == (not right, not right)
    share = 0.85 if right else 0.44  # the mean of those that it takes for equal
    assert f"What it put first measured {share} times the best" in words


def test_the_defaults_are_tried_while_the_plants_best_are_looked_for_also_after_a_kill(
    tmp_path: Path, space: Callable[[str], Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = threading.Event()

    def look(*given: Any) -> list[dict[str, Any]]:
        found.wait(60)
        return best_on_plant(*given)

    monkeypatch.setattr("acmds_tune.study.best_on_plant", look)
    text = TEXT + "prescreen: {keep: 1, settings: 10}\n"
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    plant = study.propose()
    (tmp_path / "s" / "trials" / f"{plant.number:04d}").mkdir(parents=True)
    (tmp_path / "s" / "trials" / f"{plant.number:04d}" / PLANT_FILE).write_text(json.dumps(asdict(PLANT)))
    study.finish(plant.number, speed_of_lr(plant))
    default = study.propose()
    assert (default.label, study.next_step()) == ("default", Wait())
    study.close()  # the search is killed
    found.set()
    study = SearchStudy.resume(tmp_path / "s", space(text))
    assert [study.propose().label for _ in range(2)] == ["default", "plant"]
    study.close()


def test_a_search_that_is_interrupted_does_not_wait_for_the_plants_best_and_looks_for_them_again(
    tmp_path: Path, space: Callable[[str], Space]
) -> None:
    text = TEXT + "prescreen: {keep: 1, settings: 20000}\n"  # minutes
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    plant = study.propose()
    study.trial_directory(plant.number).mkdir(parents=True)
    (study.trial_directory(plant.number) / PLANT_FILE).write_text(json.dumps(asdict(PLANT)))
    study.finish(plant.number, speed_of_lr(plant))
    default = study.propose()
    study.finish(default.number, speed_of_lr(default))
    study.interrupt()
    assert study._screening is not None
    assert study._screening.result(timeout=30) == []
    study.close()
    study = SearchStudy.resume(tmp_path / "s", space(text))
    assert study._screening is not None
    study.close()


def test_without_a_plant_the_search_goes_on(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    _, started = run(TEXT + "prescreen: {keep: 2}\n", speed_of_lr)
    assert [each.stage for each in started] == ["plant"] + ["search"] * 4
    assert "there is no plant, so nothing is tried on it first" in caplog.text


def test_short_runs_measure_a_plant_that_can_be_read_back(tmp_path: Path) -> None:
    settings = {
        "device": "cpu", "dataset": "digits", "model": "small_cnn", "memory_limit_gb": 0.006,
        "target_headroom_gb": 0.001, "min_batch_size": 16, "max_batch_size": 1024, "effective_batch_size": 64,
        "val_fraction": 0.0,
    }  # fmt: skip
    figures_ = measure(settings, tmp_path, lambda progress: None, lambda: False)
    plant = read_plant(tmp_path / PLANT_FILE)
    assert plant is not None
    assert plant.sizes == (16, 64)  # 256 are more than the card holds
    with (tmp_path / "batch_64x1" / "steps.csv").open(encoding="utf-8") as file:
        took = [float(row["seconds"]) for row in csv.DictReader(file)][WARM_STEPS:]
    assert plant.step_seconds >= 0
    assert plant.seconds[-1] == pytest.approx(max(1e-9, statistics.median(took) - plant.step_seconds))
    assert list(plant.peaks_gb) == sorted(plant.peaks_gb)
    assert figures_["samples_per_second"] > 0


def test_agreement_is_the_rank_correlation_and_the_error_after_scaling() -> None:
    assert agreement([1.0, 2.0, 4.0], [10.0, 20.0, 40.0])[1] == 0.0  # type: ignore[index]
    assert agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])[0] == pytest.approx(-1.0)  # type: ignore[index]
    assert agreement([1.0, 2.0], [1.0, 2.0]) is None
    assert agreement([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) == (None, 0.5)


def test_halving_counts_the_attempts_that_failed(tmp_path: Path) -> None:
    settings = {
        "device": "cpu", "dataset": "digits", "model": "small_cnn", "memory_limit_gb": 0.008,
        "target_headroom_gb": 0.001, "max_batch_size": 256, "effective_batch_size": 256, "max_steps": 6,
    }  # fmt: skip
    reports: list[int] = []
    found = halving(settings, tmp_path, lambda progress: reports.append(progress["oom_events"]), lambda: False)
    assert (found["oom_events"], found["batch_size_mean"]) == (1, 128.0)
    alone = json.loads((tmp_path / "batch_128" / "outcome.json").read_text(encoding="utf-8"))
    assert found["samples_per_second"] < alone["samples_per_second"]
    assert (tmp_path / "steps.csv").read_text(encoding="utf-8").count("\n") == 7


def test_halving_ends_where_one_sample_meets_an_error_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def attempt(settings: Mapping[str, Any], *_: Any) -> None:
        tried.append(settings["max_batch_size"])
        assert len(tried) < 10

    monkeypatch.setattr("acmds_tune.baselines.until_error", attempt)
    with pytest.raises(OutOfMemoryForGoodError, match="not even one of 1 sample"):
        halving({"max_batch_size": 6}, tmp_path, lambda _: None, lambda: False)
    assert tried == [6, 3, 1]


def test_halving_loses_the_time_of_the_failed_attempts_and_not_the_start_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    measured = {"samples_per_second": 100.0, "samples": 100, "training_seconds": 1.0, "oom_events": 0}
    ends = [(2.0, None), (3.0, measured)]  # 3 s, of which it trains for one

    def attempt(*_: Any) -> dict[str, Any] | None:
        seconds, figures = ends.pop(0)
        clock[0] += seconds
        return figures

    monkeypatch.setattr("acmds_tune.baselines.until_error", attempt)
    monkeypatch.setattr("acmds_tune.baselines.time.monotonic", lambda: clock[0])
    found = halving({"max_batch_size": 64}, tmp_path, lambda _: None, lambda: False)
    assert found["samples_per_second"] == pytest.approx(100 / (1.0 + 2.0))


# --- earlier studies


def test_a_study_of_the_same_thing_is_known_and_its_best_are_tried_first(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    earlier, first = run(TEXT.replace("trials: 4", "trials: 8"), speed_of_lr, "earlier")
    text = TEXT.replace("trials: 4", "trials: 7") + f"warm_start: ['{tmp_path / 'earlier'}']\n"
    study, started = run(text, speed_of_lr, "later")
    best = sorted(first, key=lambda each: abs(each.values["lr"] - 0.01))[:5]
    assert best[4].label == "default", "which is tried anyway"
    assert [each.values for each in started[1:5]] == [each.values for each in best[:4]]
    assert [each.label for each in started] == ["default", *["from s"] * 4, "", ""]
    states = [each.state for each in study._study.get_trials() if "earlier" in each.user_attrs]
    assert states == [TrialState.COMPLETE] * 8
    assert len(load_study(study.directory).trials) == 7
    assert (earlier.directory / JOURNAL).is_file()


def test_none_among_the_choices_is_taken_from_an_earlier_study_like_any_other_choice(
    run: Callable[..., Any], space: Callable[[str], Space], tmp_path: Path
) -> None:
    text = "trials: 6\nfixed: {device: cpu}\nsearch:\n  effective_batch_size: {values: [null, 256]}\n"

    def none_is_fastest(proposal: Proposal) -> Ended:
        return Ended("ok", "", figures(0.001 if proposal.values["effective_batch_size"] else 0.01), 1.0)

    earlier, first = run(text, none_is_fastest, "earlier")
    assert any(each.values == {"effective_batch_size": None} for each in first)
    study = SearchStudy.create(tmp_path / "s", space(text), text, {})
    assert study.learn_from(earlier.directory) == 6
    assert best_settings(earlier.record(), space(text))[0] == {"effective_batch_size": None}
    ranged = space(text.replace("values: [null, 256]", "low: 64, high: 256"))
    assert not contains(ranged.search["effective_batch_size"], None)
    assert {None, 256} == {params["effective_batch_size"] for _, params in usable_trials(earlier.record(), space(text))}
    assert all(params["effective_batch_size"] for _, params in usable_trials(earlier.record(), ranged))


def test_settings_of_an_earlier_study_that_have_run_or_wait_here_are_not_tried_twice(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    def default_is_best(proposal: Proposal) -> Ended:
        return Ended("ok", "", figures(0.01 if proposal.values["lr"] == 0.001 else proposal.values["lr"] / 100), 1.0)

    choice = "  optimizer: {values: [adamw, sgd]}\n  momentum: {low: 0.5, high: 0.95, when: {optimizer: sgd}}\n"
    text = TEXT.replace("trials: 4", "trials: 3") + choice
    for name in ("one", "two"):  # the same trials in both
        run(text, default_is_best, name)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    _, started = run(text.replace("trials: 3", "trials: 5") + f"warm_start: {folders}\n", default_is_best, "later")
    assert [each.label for each in started] == ["default", "from s", "from s", "", ""]
    assert len({json.dumps(each.values, sort_keys=True) for each in started}) == 5


def test_defaults_beyond_a_range_with_steps_are_its_end_and_not_above_it(space: Callable[[str], Space]) -> None:
    # 0.1 + 6 * 0.1 is 0.7000000000000001
    made = default_values(space("search:\n  momentum: {low: 0.1, high: 0.7, step: 0.1}\n"))
    assert made == {"momentum": 0.7}


def test_a_sampler_that_knows_no_constraints_learns_the_worst_of_an_earlier_trial_that_broke_one(
    run: Callable[..., Any], space: Callable[[str], Space], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "trials: 8\nfixed: {device: cpu}\nsearch:\n  max_batch_size: {values: [64, 128]}\n"
    run(text, fits_64, name="earlier")
    monkeypatch.setattr("acmds_tune.study.WITHOUT_CONSTRAINTS", ("random",))
    study = SearchStudy.create(tmp_path / "s", space(text + "sampler: random\n"), text, {})
    assert study.learn_from(tmp_path / "earlier") == 8
    known = [each for each in study._study.trials if "earlier" in each.user_attrs]
    assert {(each.params["max_batch_size"], each.value) for each in known} == {(64, 64.0), (128, 0.0)}


def test_of_a_study_of_something_else_only_the_best_settings_are_taken(
    run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(TEXT, speed_of_lr, "earlier")
    text = TEXT.replace("digits", "cifar10").replace("high: 256", "high: 20")
    study, started = run(text + f"warm_start: ['{tmp_path / 'earlier'}']\n", speed_of_lr, "later")
    assert not any("earlier" in each.user_attrs for each in study._study.get_trials())
    assert "fixed.dataset: digits in the study, cifar10 now" in caplog.text
    assert len(started) == 4
    assert all(each.values["max_batch_size"] <= 20 for each in started)


def test_a_sampler_whose_package_is_missing_is_refused_before_there_is_a_study(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install cmaes"):
        run(TEXT + "sampler: cmaes\n", speed_of_lr)
    assert not (tmp_path / "s").exists()


def test_a_warm_start_that_is_no_study_is_refused_before_there_is_a_study(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: 1 problem\\n  is not the folder of a study"):
        run(TEXT + f"warm_start: ['{tmp_path / 'empty'}']\n", speed_of_lr)
    assert not (tmp_path / "s").exists()


def test_the_plants_short_runs_are_not_taken_for_the_defaults() -> None:
    def ran(number: int, speed: float, stage: str, label: str, status: str = "ok") -> TrialRecord:
        made = trial(number, speed, stage, label, status)
        return replace(made, figures={"samples_per_second": speed}, config={"lr": TrainConfig().lr})

    rows = (
        ran(0, 50.0, "plant", "short runs"), ran(1, 10.0, "search", "default", "stopped"),
        ran(2, 100.0, "search", "default"), ran(3, 102.0, "anchor", "default"),
    )  # fmt: skip
    study = replace(study_of(*rows), searched=["lr"])
    assert default_trial(study) is rows[2]
    assert "measured +2.0 % against" in anchor_drift(study)


def test_the_page_shows_the_best_by_the_mean_of_its_confirmation_and_not_by_the_run_that_chose_it() -> None:
    def ran(number: int, speed: float, stage: str, label: str) -> TrialRecord:
        return replace(trial(number, speed, stage, label), figures={"samples_per_second": speed})

    chosen, first = ran(0, 200.0, "search", ""), ran(1, 100.0, "search", "default")
    alone = tiles(study_of(chosen, first), chosen, first)
    assert "<b>200</b>samples/s<span>best: trial 0, one run</span>" in alone
    assert "<b>2.00×</b>" in alone
    speeds = [("trial 0", 120.0), ("default", 100.0), ("trial 0", 130.0), ("default", 100.0)]
    again = [ran(2 + place, speed, "confirm", label) for place, (label, speed) in enumerate(speeds)]
    shown = tiles(study_of(chosen, first, *again), chosen, first)
    assert "<b>125</b>samples/s<span>best: trial 0, ± 7.071, 2 runs</span>" in shown
    assert "<b>1.25×</b>the default settings<span>default: 100, 2 runs</span>" in shown


# --- the errors of the halving baseline


def events_of(folder: Path) -> list[tuple[str, str]]:
    """(kind, micro-batch) of each row of the trial's events.csv."""
    with (folder / "events.csv").open(encoding="utf-8", newline="") as file:
        return [(row["kind"], row["micro_batch"]) for row in csv.DictReader(file)]


def test_the_errors_of_all_attempts_of_the_halving_are_events_of_its_trial(tmp_path: Path) -> None:
    settings = {
        "device": "cpu", "dataset": "digits", "model": "small_cnn", "memory_limit_gb": 0.008,
        "target_headroom_gb": 0.001, "max_batch_size": 512, "effective_batch_size": 512, "max_steps": 2,
    }  # fmt: skip
    said: list[tuple[int, int]] = []
    found = halving(settings, tmp_path, lambda p: said.append((p["step"], p["oom_events"])), lambda: False)
    assert events_of(tmp_path) == [("out_of_memory", "512"), ("out_of_memory", "256")]
    assert found["oom_events"] == 2
    # each begins from nothing, and so does the script of the neighbour
    assert [errors for step, errors in said if step == 0] == [1, 2]


def test_the_errors_of_a_halving_that_never_fits_are_events_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(settings: Mapping[str, Any], directory: Path, *_: Any) -> None:
        directory.mkdir()
        row = f"out_of_memory,{settings['max_batch_size']}\r\n"
        (directory / "events.csv").write_text("kind,micro_batch\r\n" + row, encoding="utf-8", newline="")
        if settings["max_batch_size"] == 1:
            raise OutOfMemoryForGoodError("nothing fits")

    monkeypatch.setattr("acmds_tune.baselines.until_error", attempt)
    with pytest.raises(OutOfMemoryForGoodError, match="nothing fits"):
        halving({"max_batch_size": 3}, tmp_path, lambda _: None, lambda: False)
    assert events_of(tmp_path) == [("out_of_memory", "3"), ("out_of_memory", "1")]
