"""The study: what is proposed, what the sampler is told, and what is left after an interruption. Without Ray."""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from acmds_optimizer.errors import ConfigError
from acmds_tune.journal import StudyBusyError, mend
from acmds_tune.objective import Ended, read_outcome, write_outcome
from acmds_tune.space import Space
from acmds_tune.space_load import load
from acmds_tune.stages import default_values
from acmds_tune.storage import read_about
from acmds_tune.study import BAD_END_VIOLATION, SearchStudy
from tests.fake_objectives import figures

TEXT = """
seed: 3
trials: 6
fixed: {device: cpu, dataset: digits}
search:
  lr: {low: 0.0001, high: 0.1, log: true}
  batch_policy: {values: [hold, free]}
  lr_scaling: {values: [none, linear], when: {batch_policy: free}}
"""

OK = Ended("ok", "finished", figures(), 1.5)


@pytest.fixture
def space(tmp_path: Path) -> Callable[..., Space]:
    def make(text: str = TEXT, **overrides: Any) -> Space:
        path = tmp_path / "s.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path, overrides=overrides)

    return make


@pytest.fixture
def create(tmp_path: Path, space: Callable[..., Space]) -> Callable[..., SearchStudy]:
    def make(text: str = TEXT, *, name: str = "s") -> SearchStudy:
        return SearchStudy.create(tmp_path / "results" / name, space(text), text, {})

    return make


