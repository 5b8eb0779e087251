"""What the curriculum benchmark feeds and how it compares, on values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.curriculum import spaced
from benchmarks.curriculum_data import imbalanced, scenes, wrong_labels
from benchmarks.curriculum_table import at_equal_samples, at_equal_time, mean_se


def test_wrong_labels_are_the_share_asked_for_and_always_another_class():
    labels = np.arange(1000) % 10
    given, wrong = wrong_labels(labels, 0.2, seed=3)
    assert wrong.sum() == 200
    assert ((given != labels) == wrong).all()
    assert (wrong_labels(labels, 0.2, seed=3)[0] == given).all(), "paired by the seed"


def test_imbalance_keeps_five_classes_and_a_tenth_of_the_others():
    labels = np.arange(1000) % 10
    counts = np.bincount(labels[imbalanced(labels, seed=0)], minlength=10)
    assert sorted(counts.tolist()) == [10] * 5 + [100] * 5


def test_scenes_hold_the_object_whole_and_are_the_same_for_the_same_seed():
    objects = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    objects[1] = 200
    found = scenes(objects, seed=5, device=torch.device("cpu"))
    assert found.shape == (3, 3, 128, 128)
    assert torch.equal(found, scenes(objects, seed=5, device=torch.device("cpu")))
    assert (found[1] == 200).sum() >= 3 * 32 * 32


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(5.0, 50, 0.5), (10.0, 100, 0.8)], 0.1),  # as quick as the shuffle, which ends at 10 s with 0.7
        ([(10.0, 50, 0.5), (20.0, 100, 0.8)], -0.2),  # slower: read off at 10 s
        ([(2.0, 50, 0.5), (4.0, 100, 0.8)], 0.1),  # quicker: nothing for the time left over
    ],
)
def test_at_equal_wall_time_an_arm_has_no_more_time_than_the_shuffle(curve, expected):
    arm = {"curve": curve, "accuracy": curve[-1][2], "seconds": curve[-1][0]}
    shuffle = {"accuracy": 0.7, "seconds": 10.0}
    assert at_equal_time(arm, shuffle) == pytest.approx(expected)


def test_at_equal_samples_an_arm_meets_the_shuffle_of_as_many():
    row = {"seed": 0.0, "samples": 800.0, "accuracy": 0.9}
    arms = {
        "none": {0: {"samples": 1000.0, "accuracy": 0.85}},
        "matched": {0: {"samples": 801.0, "accuracy": 0.8}},
    }
    assert at_equal_samples(row, arms) == pytest.approx(0.1)
    assert at_equal_samples(row, {"none": arms["none"]}) is None


def test_a_standard_error_is_that_of_the_mean():
    assert mean_se([1.0, 2.0, 3.0]) == "2.00 ± 0.58"  # 1 / sqrt 3
    assert mean_se([1.0], sign=True) == "+1.00"
    assert mean_se([]) == ""


def test_conditions_may_be_written_without_a_space():
    assert [spaced(name) for name in ("clean", "noise20", "imbalanced 5")] == ["clean", "noise 20", "imbalanced 5"]
