"""Several processes that train together: what they divide, and that they learn what one process would."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.engine.data import make_source
from acmds_optimizer.engine.distributed import naming_failures
from acmds_optimizer.engine.shares import Division, Standing, deal, divide, split
from acmds_optimizer.engine.telemetry import Recorder, together
from acmds_optimizer.errors import RankFailedError
from acmds_optimizer.zoo.datasets import DataBundle
from tests import ranks

# --- shares


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (64, [1, 1], (32, 32)),
        (64, [3, 1], (48, 16)),
        (10, [1, 1, 1], (4, 3, 3)),
        (64, [1000, 1], (62, 2)),
        (3, [1, 1], (2, 1)),
        (1, [1, 2], (0, 1)),
        (0, [1, 1], (0, 0)),
        (512, [1.0, 1.07], (248, 264)),
        (515, [1, 1], (259, 256)),
    ],
)
def test_samples_are_split_in_proportion(total, weights, expected):
    assert split(total, weights) == expected


def standings(*pairs: tuple[int, float], piece: float = 0.0) -> list[Standing]:
    return [Standing(micro_batch, piece, seconds) for micro_batch, seconds in pairs]


def test_until_times_are_known_shares_follow_what_memory_allows():
    assert divide(standings((48, math.nan), (16, 0.1)), 64, 0).shares == (48, 16)
    assert divide(standings((48, math.nan), (16, 0.1)), None, 0).shares == (48, 16)


def test_with_times_all_end_a_step_together():
    # as fast, though it has a third of the memory: it takes its half in more pieces
    assert divide(standings((48, 0.01), (16, 0.01)), 64, 0).shares == (32, 32)
    assert divide(standings((48, 0.01), (16, 0.03)), 64, 0).shares == (48, 16)
    # free: what all do in the 0.48 s of the largest micro-batch
    assert divide(standings((48, 0.01), (16, 0.015)), None, 0).shares == (48, 32)
    assert divide(standings((48, 0.1), (16, 0.01)), None, 0).shares == (48, 64), "at most four pieces"


def test_shares_stay_unless_others_are_faster_for_a_while():
    present = Division((32, 32), (32, 32), 10)
    little = standings((48, 0.010), (48, 0.0104))
    much = standings((48, 0.010), (48, 0.014))
    assert divide(little, 64, 510, present) is present
    assert divide(much, 64, 29, present) is present
    assert divide(much, 64, 30, present).shares == (37, 27)
    assert divide(standings((32, math.nan), (32, 0.01)), 64, 510, present) is present
    smaller = standings((16, 0.01), (32, 0.01))
    assert divide(smaller, 64, 11, present) is present
    assert divide(smaller, None, 11, present).shares == (32, 32)
    assert divide(smaller, None, 11, present).micro_batches == (16, 32)


def test_a_share_goes_past_a_micro_batch_only_where_that_pays_for_another_piece():
    present = Division((256, 256), (256, 171), 0)
    # ResNet-50 on an H200: 4.7 ms a micro-batch and 0.2 ms a sample; the second card does 256 in two
    like_measured = [Standing(256, 0.0047, 0.0002), Standing(171, 0.0047, 0.0002)]
    assert divide(like_measured, 512, 20, present) is present, "264 would be two pieces there as well"
    assert divide(like_measured, 512, 20, Division((272, 240), (256, 171), 0)).shares == (256, 256)
    roomy = [Standing(432, 0.0047, 0.0002), Standing(171, 0.0047, 0.0002)]
    assert divide(roomy, 512, 20, Division((364, 148), (432, 171), 0)).shares == (264, 248)
    slow = [Standing(256, 0.0047, 0.0002), Standing(171, 0.0094, 0.0004)]
    assert divide(slow, 512, 20, present).shares[0] > 256, "two pieces, but the other is half as fast"


def test_a_deal_gives_each_step_the_samples_that_one_process_would_feed():
    parts = [deal(5, 5 + 2 * 10 + 7, (4, 3, 3), rank) for rank in range(3)]
    assert [part.totals for part in parts] == [(10, 10, 7)] * 3
    assert [part.own for part in parts] == [(4, 4, 3), (3, 3, 2), (3, 3, 2)]
    assert parts[0].positions.tolist() == [5, 6, 7, 8, 15, 16, 17, 18, 25, 26, 27]
    together = np.sort(np.concatenate([part.positions for part in parts]))
    assert together.tolist() == list(range(5, 32))
    with pytest.raises(ValueError, match="rank 3 is not in a world of 3"):
        deal(0, 10, (4, 3, 3), 3)


def test_a_rest_too_small_for_all_is_fed_with_the_step_before():
    parts = [deal(0, 23, (5, 5), rank) for rank in range(2)]
    assert [part.totals for part in parts] == [(10, 13)] * 2
    assert [part.own for part in parts] == [(5, 7), (5, 6)]


# --- streams of a part


def images(count: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8), i % 10) for i in range(count)]


@pytest.mark.parametrize("resident", [True, False])
def test_a_part_of_an_epoch_is_augmented_as_in_the_whole_of_it(resident):
    items = images(40)
    bundle = DataBundle(items, None, 10, None, (3, 16, 16), (0.5,) * 3, (0.5,) * 3, flip=True, crop="pad")
    config = TrainConfig(cutout_fraction=0.25, num_workers=0)
    limit = 2**30 if resident else 0
    source = make_source(items, bundle, config, "cpu", train=True, resident_limit_bytes=limit)
    order = np.random.default_rng(0).permutation(40)
    with source.stream(order, epoch=2, augment=True) as stream:
        whole = stream.take(40)
    positions = np.array([1, 2, 3, 10, 11, 39])
    with source.stream(order, epoch=2, augment=True, positions=positions, start=1) as stream:
        part = stream.take(2), stream.take(3)
    found = torch.cat([batch.inputs for batch in part])
    assert torch.equal(found, whole.inputs[positions[1:]])
    assert torch.cat([batch.indices for batch in part]).tolist() == order[positions[1:]].tolist()


# --- processes


@pytest.fixture(scope="module")
def two(own_fork_server) -> list[dict[str, Any]]:
    results = ranks.play(2, [scenario.__name__ for scenario in ranks.SCENARIOS])
    for seen in results:
        for name, result in seen.items():
            assert "failed" not in result, f"{name}: {result['failed']}"
    return results


def assert_equals(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-11) -> None:
    """Float64, and sums in another order: equal to rounding."""
    assert torch.allclose(result["weights"], expected["weights"], rtol=0, atol=tolerance)
    assert torch.allclose(result["scores"], expected["scores"], rtol=0, atol=1e-5)
    assert torch.equal(result["counts"], expected["counts"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert result["step"] == expected["step"]
    assert result["figures"]["samples"] == expected["figures"]["samples"]


def test_two_processes_one_with_little_memory_learn_what_one_process_does(two):
    expected = ranks.fitted(ema_decay=0.9)
    for seen in two:
        result = seen["equal"]
        assert_equals(result, expected)
        assert torch.allclose(result["average"], expected["average"], rtol=0, atol=1e-11)
        assert result["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    first, second = (seen["equal"]["micro_batch"] for seen in two)
    assert second < first == 64, "the card with little memory takes smaller micro-batches"


def test_three_processes_with_different_memory_learn_what_one_process_does(own_fork_server):
    expected = ranks.fitted(ema_decay=0.9)
    for seen in ranks.play(3, ["equal"]):
        assert_equals(seen["equal"], expected)


def test_errors_on_one_process_leave_no_trace(two):
    expected = ranks.fitted(**ranks.SMALL_STEPS)
    for seen in two:
        assert_equals(seen["struck"], expected)
    assert two[0]["struck"]["figures"]["oom_events"] == 0
    events = two[1]["struck"]["figures"]
    assert events["oom_recovered"] == events["oom_events"] >= 5


def test_an_error_in_the_optimizer_of_one_process_is_undone_there_alone(two):
    expected = ranks.fitted()
    for seen in two:
        assert_equals(seen["struck_optimizer"], expected)
    assert [seen["struck_optimizer"]["figures"]["oom_recovered"] for seen in two] == [0, 1]


def test_with_batch_policy_free_each_sample_is_fed_once_an_epoch(two):
    for seen in two:
        assert (seen["free"]["counts"] == 2).all()
        assert torch.equal(seen["free"]["weights"], two[0]["free"]["weights"])


def test_scores_and_noise_gate_are_those_of_one_process(two):
    expected = ranks.fitted(noise=0.2, noise_rate=0.2, scoring="margin", epochs=8)
    assert expected["flagged"] is not None
    assert expected["flagged"].sum() > 0
    for seen in two:
        assert_equals(seen["noisy"], expected, tolerance=1e-9)
        assert (seen["noisy"]["flagged"] == expected["flagged"]).all()


def test_a_layer_that_only_one_process_used_is_updated_alike(two):
    assert torch.equal(two[0]["sometimes"]["weights"], two[1]["sometimes"]["weights"])


def test_layers_that_are_frozen_and_trained_in_turn_learn_what_they_do_alone(two):
    expected = ranks.thawed()
    assert expected["kept"]
    for seen in two:
        assert_equals(seen["unfrozen"], expected)
        assert seen["unfrozen"]["kept"]


def test_a_weight_that_is_a_slice_of_another_learns_what_it_does_alone(two):
    expected = ranks.fitted(layers=[ranks.Sliced()])
    for seen in two:
        assert_equals(seen["sliced"], expected)


def test_statistics_of_normalisations_are_shared(two):
    first, second = (seen["normalised"] for seen in two)
    assert torch.equal(first["weights"], second["weights"])
    assert all(torch.equal(a, b) for a, b in zip(first["statistics"], second["statistics"], strict=True))
    assert first["evaluation"] == second["evaluation"]


def test_all_begin_with_the_weights_and_statistics_of_the_first(two):
    first, second = (seen["own_start"] for seen in two)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_that_ends_in_an_epoch_is_validated_with_the_statistics_of_all(two):
    first, second = (seen["cut_off"] for seen in two)
    assert all(torch.equal(a, b) for a, b in zip(first["statistics"], second["statistics"], strict=True))
    assert first["evaluation"] == pytest.approx(first["saved"], rel=1e-9)


def test_few_samples_are_enough(two):
    for seen in two:
        assert (seen["few"]["131"]["counts"] == 2).all()
        assert seen["few"]["131"]["step"] == 2 * 2
        assert seen["few"]["1"]["counts"].tolist() == [2]
    assert torch.equal(two[0]["few"]["1"]["weights"], two[1]["few"]["1"]["weights"])


def test_all_stop_when_one_is_asked_to_and_go_on_where_they_stopped(two):
    expected = ranks.fitted()
    assert two[0]["stopped"]["stopped_at"] == two[1]["stopped"]["stopped_at"] == 3
    for seen in two:
        assert_equals(seen["stopped"], expected)


def test_a_run_of_two_goes_on_with_one(two):
    trainer = ranks.make()
    trainer.load_state_dict(two[0]["stopped"]["state"])
    trainer.fit()
    assert_equals(ranks.facts(trainer), ranks.fitted())


def test_settings_that_differ_are_named_before_anything_is_read_or_written(two):
    for seen in two:
        assert "lr must be the same in all processes, but is 0.5 and 1.5" in seen["differ"]["error"]
        assert not seen["differ"]["made"]


def test_a_process_that_gives_up_ends_all(two):
    first, second = (seen["hopeless"] for seen in two)
    assert second["error"].startswith("OutOfMemoryForGoodError: out of memory")
    assert first["error"] == "RankFailedError: process 1 of 2 gave up; its own message says why"
    assert first["step"] == second["step"] == 3


def test_a_card_that_is_full_among_the_processes_is_not_taken_for_another_one_that_is_gone():
    # such as for a gradient that only others have
    with pytest.raises(torch.OutOfMemoryError), naming_failures():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 MiB")
    with pytest.raises(RankFailedError, match="another process of this run is gone"), naming_failures():
        raise RuntimeError("Connection closed by peer")


def test_figures_of_several_processes_are_joined():
    recorder = Recorder(None)
    one = recorder.outcome(epochs=1, seconds=1.0, oom_events=1, headroom_min_gb=3.0, headroom_breach_fraction=0.0)
    other = recorder.outcome(epochs=1, seconds=1.0, oom_events=2, headroom_min_gb=1.0, headroom_breach_fraction=0.5)
    joined = together([one, other])
    assert (joined.oom_events, joined.headroom_min_gb, joined.headroom_breach_fraction) == (3, 1.0, 0.5)
    assert joined.peak_reserved_gb is None
    assert together([one]) is one


# --- the command line, by torchrun


def torchrun(folder: Path, *flags: str, count: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "acmds_optimizer.cli", *flags, "--output-dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


TRAIN = (
    "--model", "small_cnn", "--dataset", "digits", "--device", "cpu", "--memory-limit-gb", "0.2",
    "--target-headroom-gb", "0.05", "--max-batch-size", "32", "--effective-batch-size", "64",
)  # fmt: skip


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 100
    while not ((folder / "steps.csv").exists() and (folder / "steps.csv").stat().st_size > 10_000):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "no steps"
        time.sleep(0.1)


def test_torchrun_trains_is_interrupted_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    process = torchrun(folder, *TRAIN, "--epochs", "200")
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "continue with: acmds-train --resume" in output, output
    steps = pd.read_csv(folder / "steps.csv")["step"].tolist()
    assert steps == list(range(len(steps)))
    goal = len(steps) + 30
    process = torchrun(folder, "--resume", str(folder), "--max-steps", str(goal))
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert output.count("samples_per_second") == 1, "figures are printed once"
    for part in (folder, folder / "rank1"):
        assert pd.read_csv(part / "steps.csv")["step"].tolist() == list(range(goal))
    assert pd.read_csv(folder / "steps.csv")["effective_batch"].max() == 64
    assert not (folder / "rank1" / "config.json").exists()


def test_a_killed_process_ends_all_and_nothing_hangs(tmp_path):
    folder = tmp_path / "run"
    process = torchrun(folder, *TRAIN, "--epochs", "200", "--checkpoint-every-steps", "20")
    wait_for_steps(folder, process)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "acmds_optimizer/engine" not in output, "a traceback of ours"
    assert (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "cuda:1"), "device cuda:1: each process takes its own; give --device cuda or cpu"),
        (("--dry-run",), "--evaluate and --dry-run are for one process"),
    ],
)
def test_what_makes_no_sense_for_several_processes_is_refused(monkeypatch, capsys, tmp_path, flags, said):
    from acmds_optimizer.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert main([*TRAIN, *flags, "--output-dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