def trials(study: SearchStudy) -> list[optuna.trial.FrozenTrial]:
    """As they are read back from the journal."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(study.directory / "journal.log")))
    return optuna.load_study(study_name=study.space.name, storage=storage).trials


def resumed(study: SearchStudy, space: Space | None = None) -> SearchStudy:
    """As after a kill of the process that held `study`."""
    study.close()
    return SearchStudy.resume(study.directory, space or study.space)


def resumed_with(study: SearchStudy, objective: str | None) -> SearchStudy:
    study.close()
    return SearchStudy.resume(study.directory, study.space, objective=objective)


def test_the_first_trial_has_the_default_settings(create: Callable[..., SearchStudy]) -> None:
    proposal = create().propose()
    assert proposal.values == {"lr": 1e-3, "batch_policy": "hold"}
    assert proposal.settings["dataset"] == "digits"
    assert proposal.settings["checkpoint_every"] == 0


def test_defaults_are_moved_into_the_space(space: Callable[..., Space]) -> None:
    text = (
        "search:\n"
        "  max_batch_size: {low: 100, high: 400, step: 100}\n"
        "  min_batch_size: {low: 1, high: 7, step: 2}\n"
        "  lr: {low: 0.1, high: 0.2}\n"
        "  optimizer: {values: [sgd]}\n"
        "  effective_batch_size: {low: 64, high: 128}\n"
    )
    assert default_values(space(text)) == {"max_batch_size": 100, "min_batch_size": 5, "lr": 0.1, "optimizer": "sgd"}


def test_a_proposal_and_an_end_each_wait_once_for_the_disk(
    create: Callable[..., SearchStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, real = create(), os.fsync
    waits: list[int] = []

    def counted(descriptor: int) -> None:
        waits.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    number = study.propose().number
    assert len(waits) == 1
    study.finish(number, OK)
    assert len(waits) == 2
    (trial,) = trials(study)
    assert trial.state == TrialState.COMPLETE


def test_a_setting_whose_condition_is_not_met_is_not_proposed(create: Callable[..., SearchStudy]) -> None:
    study = create()
    seen = set()
    for _ in range(12):
        proposal = study.propose()
        seen.add(("lr_scaling" in proposal.values, proposal.values["batch_policy"]))
        study.finish(proposal.number, OK)
    assert seen == {(False, "hold"), (True, "free")}


def test_every_trial_has_a_seed_of_its_own(create: Callable[..., SearchStudy]) -> None:
    study = create()
    proposals = [study.propose() for _ in range(5)]
    assert len({proposal.seed for proposal in proposals}) == 5
    assert all(proposal.settings["seed"] == proposal.seed for proposal in proposals)


def test_the_same_seed_and_the_same_ends_give_the_same_trials(create: Callable[..., SearchStudy]) -> None:
    values: list[list[dict[str, Any]]] = []
    for name in ("a", "b"):
        study = create(name=name)
        values.append([])
        for _ in range(12):
            proposal = study.propose()
            values[-1].append(proposal.values)
            study.finish(proposal.number, Ended("ok", "finished", figures(proposal.values["lr"]), 1.0))
    assert values[0] == values[1]


def test_a_good_end_is_told_with_its_figures(create: Callable[..., SearchStudy]) -> None:
    study = create()
    assert study.finish(study.propose().number, OK) == "ok"
    (trial,) = trials(study)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [figures()["samples_per_second"]]
    assert trial.user_attrs["status"] == "ok"
    assert trial.user_attrs["val_loss"] == 0.4
    assert trial.user_attrs["seconds"] == 1.5
    assert trial.user_attrs["constraints"] == [0, 0.0]
    assert list(trial.constraints.values()) == [0.0, 0.0]


def test_the_kept_settings_are_complete_and_without_the_budget_of_a_trial(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT + "budget: {steps: 5}\n")
    proposal = study.propose()
    assert proposal.settings["max_steps"] == 5
    config = trials(study)[0].user_attrs["config"]
    assert (config["max_steps"], config["checkpoint_every"]) == (None, 1)
    assert (config["lr"], config["seed"], config["dataset"]) == (1e-3, proposal.seed, "digits")


def test_a_good_end_that_broke_a_constraint_is_infeasible_and_says_which(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT + "constraints: [oom_events <= 0, val_accuracy >= 0.95]\n")
    assert study.finish(study.propose().number, Ended("ok", "finished", figures(oom_events=3), 1.0)) == "infeasible"
    (trial,) = trials(study)
    assert trial.user_attrs["reason"] == "broke oom_events <= 0 (3), val_accuracy >= 0.95 (0.9)"
    assert trial.user_attrs["constraints"] == [3, pytest.approx(0.05), 0.0]


def test_a_constraint_may_be_written_without_spaces(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT + 'constraints: ["val_accuracy>=0.95"]\n')
    assert study.finish(study.propose().number, Ended("ok", "finished", figures(), 1.0)) == "infeasible"
    assert trials(study)[0].user_attrs["reason"] == "broke val_accuracy>=0.95 (0.9)"


def test_a_good_end_without_the_objective_measured_cannot_be_the_best(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT + "objective: pareto\n")
    unmeasured = {name: value for name, value in figures().items() if name != "val_loss"}  # it was not finite
    assert study.finish(study.propose().number, Ended("ok", "finished", unmeasured, 1.0)) == "infeasible"
    (trial,) = trials(study)
    assert trial.user_attrs["reason"] == "val_loss was not measured"
    assert trial.user_attrs["constraints"] == [0.0, 1.0]


@pytest.mark.parametrize("status", ["oom", "crashed", "timeout", "error"])
def test_a_bad_end_is_told_as_complete_with_its_last_values_and_a_broken_constraint(
    create: Callable[..., SearchStudy], status: str
) -> None:
    study = create()
    study.finish(study.propose().number, Ended(status, "why", {"samples_per_second": 7.0, "oom_events": 1}, 1.0))
    (trial,) = trials(study)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [7.0])
    assert trial.constraints == {"0": 1.0, "1": BAD_END_VIOLATION}
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == (status, "why")
    assert study.missing == 5


def test_a_trial_without_any_figure_gets_the_worst_values_seen(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT + "objective: pareto\n")
    for loss in (0.5, 0.9):
        study.finish(study.propose().number, Ended("ok", "finished", figures() | {"val_loss": loss}, 1.0))
    study.finish(study.propose().number, Ended("crashed", "died", {}, 1.0))
    assert trials(study)[-1].values == [0.0, 0.9]


def test_the_sampler_looks_away_from_where_trials_end_badly(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT.replace("trials: 6", "trials: 40"))
    late = []
    for count in range(40):
        proposal = study.propose()
        policy = proposal.values["batch_policy"]
        # what dies had been the fastest until then
        ended = Ended("crashed", "died", {"samples_per_second": 9e9}, 1.0) if policy == "free" else OK
        study.finish(proposal.number, ended)
        late += [policy] if count >= 20 else []
    assert late.count("hold") >= 15


def test_an_interrupted_trial_does_not_count_and_its_settings_come_again(create: Callable[..., SearchStudy]) -> None:
    study = create()
    first = study.propose()
    study.finish(first.number, Ended("stopped", "interrupted", {}, 1.0), interrupted=True)
    assert (study.told, study.missing) == (0, 6)
    again = study.propose()
    assert (again.number, again.values) == (1, first.values)
    assert [trial.state for trial in trials(study)] == [TrialState.FAIL, TrialState.RUNNING]


def test_settings_that_were_interrupted_twice_are_not_tried_a_third_time(create: Callable[..., SearchStudy]) -> None:
    study = create()
    for _ in range(2):
        study.finish(study.propose().number, Ended("stopped", "interrupted", {}, 1.0), interrupted=True)
    assert study.propose().values["lr"] != 1e-3


def test_the_defaults_are_tried_anew_in_a_resumed_search_until_a_trial_of_them_counts(
    create: Callable[..., SearchStudy],
) -> None:
    study = create()
    for _ in range(2):
        assert study.propose().values["lr"] == 1e-3
        study = resumed(study)  # which was killed
        study = resumed(study)  # and is not asked for a trial: they are put in line once
    waiting = [trial.user_attrs["label"] for trial in trials(study) if trial.state == TrialState.WAITING]
    assert waiting == ["default"]
    other = resumed(study).propose()
    assert (other.label, other.values) == ("default", {"lr": 1e-3, "batch_policy": "hold"})


@pytest.mark.parametrize("status", ["ok", "crashed"])
def test_defaults_that_have_been_tried_are_not_put_in_line_again(
    create: Callable[..., SearchStudy], status: str
) -> None:
    study = create()
    study.finish(study.propose().number, Ended(status, "why", figures(), 1.0))
    again = resumed(study)
    assert [trial.state for trial in trials(again)] == [TrialState.COMPLETE]
    assert again.propose().label == ""


def test_a_search_that_ended_without_a_trial_of_the_defaults_has_one_where_it_is_extended(
    create: Callable[..., SearchStudy], space: Callable[..., Space]
) -> None:
    study = create()
    for _ in range(2):
        study.finish(study.propose().number, Ended("stopped", "interrupted", {}, 1.0), interrupted=True)
    while study.missing:
        study.finish(study.propose().number, OK)
    study = resumed(study)
    assert study.missing == 0
    study = resumed(study, space(trials=7))
    assert [study.propose().label, study.missing] == ["default", 0]


def test_after_a_kill_a_running_trial_is_crashed_and_replaced(create: Callable[..., SearchStudy]) -> None:
    study = create()
    study.finish(study.propose().number, OK)
    lost = study.propose()
    again = resumed(study)
    assert (again.told, again.missing) == (1, 5)
    assert trials(study)[1].user_attrs["status"] == "crashed"
    assert trials(study)[1].user_attrs["reason"] == "the search was ended while it ran"
    assert again.propose().values == lost.values


def test_how_long_a_trial_ran_that_was_killed_with_the_search_is_not_known(create: Callable[..., SearchStudy]) -> None:
    study = create()
    study.propose()
    again = resumed(study)
    (row,) = again.record().trials
    assert row.status == "crashed"
    assert row.seconds is None
    assert row.figures["seconds"] is None


def test_after_a_kill_a_trial_that_had_written_its_outcome_is_not_lost(create: Callable[..., SearchStudy]) -> None:
    study = create()
    number = study.propose().number
    write_outcome(study.trial_directory(number), number, 5, OK)
    assert resumed(study).told == 1
    assert trials(study)[0].user_attrs["status"] == "ok"


def test_a_resumed_search_does_not_repeat_its_points(create: Callable[..., SearchStudy]) -> None:
    study = create(TEXT.replace("trials: 6", "trials: 20"))
    values = []
    for _ in range(4):
        for _ in range(3):
            proposal = study.propose()
            values.append(proposal.values["lr"])
            study.finish(proposal.number, OK)
        study = resumed(study)
    assert len(set(values)) == len(values)


def test_an_older_journal_that_is_put_back_does_not_take_the_outcome_of_another_trial(
    create: Callable[..., SearchStudy],
) -> None:
    study = create()
    before = (study.directory / "journal.log").read_bytes()
    folder = study.trial_directory(study.propose().number)
    write_outcome(folder, 0, 1, OK)
    study.close()
    (study.directory / "journal.log").write_bytes(before)
    again = SearchStudy.resume(study.directory, study.space)
    assert again.propose().number == 0
    assert read_outcome(folder) is None
    assert read_outcome(folder.with_name("0000.old1")) == OK, "nothing is written over"


def test_a_half_written_last_line_of_the_journal_is_cut_off(create: Callable[..., SearchStudy]) -> None:
    study = create()
    study.finish(study.propose().number, OK)
    journal = study.directory / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":8,"worker_id"')
    assert resumed(study).told == 1
    assert journal.read_bytes().startswith(whole)


@pytest.mark.parametrize("cut", [1, 10, 60, 300])
def test_a_journal_cut_anywhere_can_be_resumed(create: Callable[..., SearchStudy], cut: int) -> None:
    study = create()
    for _ in range(2):
        study.finish(study.propose().number, OK)
    journal = study.directory / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-cut])
    again = resumed(study)
    while again.missing:
        again.finish(again.propose().number, OK)
    assert sum(trial.state == TrialState.COMPLETE for trial in trials(study)) == 6


@pytest.mark.parametrize("room", [30, 505, 893, 1475, 1669, 2057, 2445])
def test_a_disk_that_is_full_for_a_moment_costs_no_trial_that_had_ended(
    create: Callable[..., SearchStudy], room: int
) -> None:
    study = create()
    for _ in range(2):
        study.finish(study.propose().number, OK)
    size = (study.directory / "journal.log").stat().st_size
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)

    def go_on() -> None:
        for _ in range(3):
            study.finish(study.propose().number, OK)

    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            go_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    for running in list(study._running):  # as the search does at its end, when there may be room again
        study.finish(running, Ended("stopped", "interrupted"), interrupted=True)
    assert [row.status for row in resumed(study).record().trials][:2] == ["ok", "ok"]


@pytest.mark.parametrize("lines", [None, 0, 1])
def test_a_folder_whose_search_was_killed_before_it_began_is_taken(
    create: Callable[..., SearchStudy], lines: int | None
) -> None:
    study = create()
    study.close()
    journal = study.directory / "journal.log"
    begun = journal.read_bytes().splitlines(keepends=True)
    journal.unlink()
    if lines is not None:
        journal.write_bytes(b"".join(begun[:lines]) + begun[lines][:20])
    assert create().propose().values["lr"] == 1e-3
    with pytest.raises(ConfigError, match="this study exists"):
        create()


def test_a_folder_that_another_search_has_just_made_is_left_as_it_is(create: Callable[..., SearchStudy]) -> None:
    directory = create().directory
    with pytest.raises(ConfigError, match="this study exists"):
        create(TEXT.replace("seed: 3", "seed: 4"))
    assert (directory / "study.yaml").read_text(encoding="utf-8") == TEXT


def test_a_lock_that_a_killed_search_left_is_removed(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    journal.write_text("{}\n", encoding="utf-8")
    (tmp_path / "journal.log.lock").symlink_to(journal)
    mend(journal)
    assert not (tmp_path / "journal.log.lock").is_symlink()


def test_a_study_that_another_search_writes_to_is_refused(create: Callable[..., SearchStudy]) -> None:
    study = create()
    with pytest.raises(StudyBusyError, match="another search is running"):
        SearchStudy.resume(study.directory, study.space)


def test_a_changed_file_is_refused_with_the_difference(
    create: Callable[..., SearchStudy], space: Callable[..., Space]
) -> None:
    study = create()
    changed = space(TEXT.replace("high: 0.1", "high: 0.2").replace("digits", "cifar10") + "pruner: median\n")
    with pytest.raises(ConfigError) as caught:
        resumed(study, changed)
    assert caught.value.problems[:3] == [
        "fixed.dataset: digits in the study, cifar10 now",
        "pruner: none in the study, median now",
        "search.lr.high: 0.1 in the study, 0.2 now",
    ]
    SearchStudy.resume(study.directory, study.space)  # the refusal let go of the study


def test_more_trials_and_other_limits_are_not_a_change(
    create: Callable[..., SearchStudy], space: Callable[..., Space]
) -> None:
    study = create()
    text = TEXT + "timeouts: {silence: 9}\nbudget: {minutes: 5}\n"
    assert resumed(study, space(text, trials=8)).missing == 8
    assert read_about(study.directory)["space"]["trials"] == 8


def test_a_file_that_asks_for_more_stages_is_kept_when_the_search_is_resumed(
    create: Callable[..., SearchStudy], space: Callable[..., Space]
) -> None:
    study = create()
    study.close()
    text = TEXT + "confirm: {top: 2, seeds: 2}\n"
    SearchStudy.resume(study.directory, space(text), text, {"val_fraction": "0.1"}).close()
    about = read_about(study.directory)
    assert (about["yaml"], about["set"], about["space"]["confirm"]["top"]) == (text, {"val_fraction": "0.1"}, 2)
    assert (study.directory / "study.yaml").read_text(encoding="utf-8") == text


def test_relative_paths_keep_their_meaning_when_a_search_is_resumed_elsewhere(
    create: Callable[..., SearchStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    study = create()
    monkeypatch.chdir(tmp_path)
    again = resumed(study)
    assert again.working_directory == str(tmp_path / "first")
    (tmp_path / "first").rmdir()
    assert resumed(again).working_directory == str(tmp_path)


def test_an_early_study_that_does_not_know_where_it_began_is_resumed_from_here(
    create: Callable[..., SearchStudy],
) -> None:
    study = create()
    about = study._study.user_attrs["acmds"]
    kept = {name: value for name, value in about.items() if name not in ("working_directory", "import_path")}
    study._study.set_user_attr("acmds", kept)
    assert resumed(study).working_directory == str(Path.cwd())


def test_a_study_keeps_the_objective_that_its_trials_have(create: Callable[..., SearchStudy], tmp_path: Path) -> None:
    study = create()
    assert study.objective == "acmds_tune.objective:run"
    with pytest.raises(ConfigError, match=r"acmds_tune\.objective:run in the study, mine:other now"):
        resumed_with(study, "mine:other")
    assert SearchStudy.resume(study.directory, study.space).objective == "acmds_tune.objective:run"
    own = SearchStudy.create(tmp_path / "own", study.space, TEXT, {}, "mine:objective")
    for given in (None, "mine:objective"):
        own = resumed_with(own, given)
        assert own.objective == "mine:objective"


def test_an_early_study_that_does_not_know_its_objective_has_the_trainers_or_the_one_that_is_given(
    create: Callable[..., SearchStudy],
) -> None:
    study = create()
    about = study._study.user_attrs["acmds"]
    study._study.set_user_attr("acmds", {name: value for name, value in about.items() if name != "objective"})
    study = resumed_with(study, None)
    assert study.objective == "acmds_tune.objective:run"
    study = resumed_with(study, "mine:objective")
    assert study.objective == "mine:objective"
    with pytest.raises(ConfigError, match="mine:objective in the study, mine:other now"):
        resumed_with(study, "mine:other")


def test_a_folder_without_a_study_cannot_be_resumed(tmp_path: Path, space: Callable[..., Space]) -> None:
    with pytest.raises(ConfigError, match=r"it has no journal\.log"):
        SearchStudy.resume(tmp_path, space())


PRUNED = TEXT.replace("trials: 6", "trials: 20") + "objective: val_loss\npruner: median\n"


def test_a_trial_behind_the_median_of_the_others_is_pruned(create: Callable[..., SearchStudy]) -> None:
    study = create(PRUNED)

    def run(loss: float) -> int | None:
        """The percent at which it is pruned."""
        number = study.propose().number
        for step in range(0, 101, 5):
            if study.should_prune(number, {"step": step, "total_steps": 100, "val_loss": loss}):
                study.finish(number, Ended("stopped", "pruned", {"val_loss": loss}, 1.0))
                return step
        study.finish(number, Ended("ok", "finished", figures() | {"val_loss": loss}, 1.0))
        return None

    assert [run(loss) for loss in (0.5, 0.6, 0.4, 0.5)] == [None] * 4
    assert run(9.0) == 30
    pruned = trials(study)[-1]
    assert (pruned.state, pruned.values) == (TrialState.COMPLETE, [9.0])
    assert pruned.user_attrs["status"] == "stopped"
    assert list(pruned.constraints.values())[-1] == pytest.approx(0.7)
    assert run(0.3) is None


def test_a_short_trial_is_judged_by_its_own_seconds(create: Callable[..., SearchStudy]) -> None:
    screen = "screen: {trials: 6}\npruner: median\nbudget: {seconds: 8}\n"
    study = create(TEXT + screen)

    def judged(speed: float) -> list[int]:
        number = study.propose().number
        ticks = [{"step": t, "total_steps": 10**6, "seconds": t / 10, "samples_per_second": speed} for t in range(20)]
        return [t for t, progress in enumerate(ticks) if study.should_prune(number, progress)]

    for _ in range(4):
        assert judged(100.0) == []
        study.finish(max(study._running), OK)
    assert judged(1.0)[0] == 6  # 30 % of its 2 seconds


def test_without_a_measured_value_nothing_is_pruned(create: Callable[..., SearchStudy]) -> None:
    study = create(PRUNED)
    number = study.propose().number
    for value in (None, math.nan):
        assert not study.should_prune(number, {"step": 50, "total_steps": 100, "val_loss": value})


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "cmaes"])
def test_every_sampler_proposes_within_the_space(create: Callable[..., SearchStudy], sampler: str) -> None:
    if sampler == "cmaes":
        pytest.importorskip("cmaes", reason="the sampler needs the package cmaes")
    study = create(TEXT.replace("trials: 6", "trials: 12") + f"sampler: {sampler}\n")
    rates = set()
    for number in range(12):
        proposal = study.propose()
        assert 0.0001 <= proposal.values["lr"] <= 0.1
        rates.add(proposal.values["lr"])
        ended = (
            Ended("oom", "why", {}, 1.0) if number % 3 == 1 else Ended("ok", "", figures(proposal.values["lr"]), 1.0)
        )
        study.finish(proposal.number, ended)
    assert (len(rates), study.missing) == (12, 0)
