"""The noise gate in a whole training: what it changes, what it must not change, and what it leaves on the disk."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

from acmds_optimizer import ACMDSTrainer, TrainConfig, run_training
from acmds_optimizer.curriculum.gate import NoiseGate
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.flagged import write_flagged
from acmds_optimizer.engine.loss import Mixing, make_loss, relabelled
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.memory.device import BudgetedCpuMemory
from acmds_optimizer.zoo.folders import scan_classes

COUNT = 300


def clusters(wrong: int) -> TensorDataset:
    """Three clusters in the plane, the first `wrong` samples with the label of the next one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 3
    centres = torch.tensor([[0.0, 4.0], [4.0, -4.0], [-4.0, -4.0]])
    inputs = centres[labels] + torch.randn(COUNT, 2, generator=generator)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return TensorDataset(inputs, labels)


def make(wrong: int, **settings: Any) -> ACMDSTrainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    settings = {"epochs": 10, "max_batch_size": 32, "target_headroom_gb": 0.1, "enable_amp": False} | settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return ACMDSTrainer(
        model, clusters(wrong), optimizer, TrainConfig(**settings), "cpu", memory=BudgetedCpuMemory(2**30)
    )


def finish(trainer: ACMDSTrainer) -> torch.Tensor:
    while not trainer.finished:
        trainer.train_epoch()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_gate_that_does_not_fire_changes_not_one_bit():
    watched = make(0, direction="auto")
    assert torch.equal(finish(watched), finish(make(0)))
    assert watched.feedback.flagged is None


@pytest.mark.parametrize(
    "settings", [{"direction": "auto"}, {"noise_rate": 0.2}, {"direction": "easy", "noise_rate": "auto"}]
)
def test_wrong_labels_are_flagged_and_count_nothing(settings):
    trainer = make(60, **settings)
    finish(trainer)
    assert trainer.feedback.flagged is not None
    right = trainer.feedback.flagged == (np.arange(COUNT) < 60)
    assert right.mean() > 0.97
    weights = dict(zip(trainer.sampler.plan.order.tolist(), trainer.sampler.plan.weights.tolist(), strict=True))
    assert {weights[i] for i in np.flatnonzero(trainer.feedback.flagged)} == {0.0}
    assert (trainer.dataset.scores.count > 0).all(), "the scores of flagged samples stay fresh"
    assert trainer.dataset.scores.count.max() - trainer.dataset.scores.count.min() <= (
        7 if "easy" in settings.values() else 0
    )


def test_flagged_samples_can_learn_what_the_model_takes_them_for():
    trainer = make(60, direction="auto", noise_action="relabel")
    finish(trainer)
    gate, right = trainer.feedback.gate, clusters(0).tensors[1]
    assert gate is not None
    assert gate.fired
    learned = torch.where(gate.guesses < 0, gate.labels, gate.guesses)
    assert (learned == right).float().mean() > 0.98
    assert np.array_equal((gate.guesses >= 0).numpy(), gate.flagged)
    assert (trainer.sampler.plan.weights == 1.0).all()
    batch = Batch(torch.zeros(4, 2), gate.labels[:4], torch.arange(4), torch.ones(4))
    prepared = trainer._prepared(batch)
    assert prepared.soft is not None
    assert torch.equal(prepared.soft, nn.functional.one_hot(learned[:4], 3).float())
    assert torch.equal(prepared.targets, gate.labels[:4]), "scores are of the given labels"


def test_what_is_mixed_are_the_labels_that_are_learned():
    given, guesses = torch.tensor([0, 0, 1, 2]), torch.tensor([-1, 2, -1, -1])
    batch = relabelled(Batch(torch.rand(4, 3, 8, 8), given, torch.arange(4), torch.ones(4)), guesses, 3)
    mixing = Mixing(TrainConfig(mixup_alpha=0.2), 3, (3, 8, 8))
    mixed = mixing(batch, 0, 0).slice(0, 4)
    assert torch.equal(mixed.targets, given)
    assert mixed.soft is not None
    present = mixed.soft > 0
    assert present[1].tolist() == [True, False, True]
    assert present[3].tolist() == [False, True, True]


def test_a_loss_of_ones_own_has_no_labels_to_replace():
    with pytest.raises(ConfigError, match="noise_action: needs cross-entropy"):
        make_loss(TrainConfig(noise_action="relabel"), nn.CrossEntropyLoss(reduction="none"))


