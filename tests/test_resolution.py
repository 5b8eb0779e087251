"""Resolution stages: sizes and times worked out by hand."""

from __future__ import annotations

import csv
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from acmds_optimizer import ACMDSTrainer, run_training
from acmds_optimizer.config import CurriculumConfig, TrainConfig
from acmds_optimizer.curriculum.resolution import Stages
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.errors import ConfigError, OutOfMemoryForGoodError
from acmds_optimizer.memory.device import BudgetedCpuMemory
from acmds_optimizer.memory.model import TimeModel


def stages(shape: tuple[int, ...] = (3, 224, 224), start: float = 0.5, count: int = 4) -> Stages:
    found = Stages.from_config(CurriculumConfig(start_resolution=start, resolution_stages=count), shape)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("shape", "start", "count", "expected"),
    [
        ((3, 224, 224), 0.5, 4, [(112, 112), (152, 152), (184, 184), (224, 224)]),  # 149.3 and 186.7 in eights
        ((3, 128, 128), 0.5, 3, [(64, 64), (96, 96), (128, 128)]),
        ((1, 32, 32), 0.5, 4, [(16, 16), (24, 24), (32, 32)]),  # 21.3 and 26.7 are one size
        ((3, 96, 128), 0.5, 2, [(48, 64), (96, 128)]),
        ((3, 60, 60), 0.1, 2, [(8, 8), (60, 60)]),
    ],
)
def test_sizes_grow_evenly_in_multiples_of_eight_up_to_the_full_one(shape, start, count, expected):
    assert list(stages(shape, start, count).sizes) == expected


def test_the_last_30_percent_are_at_full_size_and_the_other_stages_take_equal_parts():
    three = stages((3, 128, 128), 0.5, 3)
    assert [three.number(t) for t in (0.0, 0.34, 0.36, 0.69, 0.7, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_the_work_of_a_sample_is_its_share_of_the_pixels():
    assert [stages((3, 128, 128), 0.5, 3).work(i) for i in range(3)] == [0.25, 0.5625, 1.0]


def test_a_smaller_image_is_the_mean_of_the_pixels_that_fall_together():
    two = stages((1, 16, 16), 0.5, 2)
    flat = torch.full((2, 1, 16, 16), 3.0)
    assert torch.allclose(two.resize(flat, 0), torch.full((2, 1, 8, 8), 3.0))
    board = torch.tensor([0.0, 1.0]).repeat(8).repeat(16, 1)[None, None]  # columns of 0 and 1
    assert torch.allclose(two.resize(board, 0)[..., 1:-1], torch.full((1, 1, 8, 6), 0.5))
    assert two.resize(board, 1) is board


def test_without_a_smaller_start_there_are_no_stages():
    assert Stages.from_config(CurriculumConfig(), (3, 224, 224)) is None
    assert Stages.from_config(CurriculumConfig(start_resolution=0.5, resolution_stages=1), (3, 64, 64)) is None


@pytest.mark.parametrize("shape", [(20,), (1, 8, 8)])
def test_stages_of_what_is_no_image_or_is_tiny_are_refused(shape):
    with pytest.raises(ConfigError, match="no images that could be smaller"):
        stages(shape)


def test_a_training_grows_its_images_and_ends_and_validates_at_full_size():
    seen: list[tuple[bool, int]] = []

    class Watch(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, inputs.shape[-1]))
            return inputs

    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8)
    dataset = TensorDataset(images, torch.arange(64) % 2)
    model = nn.Sequential(Watch(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    config = TrainConfig(
        start_resolution=0.5,
        resolution_stages=2,
        epochs=10,
        max_batch_size=32,
        target_headroom_gb=0.1,
        enable_amp=False,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    memory = BudgetedCpuMemory(2**30)
    with ACMDSTrainer(model, dataset, optimizer, config, "cpu", val_dataset=dataset, memory=memory) as trainer:
        while not trainer.finished:
            trainer.train_epoch()
            trainer.evaluate()
    sides = [side for training, side in seen if training]
    assert {side for training, side in seen if not training} == {8, 16}, "8 only in the check before the first step"
    # two steps an epoch: 7 of 10 epochs at half the side, after the rehearsal
    assert sides[-20:] == [8] * 14 + [16] * 6


def test_memory_grows_with_the_pixels_so_a_smaller_image_allows_a_larger_micro_batch():
    images = torch.randint(0, 256, (400, 1, 32, 32), dtype=torch.uint8)
    dataset = TensorDataset(images, torch.arange(400) % 2)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
    )
    config = TrainConfig(
        start_resolution=0.5, resolution_stages=2, epochs=4, max_batch_size=128, target_headroom_gb=0.001,
        enable_amp=False, knee_gain_fraction=0.0,
    )  # fmt: skip
    memory = BudgetedCpuMemory(14 * 2**20)
    sizes: dict[int, int] = {}
    with ACMDSTrainer(model, dataset, torch.optim.AdamW(model.parameters()), config, "cpu", memory=memory) as trainer:
        while not trainer.finished:
            trainer.train_epoch()
            assert trainer.growth is not None
            sizes[trainer.growth.number] = trainer.controller.batch_size
        assert trainer.recorder.figures["oom_events"] == 0
    assert sizes[0] >= 2 * sizes[1]


@pytest.mark.parametrize(
    ("due", "present", "room", "expected"),  # stages of 64, 96 and 128 px: 8 samples are the work of 2, 4.5 and 8
    [
        (1, 0, 100.0, 1),
        (1, 1, 4.5, 1),
        (1, 1, 4.4, 0),  # not even the smallest micro-batch fits
        (1, 0, 4.9, 0),  # it would fit, but not with a tenth to spare
        (1, 0, 5.0, 1),
        (0, 0, 0.1, 0),
        (2, 1, 0.1, 2),  # the last 30 % are at full size
    ],
)
def test_pressure_holds_the_size_back_only_where_the_smallest_micro_batch_does_not_fit(due, present, room, expected):
    assert stages((3, 128, 128), 0.5, 3).affordable(due, present, 8, room) == expected


def test_a_neighbour_makes_the_images_smaller_and_they_grow_back_when_it_goes():
    images = torch.randint(0, 256, (200, 1, 32, 32), dtype=torch.uint8)
    dataset = TensorDataset(images, torch.arange(200) % 2)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
    )
    config = TrainConfig(
        start_resolution=0.5, resolution_stages=3, epochs=20, max_batch_size=32, min_batch_size=16,
        target_headroom_gb=0.001, enable_amp=False, knee_gain_fraction=0.0,
    )  # fmt: skip
    memory = BudgetedCpuMemory(14 * 2**20)
    seen = []
    with ACMDSTrainer(model, dataset, torch.optim.AdamW(model.parameters()), config, "cpu", memory=memory) as trainer:
        for epoch in range(14):
            memory.neighbour_bytes = int(11.5 * 2**20) if 9 <= epoch < 11 else 0
            trainer.train_epoch()
            assert trainer.growth is not None
            seen.append(trainer.growth.number)
    assert seen == [0] * 7 + [1] * 2 + [0] * 2 + [1] * 3


@pytest.mark.parametrize("fails", [1, 2])
def test_images_that_cannot_be_made_smaller_for_lack_of_memory_are_tried_again_and_none_is_lost(monkeypatch, fails):
    dataset = TensorDataset(torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8), torch.arange(64) % 2)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    config = TrainConfig(
        start_resolution=0.5, resolution_stages=2, epochs=10, max_batch_size=16, target_headroom_gb=0.1,
        enable_amp=False, num_workers=0,
    )  # fmt: skip
    memory = BudgetedCpuMemory(2**30)
    with ACMDSTrainer(model, dataset, torch.optim.AdamW(model.parameters()), config, "cpu", memory=memory) as trainer:
        assert trainer.growth is not None
        sized, calls = trainer.growth.sized, itertools.count()

        def strike(batch: Batch) -> Batch:
            if 2 <= next(calls) < 2 + fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return sized(batch)

        monkeypatch.setattr(trainer.growth, "sized", strike)
        if fails == 1:
            trainer.train_epoch()
            assert (trainer.dataset.scores.count == 1).all()
        else:
            with pytest.raises(OutOfMemoryForGoodError, match="the 16 samples of a step do not fit"):
                trainer.train_epoch()


