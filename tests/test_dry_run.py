"""A dry run predicts what a run then takes, without a GPU and without the memory."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from acmds_optimizer import TrainConfig, cli, run_training
from acmds_optimizer.config import GIB
from acmds_optimizer.engine.data import make_source
from acmds_optimizer.engine.dry_run import Prediction, predict, resident_bytes
from acmds_optimizer.engine.resident import ResidentSource
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.datasets import build_data
from acmds_optimizer.zoo.models import SmallCNN, build_model, freeze


def config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"model": "small_cnn", "dataset": "digits", "device": "cpu", "enable_amp": False}
    return TrainConfig(**(defaults | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_size": 256},
        {"max_batch_size": 256, "ema_decay": 0.9, "optimizer": "sgd", "min_batch_size": 64},
        {"max_batch_size": 256, "freeze": "backbone"},
        {"max_batch_size": 256, "freeze": "features.0,features.1", "ema_decay": 0.9},
    ],
)
def test_the_predicted_peak_is_that_of_a_run_on_the_cpu_card(settings, tmp_path):
    asked = config(target_headroom_gb=0.0, knee_gain_fraction=0.0, max_steps=4, **settings)
    run_training(asked, output_dir=tmp_path)
    with (tmp_path / "steps.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["micro_batch"] == "256"]
    real = max(float(row["peak_allocated_gb"]) for row in rows) * GIB
    model = SmallCNN(10, 1)
    freeze(model, asked.freeze)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prediction = predict(model, (1, 8, 8), asked)
    assert prediction.peak_bytes(256) == pytest.approx(real, rel=0.1)
    assert prediction.trained == trained


@pytest.mark.parametrize(
    ("items", "settings"),
    [
        (torch.zeros(30, 3, 96, 96), {}),
        (torch.zeros(30, 20), {}),
        (torch.zeros(30, 3, 32, 32, dtype=torch.uint8), {"augment": False, "auto_augment": "rand"}),
        (torch.zeros(30, 3, 32, 32, dtype=torch.uint8), {"auto_augment": "rand"}),
        (torch.zeros(30, 3, 96, 96, dtype=torch.uint8), {}),
    ],
)
def test_data_that_stays_on_the_device_is_counted(items, settings, monkeypatch):
    data = TensorDataset(items, torch.arange(30) % 2), TensorDataset(items[:10], torch.arange(10) % 2)
    monkeypatch.setattr("acmds_optimizer.zoo.datasets.load_callable", lambda *_: lambda: data)
    asked = config(dataset="own:data", num_workers=0, device="cuda", **settings)
    bundle = build_data(asked)
    real = 0
    for part, train in ((bundle.train, True), (bundle.val, False)):
        assert part is not None
        source = make_source(part, bundle, asked, "cpu", train=train)
        real += source.images.nbytes if isinstance(source, ResidentSource) else 0
    assert resident_bytes(asked, bundle) == real
    assert resident_bytes(dataclasses.replace(asked, memory_limit_gb=3.000001), bundle) == 0, (
        "268 bytes are left for data"
    )
    assert resident_bytes(dataclasses.replace(asked, device="cpu"), bundle) == 0, "they lie beside the CPU's card"


def test_the_peak_is_a_line_in_the_micro_batch_over_a_floor():
    prediction = Prediction([], 0, 0, sizes=(4, 256, 512), peaks=(1000, 2560 + 500, 5120 + 500))
    assert prediction.bytes_per_sample == 10
    assert [prediction.peak_bytes(size) for size in (1, 50, 51, 100, 1024)] == [1000, 1000, 1010, 1500, 10740]
    assert [prediction.largest_batch(budget) for budget in (999, 1000, 1500, 10740)] == [0, 50, 100, 1024]


def test_recomputed_activations_need_less_even_in_full_precision():
    def per_sample(**settings) -> float:
        model = build_model("resnet18", 10, image_size=32)
        return predict(model, (3, 32, 32), config(device="cuda", **settings)).bytes_per_sample

    half = per_sample(enable_amp=True)
    assert per_sample(gradient_checkpointing=True) < 0.7 * 2 * half


def test_a_dry_run_needs_no_gpu_and_no_download_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--model", "small_cnn", "--dataset", "cifar10", "--dry-run"]) == 0
    out = capsys.readouterr().out
    figures = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert figures["model"] == "small_cnn, 141,034 parameters, 141,034 of them trained"
    assert "on a 24 GB card (23.2 GB to allocate), 3 GB kept free" in figures["largest_batch"]
    assert int(figures["largest_batch"].split(",")[0]) > 1000
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_is_too_small_is_said(capsys):
    arguments = ["--model", "resnet18", "--dataset", "cifar10", "--dry-run", "--memory-limit-gb", "0.1"]
    assert cli.main([*arguments, "--target-headroom-gb", "0"]) == 0
    assert "nothing fits: try --gradient-checkpointing" in capsys.readouterr().out


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(inputs.flatten(1)) if inputs.sum().item() > 0 else inputs


def test_a_model_that_looks_at_values_is_refused_in_words():
    with pytest.raises(DataError, match=r"--dry-run: small_cnn does not run on inputs \(1, 8, 8\) without data"):
        predict(LooksAtValues(), (1, 8, 8), config())


class Gives(nn.Module):
    """A model whose output is something else than logits."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.wrap = wrap

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.wrap(self.head(inputs.flatten(1)))


@pytest.mark.parametrize(
    ("wrap", "kind"), [(lambda logits: (logits, logits), "tuple"), (lambda logits: {"logits": logits}, "dict")]
)
def test_a_model_that_gives_something_else_than_logits_is_refused_as_in_training(wrap, kind):
    with pytest.raises(DataError, match=rf"Gives must give one tensor of logits \(B, C\), but gives a {kind}: wrap it"):
        predict(Gives(wrap), (1, 8, 8), config())


def test_a_dry_run_refuses_fewer_classes_than_the_labels_show_as_training_does(capsys):
    arguments = ["--model", "small_cnn", "--dataset", "digits", "--num-classes", "3"]
    assert cli.main([*arguments, "--dry-run"]) == 2
    assert "num_classes is 3, but the labels go up to 9: it must be at least 10" in capsys.readouterr().err
