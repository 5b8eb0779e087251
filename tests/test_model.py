"""The models of peak memory and of time, against curves worked out by hand."""

from __future__ import annotations

import json
import math
import random

import pytest

from acmds_optimizer.memory.model import PeakModel, TimeModel
from tests.plants import resnet50_seconds

# ResNet-50 at 224 px with AdamW, MiB by batch size (shared measurements; docs/memory.md)
RESNET50 = {1: 488.0, 4: 677.0, 16: 1635.0, 64: 5593.0, 256: 21469.0}


def taught(points, base=0.0, times=3) -> PeakModel:
    model = PeakModel()
    for step, (work, peak) in enumerate(point for point in points for _ in range(times)):
        model = model.observe(work, peak, base, step)
    return model


def line(work: float) -> float:
    return 1000.0 + 50.0 * work


def test_a_line_is_extrapolated_exactly_from_three_sizes():
    model = taught([(w, line(w)) for w in (8, 32, 128)], base=600.0)
    assert model.predict(512) == pytest.approx(line(512))


def test_resnet50_at_256_is_predicted_from_up_to_64_within_two_percent():
    model = taught([(w, peak) for w, peak in RESNET50.items() if w <= 64], base=300.0)
    assert model.predict(256) == pytest.approx(RESNET50[256], rel=0.02)


def test_one_size_is_extrapolated_by_the_line_from_what_is_there_between_steps():
    model = taught([(4, line(4))], base=800.0)
    assert model.predict(12) == pytest.approx(800 + 3 * (line(4) - 800))


def test_what_lies_between_steps_moves_every_prediction_as_soon_as_it_is_measured():
    model = taught([(w, line(w)) for w in (8, 32, 128)], base=600.0)
    after = model.observe(8, line(8) + 4000.0, 4600.0, 10)
    assert [after.predict(w) for w in (8, 32, 128, 512)] == pytest.approx([line(w) + 4000.0 for w in (8, 32, 128, 512)])
    assert after.residuals[-1] == pytest.approx(0.0)
    assert after.work_within(line(100) + 4000.0) == pytest.approx(model.work_within(line(100)), rel=0.1)


def test_extrapolation_is_never_too_low_past_any_hinge():
    for seed in range(300):
        r = random.Random(seed)
        base, start, slope = r.uniform(0, 900), 1000.0, r.uniform(1, 50)
        floor = r.uniform(1000, 4000)
        sizes = sorted(r.sample(range(1, 100), r.choice([1, 2])))
        model = taught([(w, max(floor, start + slope * w)) for w in sizes], base=base)
        for work in (sizes[-1] + 1, 2 * sizes[-1], 10 * sizes[-1]):
            assert model.predict(work) >= max(floor, start + slope * work) - 1e-6


def test_a_flat_floor_of_many_sizes_is_not_taken_for_a_line():
    model = taught([(w, 3000.0) for w in (4, 8, 16, 32)], base=1000.0)
    assert model.slope == pytest.approx(2000 / 32)
    assert model.least_slope == 0.0


def test_two_sizes_however_far_apart_say_how_steep_it_is_at_least():
    far, straight = taught([(4, line(4)), (256, line(256))]), line(512)
    assert far.least(512) == pytest.approx(straight * 1.05)
    assert taught([(4, 3000.0), (256, line(256))]).least(512) < straight * 1.05, "the smaller may lie on a floor"
    assert taught([(256, line(256))]).least_slope == 0.0


def test_between_sizes_a_hinge_is_never_predicted_too_low():
    model = taught([(w, max(3000.0, line(w))) for w in (4, 32, 128)])
    for work in range(4, 129):
        assert model.predict(work) >= max(3000.0, line(work)) - 1e-6


def test_work_within_is_the_inverse_of_predict_margin_included():
    model = taught([(w, max(3000.0, line(w))) for w in (4, 32, 64, 128)], base=500.0)
    for work in (70, 100, 128, 300):
        limit = model.predict(work) * (1 + model.margin_fraction)
        assert model.work_within(limit) == pytest.approx(work)


def test_work_within_never_falls_as_the_limit_rises():
    for seed in range(100):
        r = random.Random(seed)
        model = taught([(r.uniform(1, 300), r.uniform(500, 9000)) for _ in range(6)], base=300.0)
        within = [model.work_within(limit) for limit in range(0, 20_000, 250)]
        assert within == sorted(within)


