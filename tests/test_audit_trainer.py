"""What a walk through `acmds-train` and its library as a user found: each of these went wrong once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from acmds_optimizer import (
    ACMDSTrainer,
    AdaptiveCurriculumSampler,
    CurriculumConfig,
    DifficultyAwareDataset,
    MemoryPressureController,
    TrainConfig,
    run_training,
)
from acmds_optimizer.config import GIB
from acmds_optimizer.engine import checkpoint, telemetry, trainer
from acmds_optimizer.engine import data as data_module
from acmds_optimizer.engine.average import WeightAverage
from acmds_optimizer.engine.data import RESIDENT_LIMIT_BYTES, resident_limit
from acmds_optimizer.engine.prepare import build_optimizer, checkpoint_activations
from acmds_optimizer.engine.run import evaluate_checkpoint
from acmds_optimizer.engine.telemetry import CsvLog
from acmds_optimizer.errors import ACMDSError, DataError, OutOfMemoryForGoodError

DIGITS: dict[str, Any] = {"model": "small_cnn", "dataset": "digits", "device": "cpu", "enable_amp": False}


def vectors(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 8, generator=generator), torch.arange(count) % 3)


def made(model: nn.Module, **options: Any) -> ACMDSTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1)
    return ACMDSTrainer(model, options.pop("dataset", vectors()), optimizer, config, "cpu", **options)


class Centred(nn.Module):
    """Keeps a running mean in a buffer, written into or replaced by another tensor in each step."""

    def __init__(self, *, replace: bool) -> None:
        super().__init__()
        self.replace = replace
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        new = 0.5 * self.get_buffer("mean") + 0.5
        if self.replace:
            self.mean = new
        else:
            self.get_buffer("mean").copy_(new)
        return inputs


def test_the_average_of_the_weights_follows_a_buffer_that_is_replaced_in_each_step():
    averages = []
    for replace in (False, True):
        model = Centred(replace=replace)
        average = WeightAverage(model, 0.5)
        for _ in range(4):
            model(torch.zeros(1, 8))
            average.update_parameters(model)
        averages.append(average.module.get_buffer("mean"))
    assert torch.equal(*averages)


def test_a_table_stays_as_it_was_where_a_resume_is_killed_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "steps.csv"
    path.write_text("step,loss\n0,2.5\n1,1.5\n2,1.0\n")

    def cut_off(*arguments: Any) -> Any:
        yield ["0", "2.5"]
        raise KeyboardInterrupt

    monkeypatch.setattr(telemetry, "_kept", cut_off)
    with pytest.raises(KeyboardInterrupt):
        CsvLog(path, ["step", "loss"], keep_below_step=2)
    assert path.read_text() == "step,loss\n0,2.5\n1,1.5\n2,1.0\n"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_table_with_other_columns_are_kept_under_those_of_now(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("old,step,loss\nx,0,2.5\nx,1,1.5\n")
    log = CsvLog(path, ["step", "loss", "new"], keep_below_step=1)
    log.write([{"step": 1, "loss": 0.5, "new": 7}])
    log.close()
    assert path.read_text().split() == ["step,loss,new", "0,2.5,", "1,0.5,7"]


def test_records_that_cannot_be_written_end_a_run_with_a_message():
    log = CsvLog(Path("/dev/full"), ["step"])
    with pytest.raises(ACMDSError, match=r"/dev/full: cannot be written: No space left on device.*--resume"):
        log.write([{"step": 1}])


def folder_with_broken_validation(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    broken = root / "val" / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return broken


def test_an_epoch_whose_validation_fails_is_not_lost(tmp_path, monkeypatch):
    broken = folder_with_broken_validation(tmp_path / "images")
    config = TrainConfig(**DIGITS | {"dataset": str(tmp_path / "images"), "epochs": 1, "num_workers": 0})
    monkeypatch.setattr(data_module, "RESIDENT_LIMIT_BYTES", 0)  # images are decoded as they are needed
    with pytest.raises(DataError, match=r"0\.png"):
        run_training(config, output_dir=tmp_path / "run")
    broken.write_bytes((tmp_path / "images" / "val" / "a" / "1.png").read_bytes())
    outcome = run_training(config, output_dir=tmp_path / "run", resume=tmp_path / "run")
    assert (outcome.epochs, outcome.samples) == (1, 16)
    assert outcome.val_loss is not None


def test_a_card_without_room_for_the_data_is_told_before_the_first_step(monkeypatch):
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "make_source", full)
    with pytest.raises(OutOfMemoryForGoodError, match=r"before the first step.*\(budget 1 GB\).*--memory-limit-gb"):
        made(nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("device", "room_gb", "limit_gb"), [("cuda", 20.0, 2.0), ("cuda", 2.0, 0.5), ("cuda", -1.0, 0.0), ("cpu", 0.1, 2.0)]
)
def test_data_stay_on_a_card_up_to_a_quarter_of_what_training_may_use_of_it(device, room_gb, limit_gb):
    assert RESIDENT_LIMIT_BYTES == 2 * GIB
    assert resident_limit(torch.device(device), room_gb * GIB) == limit_gb * GIB


class Sizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.seen: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(len(inputs))
        return self.head(inputs)


def test_a_validation_before_any_step_is_in_large_batches():
    model = Sizes()
    with made(model, val_dataset=vectors(100)) as training:
        training.evaluate()
    assert model.seen == [64, 36]


def test_a_checkpoint_is_validated_with_its_data_made_ready_once(tmp_path, monkeypatch):
    run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path)
    state = checkpoint.load(tmp_path)
    sources = []

    def counted(*arguments: Any, **options: Any) -> Any:
        sources.append(data_module.make_source(*arguments, **options))
        return sources[-1]

    monkeypatch.setattr(trainer, "make_source", counted)
    figures = evaluate_checkpoint(state, TrainConfig(**DIGITS))
    assert len(sources) == 1
    assert figures["val_loss"] == pytest.approx(state["trainer"]["last_evaluation"]["val_loss"], rel=1e-5)


def test_what_ended_a_run_is_said_then_and_when_it_is_resumed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = DIGITS | {"epochs": 9, "patience_epochs": 1, "lr": 1e-12, "best_metric": "val_accuracy"}
    run_training(TrainConfig(**settings), output_dir=tmp_path)
    assert "stopped early: no better val_accuracy than 0." in caplog.text
    assert "of epoch 1, in 1 epochs (patience_epochs)" in caplog.text
    run_training(TrainConfig(**settings | {"epochs": 20}), output_dir=tmp_path, resume=tmp_path)
    assert (
        "the run had ended already, after 52 steps, by patience_epochs 1; with a larger one it goes on" in caplog.text
    )


def test_a_resumed_run_takes_up_other_scores_than_those_of_its_checkpoint(tmp_path):
    first, second = np.linspace(0, 0.9, 1618), np.linspace(0.9, 0, 1618)
    for name, scores in (("first", first), ("second", second)):
        np.save(tmp_path / f"{name}.npy", scores.astype(np.float32))
    settings = DIGITS | {"scoring": str(tmp_path / "first.npy")}
    run_training(TrainConfig(**settings, max_steps=1), output_dir=tmp_path / "run")
    now = settings | {"scoring": str(tmp_path / "second.npy")}
    run_training(TrainConfig(**now, max_steps=2), output_dir=tmp_path / "run", resume=tmp_path / "run")
    kept = checkpoint.load(tmp_path / "run")["feedback"]["scores"]["average"]
    assert 1.0 - torch.exp(-kept).numpy() == pytest.approx(second, abs=1e-5)
    after = settings | {"scoring": "forgetting"}
    run_training(TrainConfig(**after, max_steps=3), output_dir=tmp_path / "run", resume=tmp_path / "run")


def test_a_layer_put_into_evaluation_mode_between_epochs_stays_in_it():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    norm: Any = model[0]
    with made(model) as training:
        training.train_epoch()
        norm.eval()
        before = norm.running_mean.clone()
        training.train_epoch()
        assert torch.equal(norm.running_mean, before)
        model.eval()  # for a look of one's own, and forgotten
        training.train_epoch()
        assert model.training
        assert torch.equal(norm.running_mean, before)


def test_what_is_done_between_steps_does_not_count_as_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr("acmds_optimizer.engine.trainer.time.perf_counter", lambda: now)

    def checkpoint_for_an_hour() -> None:
        nonlocal now
        now += 3600.0

    with made(nn.Linear(8, 3)) as training:
        training.after_step = checkpoint_for_an_hour
        training.train_epoch()
        assert now >= 3600.0
        assert training.seconds == 0.0


def test_a_sampler_that_is_resumed_in_mid_epoch_has_the_length_of_what_follows():
    controller = MemoryPressureController("cpu", CurriculumConfig(max_batch_size=8, target_headroom_gb=0.1))
    sampler = AdaptiveCurriculumSampler(DifficultyAwareDataset(vectors(40)), controller)
    batches = iter(sampler)
    assert [len(next(batches)) for _ in range(2)] == [8, 8]
    state = sampler.state_dict()
    sampler.load_state_dict(state)
    assert len(sampler) == 3
    assert len(list(sampler)) == 3
    assert len(sampler) == 5


def test_too_few_outputs_are_refused_also_without_a_bundle():
    with made(nn.Linear(8, 2)) as training, pytest.raises(DataError, match="2 outputs for 3 classes"):
        training.train_epoch()


def test_layers_without_a_shape_are_refused_where_the_optimizer_is_made():
    with pytest.raises(DataError, match="run one batch through it"):
        build_optimizer(nn.LazyLinear(3), TrainConfig())


def blocks(norm: nn.Module, first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    convolution = first or nn.Conv2d(3, 4, 3)
    return nn.Sequential(nn.Sequential(nn.Sequential(convolution, norm, nn.Conv2d(4, 4, 1)), nn.Flatten()))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)], ids=["batch", "instance"]
)
def test_recomputed_activations_leave_the_statistics_of_every_norm_as_one_pass_does(norm):
    found = []
    for recompute in (False, True):
        norm.reset_parameters()
        model = blocks(norm)
        assert not recompute or checkpoint_activations(model)
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        found.append([buffer.clone() for buffer in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_block_with_a_spectral_norm_is_not_recomputed(kind, caplog):
    model = blocks(nn.Identity(), kind(nn.Conv2d(3, 4, 3)))
    assert not checkpoint_activations(model)
    assert "1 blocks have a spectral_norm" in caplog.text
