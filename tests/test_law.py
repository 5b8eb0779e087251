"""The memory law in closed loop on simulated plants (tests/plants.py), and its rules one by one."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from dataclasses import replace

import pytest

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.memory import law
from acmds_optimizer.memory.model import PeakModel, TimeModel
from tests.plants import (
    Ours,
    Plant,
    breaches,
    changes,
    comes_and_goes,
    errors,
    growing,
    heavy_tailed,
    knee_at,
    largest_fitting,
    limits,
    resnet50_seconds,
    scaled,
    simulate,
    standard,
    steps_of_neighbour,
    used,
)

STATIC = Plant("static")
NO_GAINS = (0.0, 0.0, 0.0)
SETTLED = 20
"""Steps after which a static plant has its size."""


def run(plant=STATIC, steps=300, seed=0, timed=True, **asked):
    chooser = Ours(limits(**asked), timed=timed)
    rows = simulate(chooser, plant, steps, seed, headroom_gb=asked.get("headroom_gb", 3.0))
    return chooser, rows


@dataclasses.dataclass
class Straying(Ours):
    """Some steps need 15 % more than others of as much work, for no reason."""

    chance: random.Random = dataclasses.field(default_factory=random.Random)
    share: float = 0.0

    def observe(self, batch: int, work: float, peak: float, base: float, budget: float, step: int) -> None:
        super().observe(batch, work, peak * (1.15 if self.chance.random() < self.share else 1.0), base, budget, step)


def random_plant(seed: int) -> tuple[Plant, law.Limits]:
    """A static plant of any card, hinge and slope on which the smallest size keeps the headroom with 10 % to spare."""
    r = random.Random(seed)
    while True:
        card = r.choice([6.0, 24.0, 140.0])
        base = card * r.uniform(0.02, 0.3)
        plant = Plant(
            f"random {seed}",
            card_gb=card,
            base_gb=base,
            intercept_gb=base + card * r.uniform(0.0, 0.05),
            slope_gb=card / r.uniform(20, 600),
            floor_gb=card * r.choice([0.0, r.uniform(0.05, 0.6)]),
        )
        policy = r.choice(["free", "hold"])
        effective = r.choice([None, 48, 2048]) if policy == "hold" else None
        asked = limits(low=r.choice([1, 4, 16]), high=r.choice([64, 512]), policy=policy, effective=effective)
        if plant.peak(law.first_batch(asked), 0) <= 0.9 * (card - 3.0) * GIB:
            return plant, asked


def random_state(r: random.Random, asked: law.Limits) -> law.State:
    """A state that nothing guarantees to be a sensible one."""
    usual = [size for size in asked.buckets if size >= asked.min_batch]
    peaks, times = PeakModel(), TimeModel()
    for step in range(r.randint(1, 30)):
        work = r.choice(usual) * r.choice([1.0, 1.0, r.uniform(0.5, 2)])
        peak = (1.4 + 0.09 * work) * GIB * r.uniform(0.8, 1.2)
        peaks = peaks.observe(work, peak, GIB, step)
    for _ in range(r.randint(0, 20)):
        size = r.choice(usual)
        times = times.observe(size, (r.choice([0.0, 0.05]) + 0.001 * size) * r.uniform(0.9, 1.1))
    return law.State(
        batch=r.choice(asked.buckets),
        peaks=peaks,
        times=times,
        p=r.uniform(-0.1, 0.1),
        i=-r.choice([0.0, r.uniform(0, 0.5)]),
        d=r.uniform(-0.1, 0.1),
        work=r.choice(usual) * r.uniform(0.5, 1.5),
        calm_steps=r.randint(0, 20),
        held_steps=r.randint(0, 30),
        disturbed=r.random() < 0.5,
        ceiling_work=r.choice([math.inf, r.choice(usual)]),
        ceiling_room=r.uniform(5, 25) * GIB,
        ceiling_step=r.choice([0, 200]),
        knee_batch=r.choice([0, 0, r.choice(usual)]),
        timed_work=1.0,
    )


# --- sign


def test_more_free_memory_never_means_a_smaller_batch_in_any_state():
    for seed in range(1000):
        r = random.Random(seed)
        asked = limits(knee=r.choice([0.0, 0.03]), policy=r.choice(["free", "hold"]), low=r.choice([1, 4, 16]))
        state, sample_work = random_state(r, asked), r.choice([1.0, r.uniform(0.5, 3)])
        sizes = [
            law.decide(state, asked, budget * GIB, sample_work, 100)[1].batch
            for budget in (0.5, 2, 5, 8, 13, 21, 23, 24)
        ]
        assert sizes == sorted(sizes), seed


def test_more_memory_at_an_error_never_means_a_smaller_retry():
    for seed in range(300):
        r = random.Random(seed)
        asked = limits()
        state, batch = random_state(r, asked), r.choice(asked.buckets[1:])
        failure = law.Failure(100, batch, float(batch), 0.0, r.choice([0.0, 2.0 * GIB]), r.choice([1, 2]))
        sizes = [law.fail(state, replace(failure, budget_bytes=b * GIB), asked)[1].batch for b in (1, 4, 9, 16, 24)]
        assert sizes == sorted(sizes), seed


def test_larger_samples_never_mean_a_larger_batch_once_settled():
    chooser, _ = run()
    sizes = [law.decide(chooser.state, chooser.limits, 24 * GIB, work, 300)[1].batch for work in (0.5, 1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_step_with_a_higher_peak_never_raises_the_trim():
    for seed in range(300):
        r = random.Random(seed)
        asked = limits()
        state = replace(random_state(r, asked), target=20.0 * GIB, batch=8)
        trims = []
        for peak in (5, 15, 19, 21, 23, 30):
            seen = law.Observation(100, 8, state.peaks.largest_work, peak * GIB, GIB, 23 * GIB)
            trims.append(law.observe(state, seen, asked).trim)
        assert trims == sorted(trims, reverse=True), seed


# --- static plants


@pytest.mark.parametrize("card_gb", [6.0, 24.0, 140.0])
def test_a_static_plant_settles_within_20_steps_at_the_largest_size_that_fits(card_gb):
    plant = scaled(STATIC, card_gb)
    chooser, rows = run(plant, 1200)  # longer than anything is remembered that was seen once or twice
    best = largest_fitting(plant, chooser.limits.buckets, 1)
    assert {row.batch for row in rows[SETTLED:]} == {best}
    assert breaches(rows) == errors(rows) == 0


def test_a_hinge_then_a_line_settles_at_the_largest_size_that_fits():
    chooser, rows = run(replace(STATIC, floor_gb=9.0))
    assert {row.batch for row in rows[SETTLED:]} == {largest_fitting(STATIC, chooser.limits.buckets, 1)}
    assert errors(rows) == 0


def test_random_static_plants_never_run_out_of_memory_and_keep_the_headroom_after_20_steps():
    reached = []
    for seed in range(150):
        plant, asked = random_plant(seed)
        rows = simulate(Ours(asked), plant, 100, seed)
        assert errors(rows) == 0, plant
        assert breaches(rows[SETTLED:]) == 0, plant
        assert breaches(rows[:SETTLED]) <= 2, plant
        best = largest_fitting(plant, [size for size in asked.buckets if size >= asked.min_batch], 1)
        reached.append(rows[-1].batch / best)
    assert sum(reached) / len(reached) > 0.95


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.03])
def test_a_noisy_plant_keeps_the_headroom_in_99_percent_of_steps(noise):
    for seed in range(3):
        _, rows = run(replace(STATIC, noise=noise), 1000, seed)
        assert errors(rows) == 0
        assert breaches(rows) <= 10
        assert used(rows) > 0.8
        assert changes(rows[SETTLED:]) <= 10


def test_workspace_that_jumps_at_some_sizes_is_learned_once():
    plant = replace(STATIC, workspace=((48, 1.03), (110, 1.04), (180, 1.05)))
    chooser, rows = run(plant, 1000)
    assert rows[-1].batch == largest_fitting(plant, chooser.limits.buckets, 1)
    assert errors(rows) == 0
    assert breaches(rows) <= 1
    assert changes(rows[SETTLED:]) == 0


@pytest.mark.parametrize("factor", [1.2, 1.4])
def test_one_size_that_needs_more_than_its_neighbours_is_learned_and_costs_the_others_no_margin(factor):
    bump = ((95, factor), (105, 1 / factor))  # the last batch of each epoch
    chooser, rows = run(replace(STATIC, workspace=bump, epoch_samples=216 * 11 + 100), 600)
    assert errors(rows) == breaches(rows) == 0
    assert {row.decided for row in rows[50:]} == {216}
    assert chooser.state.peaks.margin_fraction == 0.005
    assert chooser.state.peaks.predict(100) == pytest.approx(factor * STATIC.peak(100, 0))


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_strays_at_random_sizes_do_not_ruin_the_fit(share):
    plant = replace(STATIC, sample_work=heavy_tailed(), noise=0.01)
    for seed in range(3):
        chooser = Straying(limits(), chance=random.Random(seed), share=share)
        rows = simulate(chooser, plant, 1500, seed)
        assert errors(rows) == 0
        assert breaches(rows) <= 15
        assert used(rows[SETTLED:]) > 0.79
        predicted = [chooser.state.peaks.predict(work) / plant.peak(work, 0) for work in (100, 150, 200)]
        assert 0.95 < min(predicted) <= max(predicted) < 1.06


def test_a_headroom_that_cannot_be_kept_gives_the_smallest_size_and_says_so():
    _, rows = run(replace(STATIC, intercept_gb=22.0))
    assert {row.batch for row in rows[1:]} == {4}
    assert rows[-1].reason == "min_batch"


# --- samples


def test_growing_samples_shrink_the_batch_without_an_error_or_a_breach():
    _, rows = run(replace(STATIC, sample_work=growing(800, 4.0)), 1000)
    assert errors(rows) == breaches(rows) == 0
    assert used(rows) > 0.88
    assert 45 <= rows[-1].batch <= 54


def test_heavy_tailed_samples_use_the_memory_without_an_error():
    _, rows = run(replace(STATIC, sample_work=heavy_tailed(), noise=0.01), 1500)
    assert errors(rows) == 0
    assert breaches(rows) <= 15
    assert used(rows[SETTLED:]) > 0.88


def test_a_ceiling_set_by_one_large_sample_leaves_small_samples_alone():
    chooser, rows = run(replace(STATIC, sample_work=heavy_tailed(), noise=0.01), 300)
    failure = law.Failure(300, 54, 54 * 4.0, 24 * GIB, 0.0)
    state, _ = law.fail(chooser.state, failure, chooser.limits)
    for _ in range(10):
        state = law.observe(state, law.Observation(301, 40, 160.0, rows[-1].peak, GIB, 24 * GIB), chooser.limits)
    small = law.decide(state, chooser.limits, 24 * GIB, 1.0, 311)[1].batch
    large = law.decide(state, chooser.limits, 24 * GIB, 4.0, 311)[1].batch
    assert small > 150
    assert large < 54


def test_the_last_batch_of_an_epoch_does_not_disturb_the_decision():
    chooser, rows = run(replace(STATIC, epoch_samples=1007), 500)
    assert sum(row.batch < row.decided for row in rows[SETTLED:]) > 50
    assert {row.decided for row in rows[SETTLED:]} == {216}
    assert chooser.state.i == 0.0


# --- neighbours


@pytest.mark.parametrize("card_gb", [6.0, 24.0, 140.0])
def test_it_shrinks_at_once_for_a_neighbour_and_is_back_within_10_steps_after_it_left(card_gb):
    plant = scaled(replace(STATIC, neighbour_gb=steps_of_neighbour(8.0, 100, 300)), card_gb)
    chooser, rows = run(plant, 400)
    alone = rows[99].batch
    assert rows[100].batch < alone
    assert breaches(rows[99:]) == errors(rows) == 0
    smaller = replace(plant, neighbour_gb=lambda step: 8.0 * card_gb / 24.0)
    assert rows[299].batch == largest_fitting(smaller, chooser.limits.buckets, 1)
    assert rows[310].batch == alone


def test_growth_waits_10_steps_after_the_last_cut():
    chooser, _ = run()
    state, _ = law.decide(chooser.state, chooser.limits, 16 * GIB, 1.0, 300)
    reasons = []
    for step in range(301, 313):
        seen = law.Observation(step, state.batch, state.batch, STATIC.peak(state.batch, 0), GIB, 24 * GIB)
        state = law.observe(state, seen, chooser.limits)
        state, decision = law.decide(state, chooser.limits, 24 * GIB, 1.0, step)
        reasons.append(decision.reason)
    assert reasons[:9] == ["calm"] * 9
    assert reasons[9] == "grow"


def test_a_neighbour_that_comes_in_mid_step_costs_one_error_each_time():
    plant = replace(STATIC, neighbour_gb=comes_and_goes(8.0, 100), seen_neighbour=False)
    _, rows = run(plant, 1000)
    assert errors(rows) == 5
    assert breaches(rows) <= 5
    assert rows[199].batch == rows[399].batch == 128


# --- plants that change


@pytest.mark.parametrize(("factor", "final"), [(1.4, 152), (0.6, 304)])
def test_a_slope_that_changes_mid_run_is_followed_within_30_steps(factor, final):
    plant = replace(STATIC, slope_factor=lambda step: factor if step >= 150 else 1.0)
    _, rows = run(plant, 300)
    assert rows[180].batch >= final
    assert errors(rows) <= 2
    assert breaches(rows[152:]) == 0


def test_no_wind_up_after_500_steps_clamped_at_the_largest_size():
    plant = replace(STATIC, neighbour_gb=steps_of_neighbour(18.0, 500, 600))
    _chooser, rows = run(plant, 700, high=32)
    assert {row.reason for row in rows[SETTLED:500]} == {"max_batch"}
    assert {row.trim for row in rows[:500]} == {0.0}
    assert rows[500].batch < 32
    assert breaches(rows) == errors(rows) == 0


def test_no_wind_up_after_500_steps_clamped_at_the_smallest_size():
    plant = replace(STATIC, neighbour_gb=steps_of_neighbour(20.0, 50, 550))  # 4 GB left: target 1, step 1.8
    _, rows = run(plant, 600)
    assert {row.reason for row in rows[51:550]} == {"min_batch"}
    assert rows[549].i == 0.0
    assert rows[560].batch == rows[49].batch


# --- the PID


def one_breach(gains, peaks=(21.5,), low=4) -> law.State:
    """The state after settled steps with these peaks (GiB) at a target of 21."""
    asked = limits(gains=gains, low=low)
    state = run(gains=gains)[0].state
    for peak in peaks:
        state = law.observe(state, law.Observation(300, state.batch, state.batch, peak * GIB, GIB, 24 * GIB), asked)
    return state


def test_the_terms_of_one_breach_are_gain_times_error():
    error = -0.5 / 21
    state = one_breach((0.15, 0.02, 0.08))
    assert (state.p, state.i, state.d) == pytest.approx((0.15 * error, 0.02 * error, 0.08 * error))
    assert state.trim == pytest.approx(0.25 * error)


@pytest.mark.parametrize("term", [0, 1, 2])
def test_a_larger_gain_takes_away_more_after_a_breach(term):
    trims = [one_breach(tuple(gain if at == term else 0.0 for at in range(3))).trim for gain in (0.0, 0.1, 0.5, 2.0)]
    assert trims == sorted(trims, reverse=True)
    assert trims[0] == 0.0 > trims[1] > trims[3]


def test_kp_forgets_and_ki_remembers_a_breach_that_has_ended_and_kd_answers_its_growth():
    over_then_at_target = (21.5, 20.9)
    assert one_breach((1.0, 0.0, 0.0), over_then_at_target).trim == 0.0
    assert one_breach((0.0, 1.0, 0.0), over_then_at_target).trim < 0.0
    assert one_breach((0.0, 0.0, 1.0), (21.5, 21.5)).d == 0.0
    assert one_breach((0.0, 0.0, 1.0), (21.5, 22.0)).d < 0.0 < one_breach((0.0, 0.0, 1.0), (22.0, 21.5)).d


def test_the_trim_never_adds():
    assert one_breach((5.0, 5.0, 5.0), (5.0,) * 50).trim == 0.0


def test_the_integral_goes_back_to_zero_when_there_is_room_again():
    state = one_breach((0.15, 0.02, 0.08), (21.5,) * 5 + (15.0,) * 20)
    assert state.i == 0.0


def test_an_error_within_the_dead_band_moves_nothing():
    before = one_breach((0.15, 0.02, 0.08), (21.5, 20.8))
    assert before.i < 0.0
    after = one_breach((0.15, 0.02, 0.08), (21.5, 20.8, 20.8))
    assert (after.p, after.i) == (0.0, before.i)


def test_zero_gains_are_the_feed_forward_alone():
    _, rows = run(replace(STATIC, noise=0.03), 500, gains=NO_GAINS)
    assert {row.trim for row in rows} == {0.0}
    state = one_breach(NO_GAINS)
    decision = law.decide(state, limits(gains=NO_GAINS), 24 * GIB, 1.0, 301)[1]
    assert decision.feed_forward == state.peaks.work_within(21 * GIB)


@pytest.mark.parametrize("term", [0, 1, 2])
def test_after_a_stray_peak_that_the_model_ignores_a_larger_gain_gives_a_smaller_batch(term):
    batches = []
    for gain in (0.0, 1.0, 5.0):
        gains = (gain * (term == 0), gain * (term == 1), gain * (term == 2))
        state = one_breach(gains, (23.5,))
        batches.append(law.decide(state, limits(gains=gains), 24 * GIB, 1.0, 301)[1].batch)
    assert batches[0] == 216 > batches[1] > batches[2]


def test_a_step_smaller_than_decided_leaves_the_pid_alone():
    before = one_breach((0.15, 0.02, 0.08), (21.5,) * 3)
    after = law.observe(before, law.Observation(310, 7, 7.0, 2 * GIB, GIB, 24 * GIB), limits())
    assert (after.p, after.i, after.d, after.smoothed) == (before.p, before.i, before.d, before.smoothed)


def test_a_step_larger_than_any_before_leaves_the_pid_alone():
    before = run()[0].state
    after = law.observe(before, law.Observation(310, 300, 300.0, 23 * GIB, GIB, 24 * GIB), limits())
    assert (after.p, after.i, after.d) == (before.p, before.i, before.d)


def test_a_neighbour_that_comes_in_mid_step_leaves_the_pid_alone():
    before = run()[0].state
    after = law.observe(before, law.Observation(310, 216, 216.0, 20.8 * GIB, GIB, 22 * GIB), limits())
    assert after.trim == 0.0


# --- out-of-memory errors


def test_a_fail_converges_in_few_tries_from_any_state():
    for seed in range(300):
        r = random.Random(seed)
        asked = limits()
        state = random_state(r, asked)
        batch, fits, tries = 512, r.randint(1, 400), 0
        while batch > fits:
            tries += 1
            shortage = 0.5 * (batch - fits) * 0.09 * GIB * r.choice([0, 1])
            state, decision = law.fail(state, law.Failure(9, batch, batch, 24 * GIB, shortage, tries), asked)
            assert decision.batch < batch
            assert decision.reason == "out_of_memory"
            batch = decision.batch
        assert tries <= 10
        assert batch >= fits / 8 or state.peaks.work_within(21 * GIB) < fits


def test_before_the_first_step_it_stays_at_what_did_not_fail():
    asked = limits(low=16)
    state, decision = law.fail(law.State(), law.Failure(0, 16, 16.0, 24 * GIB, 0.0), asked)
    assert decision.batch == 8
    assert law.decide(state, asked, 24 * GIB)[1].batch == 8


def failed(step=300, work=216.0):
    chooser, _ = run()
    state, _ = law.fail(chooser.state, law.Failure(step, round(work), work, 24 * GIB, 0.0), chooser.limits)
    return replace(state, calm_steps=100), chooser.limits


def test_work_that_failed_is_not_tried_again_for_500_steps():
    state, asked = failed()
    before, after = (law.decide(state, asked, 24 * GIB, 1.0, step)[1] for step in (799, 800))
    assert (before.batch, before.reason) == (184, "grow")
    assert after.batch == 216
    held = law.decide(replace(state, batch=184, work=184.0), asked, 24 * GIB, 1.0, 799)[1]
    assert held.reason == "ceiling"


def test_work_that_fails_again_waits_twice_as_long():
    state, asked = failed()
    state, _ = law.fail(state, law.Failure(800, 216, 216.0, 24 * GIB, 0.0), asked)
    assert state.ceiling_step == 1800


def test_the_ceiling_does_not_hold_once_the_budget_has_grown():
    state, asked = failed()
    assert law.decide(state, asked, 25.5 * GIB, 1.0, 310)[1].batch >= 216


def test_a_smallest_size_that_fails_is_not_launched_at_every_step():
    asked = limits(low=16)
    state, _ = law.fail(run(low=16)[0].state, law.Failure(300, 16, 16.0, 24 * GIB, 0.0), asked)
    decision = law.decide(state, asked, 24 * GIB, 1.0, 301)[1]
    assert (decision.batch, decision.reason) == (8, "below_min")


def test_a_batch_that_would_break_the_budget_is_split_before_launch():
    chooser, _ = run(low=64)
    decision = law.decide(chooser.state, chooser.limits, 5 * GIB, 1.0, 300)[1]
    assert (decision.batch, decision.reason) == (32, "below_min")


# --- the knee


@pytest.mark.parametrize("policy", ["free", "hold"])
@pytest.mark.parametrize(
    "seconds", [knee_at(64), knee_at(20), knee_at(300), resnet50_seconds, lambda work: 0.02 + 0.001 * work]
)
def test_growth_stops_where_no_larger_size_buys_the_knee_gain_and_nothing_more_is_lost(seconds, policy):
    chooser, rows = run(replace(STATIC, seconds=seconds), 100, knee=0.03, policy=policy)
    fitting = [size for size in chooser.limits.buckets if size <= largest_fitting(STATIC, chooser.limits.buckets, 1)]
    rate = {size: size / seconds(size) for size in fitting}
    final = rows[-1].batch
    assert rate[final] >= 0.97 * max(rate.values())
    assert len({row.batch for row in rows[40:]}) == 1
    assert rows[-1].reason == ("hold" if final == fitting[-1] else "knee")


def test_memory_left_unused_below_the_knee_is_explained():
    _, rows = run(replace(STATIC, seconds=knee_at(32)), 100, knee=0.03)
    assert rows[-1].batch <= 64
    assert used(rows[50:]) < 0.4
    assert {row.reason for row in rows[50:]} == {"knee"}


def test_without_a_knee_gain_memory_alone_decides():
    _, rows = run(replace(STATIC, seconds=knee_at(16)), 100, knee=0.0)
    assert rows[-1].batch == 216


def test_a_loop_that_never_times_itself_still_grows():
    _, rows = run(replace(STATIC, seconds=knee_at(16)), 100, knee=0.03, timed=False)
    assert rows[50].batch == 216


def test_times_are_forgotten_when_the_samples_change_size():
    plant = replace(STATIC, seconds=knee_at(32), sample_work=lambda step: 1.0 if step < 100 else 0.25)
    _, rows = run(plant, 200, knee=0.03)
    assert rows[-1].batch >= 2 * rows[99].batch


# --- sizes


def test_every_size_is_a_bucket_within_the_bounds_and_there_are_few():
    for plant in standard(600):
        for policy in ("free", "hold"):
            chooser, rows = run(plant, 600, policy=policy, low=8, high=256)
            decided = {row.decided for row in rows}
            assert decided <= set(chooser.limits.buckets)
            assert all(8 <= row.decided <= 256 for row in rows), plant.name
            assert len(decided) <= 21
            assert {row.reason for row in rows} <= law.REASONS.keys()


def test_buckets_of_free_are_four_an_octave_and_multiples_of_8_from_32():
    assert limits(low=4, high=64).buckets == (1, 2, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 40, 48, 56, 64)


def test_buckets_of_hold_are_near_equal_parts_of_the_effective_batch():
    asked = limits(low=4, high=64, policy="hold", effective=96)
    assert asked.buckets == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48)


def test_neither_policy_has_more_than_fifty_sizes():
    for high in (64, 512, 4096):
        for policy in ("hold", "free"):
            asked = limits(low=1, high=high, policy=policy, effective=4096 if policy == "hold" else None)
            assert len(asked.buckets) <= 50
            assert asked.buckets[0] == 1


# --- what the shell relies on


def test_the_state_holds_only_plain_numbers_beside_its_two_models():
    state = run(replace(STATIC, noise=0.02), 100, knee=0.03)[0].state
    for field in dataclasses.fields(state):
        if field.name not in ("peaks", "times"):
            assert type(getattr(state, field.name)) in (int, float, bool), field.name


def test_a_run_from_a_saved_state_decides_as_the_run_that_went_on():
    plant = replace(STATIC, noise=0.0, neighbour_gb=steps_of_neighbour(8.0, 150, 220))
    chooser, whole = run(plant, 300)
    first = Ours(chooser.limits)
    simulate(first, plant, 140)
    scalars = {f.name: getattr(first.state, f.name) for f in dataclasses.fields(law.State)}
    scalars["peaks"] = PeakModel.from_state_dict(first.state.peaks.state_dict())
    rest = simulate(Ours(chooser.limits, law.State(**scalars)), plant, 160, start=140)
    assert [row.decided for row in rest] == [row.decided for row in whole[140:]]


def test_a_decision_carries_what_it_was_made_of():
    chooser, _ = run()
    decision = law.decide(chooser.state, chooser.limits, 24 * GIB, 1.0, 300)[1]
    assert decision.predicted_peak_bytes == pytest.approx(STATIC.peak(decision.batch, 0))
    assert decision.target_bytes == 21 * GIB
    assert decision.feed_forward == pytest.approx((21 / 1.005 - 1.4) / 0.09, rel=0.01)
    assert decision.trim == 0.0


def test_limits_come_from_the_configuration():
    asked = law.Limits.from_config(CurriculumConfig(target_headroom_gb=2.5, pid_kp=0.3, min_batch_size=8))
    assert (asked.headroom_bytes, asked.kp, asked.min_batch) == (int(2.5 * GIB), 0.3, 8)


def test_a_decision_costs_less_than_a_millisecond():
    chooser, rows = run(replace(STATIC, sample_work=heavy_tailed(), noise=0.01), 600, knee=0.03)
    row, state = rows[-1], chooser.state
    began = time.perf_counter()
    for step in range(600, 800):
        state = law.observe(state, law.Observation(step, row.batch, row.work, row.peak, GIB, 24 * GIB), chooser.limits)
        state, _ = law.decide(state, chooser.limits, 24 * GIB, row.work / row.batch, step)
    assert (time.perf_counter() - began) / 200 < 1e-3


def test_the_next_size_is_not_tried_where_it_is_known_to_cost_the_headroom():
    """An effective batch that is held has few sizes, far apart: of 256 and 512 the smaller one is right here."""
    held = limits(policy="hold", effective=512)
    plant = Plant("ResNet-50", card_gb=23.2, base_gb=0.8, intercept_gb=1.0, slope_gb=0.0408)
    state = law.State()
    for step in range(60):
        state, decision = law.decide(state, held, plant.budget(step), step=step, rehearsal=step < 3)
        assert decision.batch <= 256
        seen = law.Observation(
            step,
            decision.batch,
            decision.batch,
            plant.peak(decision.batch, step),
            plant.base_gb * GIB,
            plant.budget(step),
        )
        state = law.observe(state, seen, held)
    assert decision.batch == 256


class _CostlyFirstStep(Plant):
    """Its first step searches for kernels, which takes nearly all of the card."""

    def peak(self, work: float, step: int, rng: random.Random | None = None) -> float:
        return 23.0 * GIB if step == 0 else super().peak(work, step, rng)


def test_a_costly_first_step_does_not_leave_the_smallest_size_for_good():
    plant = _CostlyFirstStep("", floor_gb=11.0)  # from one size alone, twice as many samples may take 21
    rows = simulate(Ours(limits(low=1)), plant, 100)
    assert rows[-1].decided >= 0.8 * largest_fitting(Plant("", floor_gb=11.0), limits(low=1).buckets, 100)
    assert errors(rows) == 0