def test_nothing_fits_below_what_is_there_between_steps():
    assert taught([(4, line(4))], base=800.0).work_within(700.0) == 0.0
    assert PeakModel().work_within(1e9) == 0.0


def test_before_ten_errors_the_margin_is_five_percent_and_then_what_they_say():
    model = taught([(8, line(8))], times=5)
    assert model.margin_fraction == 0.05
    assert taught([(8, line(8))], times=20).margin_fraction == 0.005


def test_the_margin_is_the_99_percent_quantile_of_the_errors():
    r = random.Random(0)
    model = PeakModel()
    for step in range(2000):
        model = model.observe(64, line(64) * (1 + 0.02 * r.gauss(0, 1)), 500.0, step)
    assert sum(error > model.margin_fraction for error in model.residuals) <= 2
    assert 0.03 < model.margin_fraction < 0.08


def test_an_extrapolation_that_was_wrong_does_not_widen_the_margin():
    model = taught([(w, line(w)) for w in (8, 32, 128)], times=12)
    margin = model.margin_fraction
    model = model.observe(256, 1.3 * line(256), 500.0, 100)
    assert model.margin_fraction == margin
    assert model.predict(256) == pytest.approx(1.3 * line(256))


def test_one_stray_peak_is_not_learned_from():
    model = taught([(w, line(w)) for w in (8, 32, 128)], times=12)
    after = model.observe(128, 1.5 * line(128), 0.0, 50)
    assert after.predict(128) == model.predict(128)
    assert after.margin_fraction < 0.01


@pytest.mark.parametrize("factor", [1.3, 0.7])
def test_a_stray_that_comes_back_at_its_own_size_is_what_that_size_needs(factor):
    model = taught([(w, line(w)) for w in (8, 32, 128)], times=12)
    for step in range(50, 80):
        special = step in (50, 60, 70)
        model = model.observe(64 if special else 128, line(64) * factor if special else line(128), 0.0, step)
        if step == 50:
            assert model.predict(64) == pytest.approx(line(64))
    assert model.predict(64) == pytest.approx(line(64) * factor)
    assert [model.predict(w) for w in (8, 32, 128)] == pytest.approx([line(w) for w in (8, 32, 128)])
    assert max(abs(error) for error in model.residuals) < 1e-9
    assert model.margin_fraction == 0.005


@pytest.mark.parametrize("between", [64, 66])
def test_a_stray_is_not_learned_from_where_a_usual_step_of_its_size_came_between(between):
    model = taught([(w, line(w)) for w in (8, 32, 64, 128)], times=12)
    for step, work, factor in ((50, 64, 1.3), (51, between, 1.0), (52, 64, 1.3), (53, 128, 1.0)):
        model = model.observe(work, factor * line(work), 0.0, step)
    assert model.predict(64) == pytest.approx(line(64), rel=0.01)
    assert model.margin_fraction == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("factor", [1.4, 0.6])
def test_two_surprises_in_a_row_make_it_forget_what_was_before(factor):
    model = taught([(w, line(w)) for w in (8, 32, 128)], times=12)
    for step in (50, 51):
        model = model.observe(128, factor * line(128), 500.0, step)
    assert model.sizes == 1
    assert model.predict(128) == pytest.approx(factor * line(128))


def test_the_second_step_at_a_size_replaces_the_first_which_may_have_searched_for_kernels():
    model = PeakModel().observe(8, 9999.0, 0.0, 0).observe(8, line(8), 0.0, 1)
    assert model.predict(8) == line(8)


def test_what_was_seen_once_is_forgotten_after_500_steps_and_the_smallest_never():
    model = taught([(4, line(4))], times=1).observe(32, line(32), 0.0, 1)
    for step in range(2, 600):
        model = model.observe(64, line(64), 0.0, step)
    assert [bin_.work for bin_ in model.bins] == [4, 64]


def test_thousands_of_steps_at_one_size_leave_the_others_known():
    model = taught([(w, line(w)) for w in (8, 32)], times=8)
    for step in range(16, 3000):
        model = model.observe(128, line(128), 0.0, step)
    assert model.predict(32) == pytest.approx(line(32))


def test_the_number_of_bins_is_bounded_for_work_of_any_size():
    r = random.Random(0)
    model = PeakModel()
    for step in range(3000):
        work = r.uniform(1, 1000)
        model = model.observe(work, line(work), 500.0, step)
    assert model.sizes <= 8 * math.log2(1000) + 1