def test_a_twentieth_of_the_training_has_passed_before_a_loss_counts():
    trainer = make(0, direction="auto", epochs=40)
    warm = []
    for _ in range(3):
        trainer.train_epoch()
        assert trainer.feedback.gate is not None
        warm.append(trainer.feedback.gate.warm)
    assert warm == [False, True, True]


@pytest.mark.parametrize(
    ("settings", "step"),  # in the middle of the fourth epoch or so, before the gate fires, or of the eighth, after it
    [
        ({"direction": "hard", "noise_rate": "auto", "scoring": "loss"}, 33),
        ({"direction": "hard", "noise_rate": "auto", "scoring": "forgetting"}, 33),
        ({"direction": "auto", "noise_action": "relabel"}, 75),
    ],
)
def test_a_training_with_a_gate_stopped_and_resumed_equals_one_that_was_not(settings, step, tmp_path: Path):
    whole = finish(make(60, **settings))
    stopped = make(60, **settings)
    stopped.should_stop = lambda: stopped.step >= step
    while not stopped.should_stop():
        stopped.train_epoch()
    stopped.save_checkpoint(tmp_path / "checkpoint.pt")
    resumed = make(60, **settings)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(finish(resumed), whole)


def noisy_data() -> tuple[TensorDataset, TensorDataset]:
    return clusters(60), clusters(0)


def small_network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, num_classes))


def test_a_run_leaves_a_table_of_what_it_flagged_and_an_event(tmp_path: Path):
    config = TrainConfig(
        model="tests.test_noise:small_network", dataset="tests.test_noise:noisy_data", num_classes=3, device="cpu",
        memory_limit_gb=1.0, target_headroom_gb=0.1, epochs=8, lr=0.01, direction="auto", enable_amp=False,
        checkpoint_every=0,
    )  # fmt: skip
    outcome = run_training(config, output_dir=tmp_path / "run")
    assert outcome.val_accuracy is not None
    assert outcome.val_accuracy > 0.97
    with (tmp_path / "run" / "flagged.csv").open(newline="") as file:
        flagged = [int(row["index"]) for row in csv.DictReader(file)]
    assert len(set(flagged) & set(range(60))) >= 0.9 * max(60, len(flagged))
    assert not (tmp_path / "run" / "flagged.png").exists(), "points in the plane are no images"
    assert "noise_gate" in (tmp_path / "run" / "events.csv").read_text()


def test_flagged_images_are_listed_worst_first_with_a_sheet(tmp_path: Path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (12, 10), (80 * number, 0, 0)).save(tmp_path / "data" / name / f"{number}.png")
    dataset = Subset(scan_classes(tmp_path / "data"), [5, 1, 3])  # dog/2, cat/1, dog/0
    gate = NoiseGate(3, "auto")
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    losses = torch.tensor([2.0, 3.0, 4.0])
    gate.update(torch.arange(3), torch.tensor([1, 0, 1]), logits, losses)
    gate.flagged = np.array([True, False, True])
    write_flagged(tmp_path, dataset, gate, ["cat", "dog"])
    with (tmp_path / "flagged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], Path(row["path"]).name, row["label"], row["prediction"]) for row in rows] == [
        ("2", "0.png", "dog", "cat"),
        ("0", "2.png", "dog", "cat"),
    ]
    assert [float(row["confidence"]) for row in rows] == pytest.approx([0.982, 0.881], abs=1e-3)
    assert [float(row["difficulty"]) for row in rows] == pytest.approx(
        [1 - 2.71828**-5.771, 1 - 2.71828**-2.885], abs=1e-3
    )
    with Image.open(tmp_path / "flagged.png") as sheet:
        assert sheet.size == (8 * 112, 112 + 26)


def test_flagged_files_that_are_broken_or_oddly_named_are_listed_too(tmp_path: Path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").mkdir()
    for name in (b"cat/\xe9.png", b"dog/1.png"):
        Image.new("RGB", (12, 10)).save(tmp_path / "data" / os.fsdecode(name))
    (tmp_path / "data" / "dog" / "2.png").write_bytes(b"")  # broken_images: skip
    dataset = scan_classes(tmp_path / "data")
    gate = NoiseGate(3, "auto")
    gate.update(torch.arange(3), torch.tensor([0, 1, 1]), torch.zeros(3, 2), torch.tensor([4.0, 2.0, 3.0]))
    gate.flagged[:] = True
    write_flagged(tmp_path, dataset, gate, dataset.classes)
    with (tmp_path / "flagged.csv").open(newline="", encoding="utf-8") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["\\udce9.png", "2.png", "1.png"]
    assert (tmp_path / "flagged.png").exists()
