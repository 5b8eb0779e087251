"""Plausible wrong input to a training run: it ends with a message that says what to change, and harms nothing."""

from __future__ import annotations

import csv
import json
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acmds_optimizer import TrainConfig, cli, run_training
from acmds_optimizer.engine import checkpoint
from acmds_optimizer.engine.telemetry import CsvLog
from acmds_optimizer.errors import ACMDSError, CheckpointError, ConfigError, DataError


def config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "model": "small_cnn",
        "dataset": "digits",
        "device": "cpu",
        "enable_amp": False,
        "max_steps": 2,
    }
    return TrainConfig(**(defaults | settings))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "steps.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Tiny(nn.Module):
    def __init__(self, num_classes: int, *, pair: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes).requires_grad_(not frozen)
        self.pair = pair

    def forward(self, inputs: torch.Tensor) -> Any:
        logits = self.head(inputs.flatten(1))
        return (logits, inputs) if self.pair else logits


@pytest.fixture
def models(monkeypatch) -> str:
    module: Any = types.ModuleType("review_models")
    module.pair = lambda num_classes: Tiny(num_classes, pair=True)
    module.frozen = lambda num_classes: Tiny(num_classes, frozen=True)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_resumed_run_takes_the_learning_rate_and_weight_decay_it_is_given(tmp_path):
    settings: dict[str, Any] = {"lr_schedule": "constant", "warmup_fraction": 0.0}
    run_training(config(lr=0.001, **settings), output_dir=tmp_path)
    now = config(lr=0.5, weight_decay=0.25, max_steps=4, **settings)
    run_training(now, output_dir=tmp_path, resume=tmp_path)
    assert [float(row["lr"]) for row in rows(tmp_path)] == [0.001, 0.001, 0.5, 0.5]
    others, decayed = checkpoint.load(tmp_path)["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "sgd"}, "of optimizer 'adamw', so it cannot go on as 'sgd'"),
        ({"model": "resnet18"}, "of model 'small_cnn', so it cannot go on as 'resnet18'"),
    ],
)
def test_a_run_cannot_go_on_with_another_model_or_optimizer(tmp_path, setting, message):
    run_training(config(), output_dir=tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(CheckpointError, match=message):
        run_training(config(max_steps=4, **setting), output_dir=tmp_path, resume=tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_resumed_into_the_folder_of_another_leaves_that_one_alone(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        run_training(config(), output_dir=folder)
    before = (second / "checkpoint.pt").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        run_training(config(max_steps=4), output_dir=second, resume=first)
    assert (second / "checkpoint.pt").read_bytes() == before
    run_training(config(max_steps=4), output_dir=tmp_path / "third", resume=first)
    assert [row["step"] for row in rows(tmp_path / "third")] == ["2", "3"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        run_training(config(), output_dir=tmp_path / "file" / "run")


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"value": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python turns the signal into an OSError
    try:
        with pytest.raises(ACMDSError, match=r"checkpoint\.pt: the checkpoint cannot be written"):
            checkpoint.save(path, {"value": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(path)["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_that_was_cut_off_is_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("step,loss\n0,2.5\n1,1.5\n1")
    CsvLog(path, ["step", "loss"], keep_below_step=15).close()
    assert path.read_text().split() == ["step,loss", "0,2.5", "1,1.5"]


@pytest.mark.parametrize(
    ("name", "message"), [("pair", "must give one tensor of logits"), ("frozen", "none of its parameters requires")]
)
def test_a_model_that_cannot_be_trained_is_told_why(models, name, message):
    with pytest.raises(DataError, match=message):
        run_training(config(model=f"{models}:{name}"))


def test_none_on_the_command_line_takes_a_setting_of_the_file_back(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"max_steps": 150, "memory_limit_gb": 2.0, "image_size": 32}))
    options = vars(cli.build_parser().parse_args(["--max-steps", "none", "--memory-limit-gb", "none"]))
    flags = {name: options[name] for name in ("max_steps", "memory_limit_gb")}
    resolved, _ = cli._resolve(str(path), None, flags)
    assert (resolved.max_steps, resolved.memory_limit_gb, resolved.image_size) == (None, None, 32)
    with pytest.raises(ConfigError, match="epochs: 'none'"):
        cli._resolve(str(path), None, {"epochs": "none"})


def test_a_run_without_checkpoints_does_not_promise_one(tmp_path, capsys):
    flags = ["--model", "small_cnn", "--dataset", "digits", "--device", "cpu", "--max-steps", "2", "--quiet"]
    assert cli.main([*flags, "--checkpoint-every", "0", "--output-dir", str(tmp_path / "run")]) == 0
    assert f"done; the records are in {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_last_sample_joins_the_batch_before_it():
    # 1,797 digits, all for training: 1,796 and one, which BatchNorm would refuse alone
    outcome = run_training(config(val_fraction=0.0, effective_batch_size=1796, max_batch_size=1796, epochs=1))
    assert (outcome.steps, outcome.samples) == (1, 1797)


def test_a_model_with_too_few_outputs_is_refused_before_it_trains(models):
    sys.modules[models].few = lambda num_classes: Tiny(3)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="3 outputs for 10 classes"):
        run_training(config(model=f"{models}:few"))


def test_a_validation_that_cannot_fit_says_so(monkeypatch):
    from acmds_optimizer.errors import OutOfMemoryForGoodError

    tried = []

    def out_of_memory(*arguments: Any) -> dict[str, float]:
        tried.append(arguments[-1])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("acmds_optimizer.engine.evaluate._evaluate", out_of_memory)
    with pytest.raises(OutOfMemoryForGoodError, match="not one sample can be validated"):
        run_training(config())
    assert tried[-1] == 1
    assert tried == sorted(tried, reverse=True)


def test_who_asks_to_stop_does_not_wait_for_a_validation(tmp_path, monkeypatch):
    from acmds_optimizer.engine.trainer import ACMDSTrainer

    monkeypatch.setattr(ACMDSTrainer, "evaluate", lambda self: pytest.fail("validated"))
    asked = iter([False, False, False, False, *[True] * 20])  # after the second step
    outcome = run_training(config(max_steps=None), output_dir=tmp_path, should_stop=lambda: next(asked))
    assert (outcome.steps, outcome.stopped_early) == (2, True)
    assert checkpoint.load(tmp_path)["trainer"]["step"] == 2


def test_a_finished_run_that_is_resumed_keeps_its_figures(tmp_path):
    first = run_training(config(max_steps=None, epochs=1), output_dir=tmp_path)
    again = run_training(config(max_steps=None, epochs=1), output_dir=tmp_path, resume=tmp_path)
    assert first.train_loss is not None
    assert (again.train_loss, again.val_accuracy, again.steps) == (first.train_loss, first.val_accuracy, first.steps)