def test_a_model_from_its_state_dict_predicts_and_learns_the_same():
    model = taught([(w, line(w)) for w in (8, 32, 128)], base=500.0, times=5)
    again = PeakModel.from_state_dict(json.loads(json.dumps(model.state_dict())))
    assert again == model
    assert again.observe(40, 2900.0, 500.0, 99) == model.observe(40, 2900.0, 500.0, 99)


def test_a_model_from_its_state_dict_knows_the_stray_that_was_seen_once():
    model = taught([(w, line(w)) for w in (8, 32, 128)], times=12).observe(64, 1.3 * line(64), 0.0, 50)
    state = json.loads(json.dumps(model.state_dict()))
    assert PeakModel.from_state_dict(state) == model
    again = PeakModel.from_state_dict(state).observe(64, 1.3 * line(64), 0.0, 51)
    assert again.predict(64) == pytest.approx(1.3 * line(64))
    del state["strays"]  # of an earlier version
    assert PeakModel.from_state_dict(state).strays == ()


# --- time


def timed(seconds, sizes, times=3) -> TimeModel:
    model = TimeModel()
    for size in sizes:
        for _ in range(times):
            model = model.observe(size, seconds(size))
    return model


def test_the_gain_of_a_timed_size_is_the_ratio_of_measured_rates():
    model = timed(resnet50_seconds, (64, 128, 256))
    assert model.gain(128, [256]) == pytest.approx(6086 / 5462 - 1)


def test_the_gain_of_an_untimed_size_lies_on_the_line_of_the_last_two():
    model = timed(lambda size: 10.0 + size, (10, 20))
    assert model.gain(20, [40]) == pytest.approx((40 / 50) / (20 / 30) - 1)


def test_the_gain_is_that_of_the_best_of_the_larger_sizes():
    model = timed(lambda size: 10.0 + size, (10, 20))
    assert model.gain(20, [30, 40]) == model.gain(20, [40])


def test_the_gain_cannot_be_told_from_one_size():
    assert timed(lambda size: 1.0, (8,)).gain(8, [16]) is None
    assert timed(lambda size: 1.0, (8, 16), times=2).gain(16, [32]) is None


def test_one_slow_step_does_not_move_the_median():
    model = timed(lambda size: 1.0, (8,), times=4).observe(8, 50.0)
    assert model.medians() == {8: 1.0}


def test_the_knee_is_the_smallest_size_about_as_fast_as_the_fastest():
    model = timed(lambda size: max(64, size) / 1000, (16, 32, 64, 128, 256))
    assert model.knee(0.015) == 64


def test_there_is_no_knee_while_the_largest_size_is_clearly_the_fastest():
    assert timed(resnet50_seconds, (32, 64, 128)).knee(0.015) == 0
    assert timed(resnet50_seconds, (32,)).knee(0.015) == 0


@pytest.mark.parametrize("row", [[8.0, 1e9, 1.0], [8.0, 1e9, 1.0, 0.0, 5.0]])
def test_a_state_whose_rows_have_another_length_is_refused(row):
    state = taught([(8, line(8))]).state_dict()
    with pytest.raises(ValueError, match="values to unpack"):
        PeakModel.from_state_dict(state | {"bins": [row]})


def test_the_seconds_of_a_micro_batch_and_of_its_samples_lie_on_the_line_through_two_sizes():
    times = TimeModel(needed=1)
    for size in (4, 64, 128, 256):
        times = times.observe(size, max(0.01, 0.0047 + 0.0002 * size))
    assert times.line(256) == pytest.approx((0.0047, 0.0002))
    assert times.line(120) == pytest.approx((0.0047, 0.0002))
    alone = TimeModel(needed=1).observe(100, 0.1)
    assert alone.line(7) == pytest.approx((0.01, 0.0009))
    bound = alone.observe(50, 0.1)
    assert bound.line(100) == pytest.approx((0.09, 0.0001)), "of launches alone: samples still count a tenth"
    assert all(math.isnan(value) for value in TimeModel().line(8))


def test_a_clock_too_coarse_to_tell_a_step_does_not_count():
    model = TimeModel()
    for batch in (4, 8, 8, 8, 16):
        for seconds in (0.01 * batch, 0.0, math.nan):
            model = model.observe(batch, seconds if batch == 8 else 0.01 * batch)
    assert model.medians() == {4: 0.04, 8: 0.08, 16: 0.16}
    assert model.gain(8, [16]) == pytest.approx(0.0)
