"""Scores, pacing and order, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.curriculum.dataset import DifficultyAwareDataset
from acmds_optimizer.curriculum.difficulty import ScoreStore
from acmds_optimizer.curriculum.pacing import PACING, admitted_share
from acmds_optimizer.curriculum.sampler import AdaptiveCurriculumSampler, plan_epoch
from acmds_optimizer.memory.controller import MemoryPressureController
from acmds_optimizer.memory.device import BudgetedCpuMemory

NUMBERS: Any = list(range(100))


def controller(**settings) -> MemoryPressureController:
    config = CurriculumConfig(target_headroom_gb=0.1, **settings)
    return MemoryPressureController("cpu", config, memory=BudgetedCpuMemory(2**30))


# --- scores


def test_a_score_is_the_mean_of_its_first_losses_and_then_a_moving_average():
    store = ScoreStore(3, alpha=0.25)
    for loss in (4.0, 2.0, 3.0, 7.0, 1.0):
        store.update(torch.tensor([1]), torch.tensor([loss]))
    # 4; 3; 3; (3*3+7)/4 = 4; then a quarter of the new one: 4 + (1-4)/4
    assert store.average.tolist() == [0.0, 3.25, 0.0]
    assert store.difficulty().tolist() == pytest.approx([0.5, 1 - math.exp(-3.25), 0.5])


def test_a_loss_that_is_not_finite_leaves_the_score_as_it_was():
    store = ScoreStore(2)
    store.update(torch.tensor([0, 1]), torch.tensor([1.0, math.nan]))
    store.update(torch.tensor([0]), torch.tensor([math.inf]))
    assert store.average.tolist() == [1.0, 0.0]
    assert store.count.tolist() == [1, 0]


def test_scores_survive_a_checkpoint_and_refuse_another_size():
    store = ScoreStore(4)
    store.update(torch.tensor([2]), torch.tensor([0.7]))
    copy = ScoreStore(4)
    copy.load_state_dict(store.state_dict())
    assert torch.equal(copy.difficulty(), store.difficulty())
    with pytest.raises(ValueError, match="5 samples do not fit a data set of 4"):
        copy.load_state_dict(ScoreStore(5).state_dict())


def test_the_dataset_hands_out_data_difficulty_cost_and_index():
    letters: Any = ["a", "b"]
    dataset = DifficultyAwareDataset(letters, difficulty_scores=[0.25, 0.75], memory_costs=[1.0, 4.0])
    item = dataset[-1]
    assert (item["data"], item["index"]) == ("b", 1)
    assert float(item["difficulty"]) == pytest.approx(0.75)
    assert float(item["memory_cost"]) == 4.0
    dataset.update_difficulties(torch.tensor([0]), torch.tensor([5.0]))
    assert float(dataset.difficulty_scores[0]) > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty_scores": [0.1]}, r"shape \(1,\), expected \(2,\)"),
        ({"difficulty_scores": [0.1, 1.5]}, r"must lie in \[0, 1\]"),
        ({"memory_costs": [1.0, 0.0]}, "above 0"),
    ],
)
def test_scores_and_costs_of_the_wrong_kind_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DifficultyAwareDataset(NUMBERS[:2], **arguments)


# --- pacing


@pytest.mark.parametrize(
    ("name", "expected"),  # at t = 0, 0.25, 0.5 and 1, from a share of 0.2
    [
        ("none", (1.0, 1.0, 1.0, 1.0)),
        ("linear", (0.2, 0.4, 0.6, 1.0)),
        ("root", (0.2, math.sqrt(0.04 + 0.24), math.sqrt(0.52), 1.0)),
        ("quadratic", (0.2, 0.25, 0.4, 1.0)),
        ("exponential", (0.2, 0.200406, 0.205354, 1.0)),
        ("logarithmic", (0.2, 0.889111, 0.944556, 1.0)),
        ("step", (0.2, 0.2, 0.2, 1.0)),
    ],
)
def test_pacing_functions_have_the_values_worked_out_by_hand(name, expected):
    found = [PACING[name](t, 0.2) for t in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_every_sample_is_admitted_from_the_end_of_the_pacing_on():
    assert admitted_share("linear", 0.0, 0.4, 0.5) == pytest.approx(0.4)
    assert admitted_share("linear", 0.25, 0.4, 0.5) == pytest.approx(0.7)
    assert admitted_share("linear", 0.5, 0.4, 0.5) == 1.0
    assert admitted_share("linear", 0.9, 0.4, 0.5) == 1.0


# --- order


@pytest.mark.parametrize(("direction", "share"), [("none", 0.3), ("auto", 0.3), ("easy", 1.0), ("hard", 1.0)])
def test_without_a_curriculum_the_order_is_the_seeded_shuffle_bit_for_bit(direction, share):
    config = CurriculumConfig(direction=direction, seed=5)
    plan = plan_epoch(np.linspace(0, 1, 50), 7, share, config)
    assert plan.order.tolist() == np.random.default_rng((5, 7)).permutation(50).tolist()
    assert (plan.weights == 1).all()


@pytest.mark.parametrize(("direction", "first"), [("easy", range(30)), ("hard", range(70, 100))])
def test_the_admitted_share_is_the_easy_or_the_hard_end(direction, first):
    config = CurriculumConfig(direction=direction)
    plan = plan_epoch(np.linspace(0, 1, 100), 0, 0.3, config)
    weights = dict(zip(plan.order.tolist(), plan.weights.tolist(), strict=True))
    assert {index for index, weight in weights.items() if weight == 1} == set(first)
    assert {weights[index] for index in weights if index not in first} == {3.0}
    assert len(weights) == pytest.approx(30 + 70 / 3, abs=6)
    assert len(set(plan.order.tolist())) == len(plan.order), "drawn without replacement"


@pytest.mark.parametrize("direction", ["easy", "hard", "random"])
def test_every_sample_is_seen_within_the_coverage_epochs(direction):
    config = CurriculumConfig(direction=direction, coverage_epochs=4)
    rng = np.random.default_rng(0)
    last_seen = np.full(60, -1)
    for epoch in range(20):
        plan = plan_epoch(rng.random(60), epoch, 0.25, config)
        assert (epoch - last_seen <= 4).all()
        last_seen[plan.order] = epoch


@pytest.mark.parametrize("direction", ["easy", "hard", "random"])
def test_the_weighted_gradient_sum_over_4000_draws_is_the_full_one(direction):
    rng = np.random.default_rng(1)
    inputs, labels, weights = rng.normal(1.0, 1.0, (40, 5)), rng.integers(0, 2, 40), rng.normal(size=5)
    probabilities = 1 / (1 + np.exp(-inputs @ weights))
    gradients = (probabilities - labels)[:, None] * inputs  # of logistic regression, one row a sample
    losses = -np.log(np.where(labels == 1, probabilities, 1 - probabilities))
    drawn = np.zeros(5)
    for seed in range(4000):
        plan = plan_epoch(losses, seed % 3, 0.3, CurriculumConfig(direction=direction, seed=seed))
        drawn += plan.weights @ gradients[plan.order] / 4000
    full = gradients.sum(axis=0)
    assert np.linalg.norm(drawn - full) <= 0.03 * np.linalg.norm(full)


def test_a_matched_shuffle_feeds_as_many_samples_as_the_curriculum_with_weight_one():
    scores = np.linspace(0, 1, 100)
    plan = plan_epoch(scores, 4, 0.4, CurriculumConfig(direction="matched", coverage_epochs=3, seed=2))
    # 40 admitted, a third of the other 60
    assert plan.order.tolist() == np.random.default_rng((2, 4)).permutation(100)[:60].tolist()
    assert (plan.weights == 1).all()


def test_flagged_samples_ride_along_at_weight_0_and_the_others_keep_the_sum():
    flagged = np.zeros(10, dtype=bool)
    flagged[[2, 7]] = True
    plan = plan_epoch(np.zeros(10), 3, 1.0, CurriculumConfig(seed=1), flagged)
    assert plan.order.tolist() == np.random.default_rng((1, 3)).permutation(10).tolist()
    weights = dict(zip(plan.order.tolist(), plan.weights.tolist(), strict=True))
    assert weights == {index: 0.0 if index in (2, 7) else 1.25 for index in range(10)}


# --- the batch sampler


@pytest.mark.parametrize("direction", ["none", "easy"])
def test_an_epoch_ends_and_its_length_is_what_is_yielded(direction):
    sampler = AdaptiveCurriculumSampler(
        DifficultyAwareDataset(NUMBERS), controller(max_batch_size=32, direction=direction)
    )
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert [len(b) for b in batches[:-1]] == [32] * (len(batches) - 1)
        assert [i for b in batches for i in b] == sampler.plan.order.tolist()


def test_with_a_free_batch_the_lists_follow_the_controller_and_no_sample_is_lost():
    ctrl = controller(batch_policy="free", min_batch_size=4, max_batch_size=64)
    sampler = AdaptiveCurriculumSampler(DifficultyAwareDataset(NUMBERS), ctrl)
    seen, sizes = [], []
    for batch in sampler:
        seen += batch
        sizes.append(len(batch))
        if len(sizes) == 3:
            ctrl.out_of_memory(4)
    assert sorted(seen) == NUMBERS
    assert sizes[:3] == [4, 4, 4]
    assert max(sizes[3:]) < 4
    with pytest.raises(TypeError, match="not known ahead"):
        len(sampler)


def test_resuming_in_the_middle_of_an_epoch_equals_not_stopping():
    def make() -> AdaptiveCurriculumSampler:
        scores = np.random.default_rng(0).random(100)
        dataset = DifficultyAwareDataset(NUMBERS, scores)
        return AdaptiveCurriculumSampler(dataset, controller(max_batch_size=16, direction="easy"))

    whole = make()
    whole.set_epoch(2)
    expected = list(whole)
    stopped = make()
    stopped.set_epoch(2)
    iterator = iter(stopped)
    got = [next(iterator) for _ in range(2)]
    state = stopped.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    got += list(resumed)
    assert got == expected
    assert next(iter(resumed)) == expected[0], "the next epoch starts at its beginning"


def test_batches_that_a_loader_has_asked_for_ahead_are_not_lost_by_who_says_what_was_trained_on():
    dataset = DifficultyAwareDataset(NUMBERS)
    sampler = AdaptiveCurriculumSampler(dataset, controller(max_batch_size=8))
    ahead = iter(sampler)
    expected = [next(ahead) for _ in range(7)]  # as two workers do, while the third batch is trained on
    resumed = AdaptiveCurriculumSampler(dataset, controller(max_batch_size=8))
    resumed.load_state_dict(sampler.state_dict(trained=24))
    assert list(resumed)[:4] == expected[3:]
