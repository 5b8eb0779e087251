"""The recipe: schedules, losses, augmentation and averaged weights, each against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from acmds_optimizer import ACMDSTrainer, TrainConfig, run_training
from acmds_optimizer.config import build
from acmds_optimizer.engine.augment import Cutouts
from acmds_optimizer.engine.average import WeightAverage
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.data import make_source
from acmds_optimizer.engine.loss import Mixing, TrainingLoss
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.engine.schedule import LearningRate, schedule_factor
from acmds_optimizer.engine.workers import WorkerSource
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.memory.device import BudgetedCpuMemory
from acmds_optimizer.zoo.datasets import DataBundle
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import SmallCNN


def config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"model": "small_cnn", "dataset": "digits", "device": "cpu", "enable_amp": False}
    return TrainConfig(**(defaults | settings))


# --- learning rate


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        # (1 + cos(pi * (p - 0.2) / 0.8)) / 2 after a rise over 0.2
        ({"lr_schedule": "cosine", "warmup_fraction": 0.2}, {0.0: 1e-3, 0.1: 0.5, 0.2: 1.0, 0.6: 0.5, 1.0: 0.0}),
        # torch's OneCycleLR with its defaults: 1/25 to 1 over 0.3, then to 4e-6
        ({"lr_schedule": "one_cycle"}, {0.0: 0.04, 0.15: 0.52, 0.3: 1.0, 0.65: 0.500002, 1.0: 4e-6}),
        ({"lr_schedule": "linear", "warmup_fraction": 0.0}, {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        # 9 epochs: a drop at each third
        ({"lr_schedule": "step", "warmup_fraction": 0.0, "epochs": 9}, {0.0: 1, 0.33: 1, 0.34: 0.1, 1: 0.01}),
        (
            {"lr_schedule": "step", "warmup_fraction": 0.0, "epochs": 10, "lr_decay_epochs": 4, "lr_decay_factor": 0.5},
            {0.0: 1.0, 0.39: 1.0, 0.4: 0.5, 0.8: 0.25, 1.0: 0.25},
        ),
        ({"lr_schedule": "constant"}, {0.025: 0.5, 0.05: 1.0, 1.0: 1.0}),
    ],
)  # fmt: skip
def test_the_learning_rate_follows_its_schedule(settings, table):
    for progress, factor in table.items():
        assert schedule_factor(config(**settings), progress) == pytest.approx(factor, abs=1e-9), progress


def test_one_cycle_is_that_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    steps = 101
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
    ours = config(lr_schedule="one_cycle", warmup_fraction=(0.3 * steps - 1) / (steps - 1))
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule_factor(ours, step / (steps - 1)) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        optimizer.step()
        theirs.step() if step < steps - 1 else None


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [8.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.5]),
        (1.5, [8.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0]),
        (2, [8.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0]),
        (3, [8.0, 8.0, 8.0, 8.0, 4.0, 4.0, 4.0]),
    ],
)
def test_plateau_lowers_the_rate_after_that_many_epochs_without_a_better_loss(epochs, expected):
    settings = config(lr_schedule="plateau", lr_decay_epochs=epochs, lr_decay_factor=0.5, warmup_fraction=0.0)
    rate = LearningRate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=8.0), settings)
    seen = []
    for loss in (1.0, 0.9, 0.95, 0.9, 0.92, 0.91, 0.8):
        rate.end_epoch(loss)
        seen.append(rate.set(0.5, 8))
    assert seen == expected
    again = LearningRate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), settings)
    again.load_state_dict(rate.state_dict())
    assert again.set(0.5, 8) == expected[-1]


# --- optimizer


def test_norms_and_biases_do_not_decay_unless_asked():
    model = SmallCNN(10, 1)
    others, decayed = build_optimizer(model, config(weight_decay=0.25)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in others["params"]} == {1}
    (group,) = build_optimizer(model, config(weight_decay=0.25, decay_norms_and_biases=True)).param_groups
    assert group["weight_decay"] == 0.25
    assert len(group["params"]) == len(list(model.parameters()))


def test_sgd_takes_momentum_and_nesterov():
    group = build_optimizer(SmallCNN(10, 1), config(optimizer="sgd", momentum=0.5, nesterov=True)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.5, True)


def test_nesterov_without_momentum_is_refused_with_the_other_settings():
    with pytest.raises(ConfigError, match="nesterov: needs momentum above 0"):
        build(TrainConfig, {"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "command line")


def test_sgd_with_the_weight_decay_of_adamw_is_warned_of(caplog):
    build_optimizer(SmallCNN(10, 1), config(optimizer="sgd"))
    assert "0.05 is for AdamW" in caplog.text
    caplog.clear()
    build_optimizer(SmallCNN(10, 1), config(optimizer="sgd", weight_decay=5e-4))
    assert not caplog.text


# --- losses


def test_smoothing_changes_what_is_minimised_and_not_what_is_scored():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    targets = torch.tensor([0, 0])
    minimised, scored = TrainingLoss(label_smoothing=0.2)(logits, targets)
    own = [math.log1p(math.exp(-2)), math.log1p(math.exp(1))]  # -log softmax of the label
    other = [math.log1p(math.exp(2)), math.log1p(math.exp(-1))]
    assert scored.tolist() == pytest.approx(own)
    assert minimised.tolist() == pytest.approx([0.9 * a + 0.1 * b for a, b in zip(own, other, strict=True)])
    assert not scored.requires_grad
    assert minimised.requires_grad


def test_scores_and_logged_losses_of_a_smoothed_run_are_unsmoothed():
    images = TensorImages(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), [0, 1] * 4)
    head = nn.Linear(64, 2)
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([1.0, 0.0])
    model = nn.Sequential(nn.Flatten(), head)
    settings = config(label_smoothing=0.5, max_batch_size=8, epochs=1, lr=1e-9, target_headroom_gb=0.0)
    with ACMDSTrainer(model, images, build_optimizer(model, settings), settings, "cpu") as trainer:
        figures = trainer.train_epoch()
        right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
        assert figures["epoch_loss"] == pytest.approx((right + wrong) / 2)
        assert trainer.dataset.scores.average.tolist() == pytest.approx([right, wrong] * 4)


def batch_of(count: int) -> Batch:
    inputs = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 1, 8, 8).contiguous()
    return Batch(inputs, torch.arange(count) % 3, torch.arange(count), torch.ones(count))


@pytest.mark.parametrize(
    "settings", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}]
)
def test_the_cuts_of_a_batch_do_not_change_how_it_is_mixed(settings):
    mixing = Mixing(config(**settings), 3, (1, 8, 8))
    state = torch.get_rng_state()
    batch = mixing(batch_of(6), epoch=1, position=12)
    whole = batch.slice(0, 6)
    pieces = [batch.slice(0, 1), batch.slice(1, 4), batch.slice(4, 6)]
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]), whole.inputs)
    assert whole.soft is not None
    assert torch.equal(torch.cat([piece.soft for piece in pieces if piece.soft is not None]), whole.soft)
    assert torch.equal(whole.targets, batch_of(6).targets), "a sample keeps its own label for its score"
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mixing(batch_of(6), epoch=2, position=12).slice(0, 6).inputs, whole.inputs)


def test_mixup_mixes_each_image_and_label_with_the_one_before():
    batch = Mixing(config(mixup_alpha=1.0), 3, (1, 8, 8))(batch_of(6), 0, 0).slice(0, 6)
    assert batch.soft is not None
    share = batch.soft[1, 1].item()  # of sample 1's own label, which is 1
    assert 0 < share < 1
    expected = share * torch.arange(6) + (1 - share) * torch.tensor([5, 0, 1, 2, 3, 4])
    assert torch.allclose(batch.inputs[:, 0, 0, 0], expected.float())
    assert batch.soft[1].tolist() == pytest.approx([1 - share, share, 0])


@pytest.mark.parametrize("settings", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_a_sample_that_counts_nothing_is_not_mixed_into_the_next(settings):
    batch = batch_of(6)
    batch.weights[1] = 0.0
    mixed = Mixing(config(**settings), 3, (1, 8, 8))(batch, 0, 0)
    for part, at in ((mixed.slice(0, 6), 2), (mixed.slice(2, 4), 0)):
        assert part.soft is not None
        assert torch.equal(part.inputs[at], batch.inputs[2])
        assert part.soft[at].tolist() == [0.0, 0.0, 1.0]
        assert 0 < part.soft[at + 1].max() < 1


def test_mixing_needs_images_and_cross_entropy():
    with pytest.raises(ConfigError, match="mixup_alpha: needs images"):
        Mixing(config(mixup_alpha=1.0), 3, (20,))
    model = nn.Linear(4, 2)
    data = TensorDataset(torch.zeros(4, 4), torch.tensor([0, 1, 0, 1]))
    settings = config(label_smoothing=0.1)
    with pytest.raises(ConfigError, match="label_smoothing: needs cross-entropy"):
        ACMDSTrainer(model, data, build_optimizer(model, settings), settings, "cpu", loss_fn=lambda a, b: a.sum(1))


# --- augmentation


def test_cutout_greys_out_one_square_at_the_drawn_place():
    cut = Cutouts(torch.tensor([0, 4, 1], dtype=torch.int16), torch.tensor([0, 2, 4], dtype=torch.int16), 2, (5, 5))
    inputs = torch.ones(2, 3, 5, 5)
    cut.apply(inputs, start=1)
    expected = torch.ones(2, 3, 5, 5)
    expected[0, :, 3:5, 1:3] = 0
    expected[1, :, 0:2, 3:5] = 0
    assert torch.equal(inputs, expected)


def images_source(**settings: Any) -> Any:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8))
    images = TensorImages(pixels, [0, 1] * 12)
    bundle = DataBundle(images, None, 2, None, (3, 16, 16), (0.5,) * 3, (0.25,) * 3)
    return make_source(images, bundle, config(num_workers=0, **settings), "cpu", train=True)


@pytest.mark.parametrize(
    "settings",
    [{"cutout_fraction": 0.5}, {"auto_augment": "trivial"}, {"auto_augment": "rand", "cutout_fraction": 0.25}],
)
def test_augmentation_depends_on_seed_epoch_and_position_alone(settings):
    order = np.arange(24)[::-1].copy()

    def inputs(cuts: list[int], epoch: int = 1, seed: int = 3, start: int = 0) -> torch.Tensor:
        torch.manual_seed(cuts[0])  # the global state is of no account
        source = images_source(seed=seed, **settings)
        with source.stream(order, epoch=epoch, start=start, augment=True) as stream:
            return torch.cat([stream.take(count).inputs for count in cuts])

    whole = inputs([24])
    assert torch.equal(inputs([5, 1, 18]), whole)
    assert torch.equal(inputs([17], start=7), whole[7:]), "as a resumed epoch begins"
    assert not torch.equal(inputs([24], epoch=2), whole)
    assert not torch.equal(inputs([24], seed=4), whole)


def test_a_policy_moves_small_images_from_the_device_to_the_workers():
    assert isinstance(images_source(auto_augment="trivial"), WorkerSource)
    assert not isinstance(images_source(cutout_fraction=0.5), WorkerSource)
    assert not isinstance(images_source(auto_augment="trivial", augment=False), WorkerSource)


# --- average of the weights


def test_the_average_follows_the_formula_and_copies_counters():
    weight, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
    model = nn.Sequential(weight, norm)
    weight.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.75)

    def averaged(name: str) -> float:
        return average.module.state_dict()[name].item()

    average.update_parameters(model)  # the first is copied
    weight.weight.data.fill_(2.0)
    norm.load_state_dict({**norm.state_dict(), "running_mean": torch.ones(1), "num_batches_tracked": torch.tensor(7)})
    average.update_parameters(model)  # decay (1 + 1) / (10 + 1)
    assert averaged("0.weight") == pytest.approx(1 + 9 / 11)
    assert averaged("1.running_mean") == pytest.approx(9 / 11)
    assert averaged("1.num_batches_tracked") == 7
    average.n_averaged.fill_(1000)
    average.update_parameters(model, steps=2)  # decay 0.75 squared
    assert averaged("0.weight") == pytest.approx(2 - 2 / 11 * 0.75**2)


def trained(memory: BudgetedCpuMemory, **settings: Any) -> ACMDSTrainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(48, 8, generator=generator), torch.arange(48) % 2)
    asked = config(
        ema_decay=0.9, min_batch_size=8, max_batch_size=8, knee_gain_fraction=0.0, target_headroom_gb=0.0, **settings
    )
    return ACMDSTrainer(model, data, build_optimizer(model, asked), asked, "cpu", memory=memory)


def test_the_average_of_a_run_with_errors_is_that_of_a_run_without():
    clean, memory = trained(BudgetedCpuMemory(2**30)), BudgetedCpuMemory(2**30)
    struck = trained(memory)
    clean.train_epoch()
    done = 0

    def strike(operation: Any) -> None:
        nonlocal done
        done += 1
        if done in (331, 1331):  # far apart: how many operations a step has depends on the version of PyTorch
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory.on_operation = strike
    struck.train_epoch()
    assert struck.recorder.figures["oom_events"] >= 1
    assert clean.average is not None
    assert struck.average is not None
    assert clean.average.n_averaged == struck.average.n_averaged == 6
    for ours, theirs in zip(struck.average.parameters(), clean.average.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert struck.final_model is struck.average.module


def test_the_memory_of_the_average_is_counted():
    without, with_average = BudgetedCpuMemory(2**30), BudgetedCpuMemory(2**30)
    averaging = trained(with_average)
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    settings = config(target_headroom_gb=0.0)
    data = TensorDataset(torch.zeros(48, 8), torch.arange(48) % 2)
    same = ACMDSTrainer(plain, data, build_optimizer(plain, settings), settings, "cpu", memory=without)
    size = sum(tensor.nbytes for tensor in same.model.state_dict().values())
    assert averaging.average is not None
    assert with_average.read().allocated_bytes - without.read().allocated_bytes == size + 8  # and the count of updates


def test_the_whole_recipe_trains_digits(tmp_path: Path):
    settings = config(
        optimizer="sgd", lr=0.05, nesterov=True, weight_decay=5e-4, lr_schedule="one_cycle", label_smoothing=0.1,
        cutout_fraction=0.25, cutmix_alpha=1.0, mixup_alpha=0.2, ema_decay=0.95, epochs=3, max_batch_size=64,
        target_headroom_gb=0.1,
    )  # fmt: skip
    outcome = run_training(settings, output_dir=tmp_path)
    assert outcome.val_accuracy is not None
    assert outcome.val_accuracy > 0.8
    resumed = run_training(config(**{**vars(settings), "epochs": 4}), output_dir=tmp_path, resume=tmp_path)
    assert resumed.epochs == 4
