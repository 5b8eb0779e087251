"""The noise gate and the scoring functions, against cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.curriculum import scoring
from acmds_optimizer.curriculum.difficulty import ScoreStore
from acmds_optimizer.curriculum.feedback import Feedback
from acmds_optimizer.curriculum.gate import NoiseGate, find_split, flag, otsu_cut
from acmds_optimizer.errors import ConfigError

CPU = torch.device("cpu")

# --- the split


def test_two_classes_are_split_in_the_middle_of_the_gap_between_them():
    split = find_split(np.array([0.1] * 80 + [0.9] * 20))
    assert split.threshold == pytest.approx(0.5, abs=0.02)
    assert (split.lower_mode, split.upper_mode) == pytest.approx((0.1, 0.9), abs=0.04)
    assert split.valley == 0.0
    assert split.clear


def test_otsus_cut_is_where_the_variance_between_the_classes_is_largest():
    density = np.array([0.3, 0.2, 0.0, 0.1, 0.0, 0.0, 0.1, 0.3])
    positions = np.arange(8)

    def between(cut: int) -> float:
        low, high = density[: cut + 1], density[cut + 1 :]
        means = (low @ positions[: cut + 1] / low.sum(), high @ positions[cut + 1 :] / high.sum())
        return float(low.sum() * high.sum() * (means[1] - means[0]) ** 2)

    assert between(otsu_cut(density)) == pytest.approx(max(between(cut) for cut in range(7)))
    assert otsu_cut(np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.5])) == 2, "the middle of an empty gap"


def test_a_wide_class_does_not_draw_the_split_into_itself():
    rng = np.random.default_rng(0)
    wide, narrow = rng.beta(1.5, 3.0, 8000), rng.normal(0.9, 0.03, 2000).clip(0, 1)
    split = find_split(np.concatenate((wide, narrow)))
    assert 0.75 < split.threshold < 0.86
    assert split.clear


@pytest.mark.parametrize(
    "difficulty",
    [
        pytest.param(np.random.default_rng(0).uniform(0, 1, 5000), id="no valley"),
        pytest.param(np.random.default_rng(0).beta(2, 3, 5000), id="one hump"),
        pytest.param(np.array([0.05] * 900 + [0.45] * 100), id="the upper class is not contradicted"),
        pytest.param(np.array([0.6] * 500 + [0.85] * 500), id="too near"),
        pytest.param(np.full(100, 0.5), id="all alike"),
    ],
)
def test_what_is_not_two_classes_of_which_one_is_contradicted_is_not_clear(difficulty):
    assert not find_split(difficulty).clear


def test_never_more_than_half_of_a_class_is_flagged_and_the_most_difficult_first():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    difficulty = np.array([0.9, 0.7, 0.8, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    suspected = np.array([True, True, True, False, False, True, False, False, False])
    assert np.flatnonzero(flag(difficulty, suspected, labels)).tolist() == [0, 2, 5]


# --- the gate


def feed(gate: NoiseGate, wrong: list[int], losses: dict[bool, float], count: int = 40) -> None:
    """One epoch: two classes; the model predicts the other class for the samples in `wrong`, with these losses."""
    indices = torch.arange(count)
    labels = indices % 2
    is_wrong = torch.isin(indices, torch.tensor(wrong))
    predicted = torch.where(is_wrong, 1 - labels, labels)
    logits = torch.nn.functional.one_hot(predicted, 2).float() * 3
    gate.update(indices, labels, logits, torch.where(is_wrong, losses[True], losses[False]))


SPLIT = {True: 4.0, False: 0.1}


def test_the_gate_fires_after_two_clear_epochs_that_follow_the_warm_up():
    gate = NoiseGate(40, "auto")
    fired = []
    for epoch in range(4):
        feed(gate, [3, 8, 17], SPLIT)
        fired.append(gate.end_epoch((epoch + 1) / 10))
    assert fired == [False, False, True, False]
    assert np.flatnonzero(gate.flagged).tolist() == [3, 8, 17]


def test_losses_of_the_warm_up_do_not_count():
    gate = NoiseGate(40, "auto")
    feed(gate, [5], SPLIT)
    gate.end_epoch(0.1)
    feed(gate, [3, 8, 17], SPLIT)
    gate.end_epoch(0.2)
    assert gate.losses.average[5] == pytest.approx(0.1)


def test_samples_that_are_hard_only_for_a_while_do_not_make_it_fire():
    gate = NoiseGate(40, "auto")
    for epoch, hard in enumerate(([1, 2, 3], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12])):
        feed(gate, hard, SPLIT)
        assert not gate.end_epoch((epoch + 1) / 10)
    assert not gate.flagged.any()


def test_once_on_the_gate_lets_go_of_samples_that_the_model_comes_to_agree_with():
    gate = NoiseGate(40, "auto")
    for epoch in range(3):
        feed(gate, [3, 8, 17], SPLIT)
        gate.end_epoch((epoch + 1) / 10)
    feed(gate, [3, 8], SPLIT)
    assert not gate.end_epoch(0.4), "it has fired before"
    assert gate.fired
    assert np.flatnonzero(gate.flagged).tolist() == [3, 8]


def test_without_a_clear_split_nothing_is_flagged():
    gate = NoiseGate(40, "auto")
    for epoch in range(9):
        feed(gate, [3, 8, 17], {True: 0.5, False: 0.3})
        assert not gate.end_epoch((epoch + 1) / 10)
    assert not gate.flagged.any()


def test_a_fixed_rate_flags_the_highest_losses_after_the_same_wait():
    gate = NoiseGate(40, 0.1)
    for epoch in range(3):
        feed(gate, [3, 8, 17, 20], {True: 0.9, False: 0.5})
        assert gate.end_epoch((epoch + 1) / 10) == (epoch == 2)
    assert np.flatnonzero(gate.flagged).tolist() == [3, 8, 17, 20]


def test_a_fixed_rate_flags_nothing_that_was_not_seen():
    gate = NoiseGate(10, 0.5)
    gate.warm = True
    for _ in range(2):
        gate.update(torch.arange(2), torch.tensor([0, 0]), torch.zeros(2, 2), torch.tensor([1.0, 2.0]))
        gate.end_epoch(0.5)
    assert gate.fired
    assert gate.flagged.nonzero()[0].tolist() == [1]  # of the two of its class


def test_a_gate_resumed_equals_one_that_was_not_stopped():
    whole, stopped = NoiseGate(40, "auto"), NoiseGate(40, "auto")
    for gate in (whole, stopped):
        for epoch in range(2):
            feed(gate, [3, 8, 17], SPLIT)
            gate.end_epoch((epoch + 1) / 10)
    resumed = NoiseGate(40, "auto")
    resumed.load_state_dict(stopped.state_dict())
    for gate in (whole, resumed):
        feed(gate, [3, 8], SPLIT)
        assert gate.end_epoch(0.3)
    assert resumed.flagged.tolist() == whole.flagged.tolist()


# --- scoring functions

LOGITS = torch.tensor([[math.log(6.0), math.log(3.0), 0.0], [0.0, 0.0, 0.0]])  # probabilities .6 .3 .1; thirds
TARGETS = torch.tensor([1, 2])
LOSSES = torch.tensor([math.log(10 / 3), math.log(3.0)])
INDICES = torch.tensor([4, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", [math.log(10 / 3), math.log(3.0)]),
        ("margin", [(1 - (0.3 - 0.6)) / 2, 0.5]),
        ("entropy", [-(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1)) / math.log(3), 1.0]),
        ("el2n", [math.sqrt(0.6**2 + 0.7**2 + 0.1**2), math.sqrt(2 / 9 + 4 / 9)]),
    ],
)
def test_scoring_functions_have_the_values_worked_out_by_hand(name, expected):
    found = scoring.SCORING[name](LOGITS, TARGETS, LOSSES, INDICES, 0)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_forgetting_counts_falls_from_right_to_wrong_and_every_visit_of_what_never_was_right():
    forgetting = scoring.Forgetting(2)
    right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])

    def visits(index: int, outcomes: list[torch.Tensor]) -> list[float]:
        return [
            float(forgetting(logits, torch.tensor([0]), torch.ones(1), torch.tensor([index]), epoch))
            for epoch, logits in enumerate(outcomes)
        ]

    assert visits(0, [wrong, right, wrong, wrong, right, wrong]) == [1, 0, 1, 1, 1, 2]
    assert visits(1, [wrong, wrong, wrong]) == [1, 2, 3]


def by_index(logits, targets, losses, indices, epoch):
    return indices.float() / 10


def of_the_wrong_shape(logits, targets, losses, indices, epoch):
    return logits


def negative(logits, targets, losses, indices, epoch):
    return losses - 100.0


def with_too_few_arguments(logits):
    return logits


def test_any_callable_can_be_the_score():
    feedback = Feedback(ScoreStore(6), CurriculumConfig(scoring="tests.test_gate:by_index"), CPU, 3)
    assert feedback.needs_logits
    outcome = torch.cat((LOSSES[:, None], LOGITS), dim=1)
    assert feedback.losses(outcome).tolist() == LOSSES.tolist()
    feedback.update(INDICES, TARGETS, outcome, 0)
    assert feedback.scores.average.tolist() == pytest.approx([0, 0, 0.2, 0, 0.4, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("of_the_wrong_shape", r"must give a tensor of shape \(4,\) .* but gave one of shape \(4, 3\)"),
        ("negative", "finite numbers of 0 or more"),
        ("with_too_few_arguments", "raised TypeError"),
    ],
)
def test_a_callable_that_does_not_score_is_refused_before_training(name, message):
    with pytest.raises(ConfigError, match=message):
        scoring.make_scoring(f"tests.test_gate:{name}", 100, CPU, 3)


def test_an_unknown_scoring_function_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'margin'"):
        scoring.make_scoring("margins", 100, CPU, 3)


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_scores_of_a_file_stand_as_they_are(tmp_path: Path, suffix):
    path = tmp_path / f"scores{suffix}"
    values = np.array([0.0, 0.25, 1.0])
    np.save(path, values) if suffix == ".npy" else np.savetxt(path, values)
    feedback = Feedback(ScoreStore(3), CurriculumConfig(scoring=str(path)), CPU, 2)
    feedback.update(torch.tensor([1]), torch.tensor([0]), torch.tensor([9.0]), 0)
    assert feedback.scores.difficulty().tolist() == pytest.approx([0.0, 0.25, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "message"), [([0.1, 0.2], r"\(2,\) values, expected \(3,\)"), ([0.0, 2.0, 5.0], "go from 0 to 5")]
)
def test_a_file_of_scores_that_does_not_fit_is_refused(tmp_path: Path, values, message):
    np.save(tmp_path / "scores.npy", np.array(values))
    with pytest.raises(ConfigError, match=message):
        Feedback(ScoreStore(3), CurriculumConfig(scoring=str(tmp_path / "scores.npy")), CPU, 2)