def test_a_resumed_training_keeps_the_knee_that_was_found_in_its_stage():
    dataset = TensorDataset(torch.randint(0, 256, (256, 1, 16, 16), dtype=torch.uint8), torch.arange(256) % 2)
    config = TrainConfig(
        start_resolution=0.5, resolution_stages=2, epochs=10, max_batch_size=64, effective_batch_size=64,
        target_headroom_gb=0.1, enable_amp=False,
    )  # fmt: skip

    def make() -> ACMDSTrainer:
        model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
        memory = BudgetedCpuMemory(2**30)
        return ACMDSTrainer(model, dataset, torch.optim.AdamW(model.parameters()), config, "cpu", memory=memory)

    with make() as trainer, make() as resumed:
        trainer.train_epoch()
        times = TimeModel(((8, (0.1,) * 9), (16, (0.1,) * 9), (32, (0.2,) * 9)))
        trainer.controller.state = dataclasses.replace(trainer.controller.state, times=times, knee_batch=16)
        resumed.load_state_dict(trainer.state_dict())
        assert resumed._enter_stage() == 0.25
        assert resumed.controller.state.times == times
        assert resumed.controller.decide(0.25).batch == 16


def test_a_resumed_run_stands_at_the_size_where_it_stopped(tmp_path):
    config = TrainConfig(
        model="small_cnn", dataset="digits", image_size=16, start_resolution=0.5, resolution_stages=2, device="cpu",
        enable_amp=False, max_batch_size=256, target_headroom_gb=0.1, knee_gain_fraction=0.0, max_steps=10, seed=1,
    )  # fmt: skip

    def sizes(folder) -> list[tuple[str, str]]:
        with (folder / "events.csv").open(encoding="utf-8") as file:
            return [(row["step"], row["message"]) for row in csv.DictReader(file) if row["kind"] == "resolution"]

    run_training(config, output_dir=tmp_path / "whole")
    steps = iter(range(100))
    parts = tmp_path / "parts"
    run_training(config, output_dir=parts, should_stop=lambda: next(steps) >= 4)
    run_training(config, output_dir=parts, resume=parts)
    assert sizes(parts) == [("0", "images have 8x8 px from now on"), ("7", "images have 16x16 px from now on")]
    assert sizes(parts) == sizes(tmp_path / "whole")
    weights = [torch.load(folder / "checkpoint.pt")["model"] for folder in (parts, tmp_path / "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_model_that_takes_one_size_only_is_told_so():
    dataset = TensorDataset(torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8), torch.arange(64) % 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    config = TrainConfig(start_resolution=0.5, target_headroom_gb=0.1, enable_amp=False)
    memory = BudgetedCpuMemory(2**30)
    trainer = ACMDSTrainer(model, dataset, torch.optim.AdamW(model.parameters()), config, "cpu", memory=memory)
    with trainer, pytest.raises(ConfigError, match="cannot take images of 8x8 px"):
        trainer.train_epoch()
