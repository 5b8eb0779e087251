"""The loop as a whole: what memory does to a run must not change what the run learns."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import itertools
import json
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import acmds_optimizer
from acmds_optimizer import (
    ACMDSTrainer,
    CurriculumConfig,
    DifficultyAwareDataset,
    MemoryPressureController,
    MemoryPressureLevel,
    RTX3090ACMDSTrainer,
    TrainConfig,
    run_training,
)
from acmds_optimizer.engine import prepare
from acmds_optimizer.engine.columns import EVENT_COLUMNS, STEP_COLUMNS
from acmds_optimizer.engine.step import parts
from acmds_optimizer.errors import (
    ACMDSError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryForGoodError,
)
from acmds_optimizer.memory.device import BudgetedCpuMemory, MemoryReading

GIB = 2**30


def data(count: int = 100, features: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, features, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def network(features: int = 20) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(Double(), nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 2)).double()


class Double(nn.Module):
    """The rest of the model computes in float64, so that only the order of sums can differ."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double()


def make(memory: BudgetedCpuMemory | None = None, dataset=None, **settings: Any) -> ACMDSTrainer:
    model = network()
    settings = {
        "target_headroom_gb": 0.0001,
        "max_batch_size": 32,
        "enable_amp": False,
        "knee_gain_fraction": 0.0,
    } | settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    memory = memory or BudgetedCpuMemory(GIB)
    return ACMDSTrainer(model, dataset or data(), optimizer, CurriculumConfig(**settings), "cpu", memory=memory)


def weights(trainer: ACMDSTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_names_users_know_are_there_with_their_defaults():
    config = CurriculumConfig()
    expected = {
        "target_headroom_gb": 3.0, "min_batch_size": 4, "max_batch_size": 64, "difficulty_window": 1000,
        "pressure_smoothing": 0.9, "pid_kp": 0.15, "pid_ki": 0.02, "pid_kd": 0.08, "curriculum_alpha": 0.05,
        "enable_amp": True, "gradient_checkpointing": False, "enable_cuda_graphs": "auto", "gc_threshold_gb": 2.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert RTX3090ACMDSTrainer is ACMDSTrainer
    assert all(hasattr(acmds_optimizer, name) for name in acmds_optimizer.__all__)


@pytest.mark.parametrize(
    ("total", "largest", "expected"), [(64, 22, [22, 21, 21]), (64, 64, [64]), (10, 4, [4, 3, 3]), (3, 8, [3])]
)
def test_an_effective_batch_is_cut_into_near_equal_parts(total, largest, expected):
    assert parts(total, largest) == expected


def test_an_epoch_reports_the_mean_of_the_real_per_sample_losses():
    trainer = make(dataset=DifficultyAwareDataset(data()))
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    trainer.schedule.base_lrs = [0.0]  # the weights stand still, so the losses can be computed afterwards
    figures = trainer.train_epoch()
    inputs, targets = data().tensors
    losses = nn.functional.cross_entropy(trainer.model(inputs), targets, reduction="none")
    assert figures["epoch_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert torch.allclose(trainer.dataset.difficulty_scores, 1 - torch.exp(-losses.float()), atol=1e-5)
    assert figures["samples"] == 100
    assert len(trainer.dataset.difficulty_scores.unique()) > 90, "not the batch mean written to every sample"


def test_without_a_number_of_epochs_every_call_trains_one():
    with make() as trainer:
        samples = [trainer.train_epoch()["samples"] for _ in range(12)]
    assert samples == list(range(100, 1300, 100))


def test_a_learning_rate_that_the_user_sets_between_epochs_is_that_of_the_next_and_of_a_checkpoint():
    trainer, resumed = make(), make()
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    trainer.train_epoch()
    for expected in (0.005, 0.0025):
        schedule.step()
        resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
        for one in (trainer, resumed):
            one.train_epoch()
            assert one.optimizer.param_groups[0]["lr"] == expected
        assert torch.equal(weights(resumed), weights(trainer))


@pytest.mark.parametrize("config", [CurriculumConfig, functools.partial(TrainConfig, lr_schedule="constant")])
def test_a_parameter_group_that_is_added_between_epochs_is_trained_with_its_own_rate(config):
    model = network()
    body, head = model.get_submodule("1"), model.get_submodule("3")
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, fused=True)
    settings = config(target_headroom_gb=0.0001, enable_amp=False, max_batch_size=32)
    trainer = ACMDSTrainer(model, data(), optimizer, settings, "cpu", memory=BudgetedCpuMemory(GIB))
    trainer.train_epoch()
    before = [p.detach().clone() for p in body.parameters()]
    optimizer.add_param_group({"params": body.parameters(), "lr": 0.001})
    trainer.train_epoch()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.001]
    assert not any(torch.equal(now, was) for now, was in zip(body.parameters(), before, strict=True))


def test_what_a_step_needs_is_learned_anew_where_a_frozen_layer_is_trained_from_now_on():
    model = nn.Sequential(nn.Linear(20, 4000), nn.Tanh(), nn.Linear(4000, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=0.01, fused=True)
    memory = BudgetedCpuMemory(3 * 2**20)
    settings = CurriculumConfig(target_headroom_gb=0.0001, enable_amp=False, max_batch_size=128, knee_gain_fraction=0)
    with ACMDSTrainer(model, data(256), optimizer, settings, memory=memory) as trainer:
        trainer.train_epoch()
        before, errors = trainer.controller.batch_size, trainer.recorder.figures["oom_events"]
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters()})
        trainer.train_epoch()
        assert all(parameter in optimizer.state for parameter in model.parameters())
        assert trainer.recorder.figures["oom_events"] == errors
        assert trainer.controller.batch_size < before


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 32])
def test_the_micro_batch_does_not_change_what_is_learned(micro_batch):
    fixed = make()
    fixed.train_epoch()
    small = make(min_batch_size=1, max_batch_size=micro_batch, effective_batch_size=32)
    small.train_epoch()
    assert small.recorder.figures["steps"] == fixed.recorder.figures["steps"]
    # float64, and sums in another order: equal to rounding
    assert torch.allclose(weights(small), weights(fixed), rtol=0, atol=1e-12)


def test_a_run_with_errors_equals_a_run_without():
    clean = make(min_batch_size=8, max_batch_size=8)
    memory = BudgetedCpuMemory(GIB)
    struck = make(memory, min_batch_size=8, max_batch_size=8)
    operations = itertools.count(1)

    def strike(operation) -> None:
        if next(operations) % 401 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for trainer in (clean, struck):
        trainer.train_epoch()  # the first step rehearses
    memory.on_operation = strike
    for _ in range(4):
        clean.train_epoch()
        struck.train_epoch()
    assert struck.recorder.figures["oom_events"] >= 5
    assert struck.recorder.figures["oom_recovered"] == struck.recorder.figures["oom_events"]
    assert torch.allclose(weights(struck), weights(clean), rtol=0, atol=1e-11)
    assert torch.equal(struck.dataset.scores.count, clean.dataset.scores.count)


def test_no_sample_is_lost_or_repeated_while_a_neighbour_comes_and_goes():
    memory = BudgetedCpuMemory(900_000)
    trainer = make(memory, batch_policy="free", max_batch_size=512, dataset=data(3000))
    operations = itertools.count()

    def neighbour(operation) -> None:
        memory.neighbour_bytes = 600_000 if next(operations) // 310 % 2 else 0

    memory.on_operation = neighbour
    for epoch in range(1, 4):
        trainer.train_epoch()
        assert (trainer.dataset.scores.count == epoch).all()
    assert trainer.recorder.figures["oom_events"] > 0


def test_the_batch_shrinks_for_a_neighbour_and_grows_back():
    memory = BudgetedCpuMemory(900_000)
    trainer = make(memory, batch_policy="free", max_batch_size=512, dataset=data(6_000))
    trainer.train_epoch()
    alone = trainer.controller.batch_size
    memory.neighbour_bytes = 500_000
    trainer.train_epoch()
    squeezed = trainer.controller.batch_size
    memory.neighbour_bytes = 0
    trainer.train_epoch()
    assert squeezed < 0.6 * alone
    assert trainer.controller.batch_size == alone


def test_the_event_of_a_neighbour_on_a_small_card_says_how_much_it_took(monkeypatch):
    memory = BudgetedCpuMemory(900_000)
    trainer = make(memory)
    said: list[str] = []
    monkeypatch.setattr(trainer.recorder, "note", lambda where, kind, message, *_: said.append(f"{kind}: {message}"))

    def neighbour(operation) -> None:
        memory.neighbour_bytes = 500_000 if trainer.step >= 3 else 0

    memory.on_operation = neighbour
    trainer.train_epoch()
    assert said == ["neighbour_change: the budget changed by -0.000466 GB"]


@pytest.mark.parametrize("whole", [False, True], ids=["a part", "all of it"])
def test_what_is_in_evaluation_mode_within_a_model_stays_so_over_training_and_validation(whole):
    frozen, trained = nn.BatchNorm1d(20), nn.BatchNorm1d(20)
    model = nn.Sequential(frozen, trained, nn.Dropout(0.5), nn.Linear(20, 2))
    frozen.eval()
    if whole:
        model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = CurriculumConfig(target_headroom_gb=0.0001, enable_amp=False)
    memory = BudgetedCpuMemory(GIB)
    with ACMDSTrainer(model, data(), optimizer, settings, memory=memory, val_dataset=data(30)) as trainer:
        for _ in range(2):
            trainer.train_epoch()
            trainer.evaluate()
    assert [module.training for module in model.modules()] == [True, whole, True, True, True]
    assert torch.equal(frozen.get_buffer("running_mean"), torch.zeros(20)) != whole
    assert not torch.equal(trained.get_buffer("running_mean"), torch.zeros(20))


def test_a_model_that_does_not_fit_ends_with_advice():
    memory = BudgetedCpuMemory(120_000)
    trainer = make(memory, target_headroom_gb=0.00001)
    memory.neighbour_bytes = 80_000
    with pytest.raises(OutOfMemoryForGoodError, match="even one sample does not fit"):
        trainer.train_epoch()


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    trainer = make()
    trainer.train_step.loss.own = lambda logits, targets: (
        nn.functional.cross_entropy(logits, targets, reduction="none") * math.inf
    )
    with pytest.raises(DivergedError, match="step 0: lower --lr"):
        trainer.train_epoch()


@pytest.mark.parametrize(
    ("loss_fn", "given"),
    [
        (nn.CrossEntropyLoss(), r"\(\)"),
        (lambda logits, _: logits.square(), r"\(4, 2\)"),
        (lambda logits, _: (logits.sum(1), logits), "a tuple"),
    ],
)
def test_a_loss_function_that_gives_no_loss_of_each_sample_is_refused(loss_fn, given):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = CurriculumConfig(target_headroom_gb=0.0001, enable_amp=False)
    trainer = ACMDSTrainer(model, data(), optimizer, settings, "cpu", memory=BudgetedCpuMemory(GIB), loss_fn=loss_fn)
    with pytest.raises(DataError, match=rf'each sample, of shape \(4,\), but gave {given}: use reduction="none"'):
        trainer.train_epoch()


def test_what_a_failed_epoch_left_pending_is_not_of_the_run_that_goes_on_from_a_checkpoint():
    failed, fresh = make(curriculum_alpha=0.5), make(curriculum_alpha=0.5)
    state = copy.deepcopy(failed.state_dict())

    def fail() -> None:
        if failed.step == 2:
            raise OutOfMemoryForGoodError("out of memory", [])

    failed.after_step = fail
    failed.schedule.base_lrs = [1e3]
    with pytest.raises(OutOfMemoryForGoodError):
        failed.train_epoch()
    failed.after_step = lambda: None
    for trainer in (failed, fresh):
        trainer.load_state_dict(copy.deepcopy(state))
    assert failed.train_epoch()["epoch_loss"] == fresh.train_epoch()["epoch_loss"]
    assert torch.equal(failed.dataset.difficulty_scores, fresh.dataset.difficulty_scores)


def test_one_state_can_be_gone_back_to_twice():
    trainer = make()
    trainer.train_epoch()
    state = copy.deepcopy(trainer.state_dict())
    ends = []
    for _ in range(2):
        trainer.load_state_dict(state)
        trainer.train_epoch()
        ends.append(weights(trainer).clone())
    assert torch.equal(*ends)


def test_the_monitor_keeps_the_newest_readings_and_stops():
    trainer = make()
    before = threading.active_count()
    trainer.controller.start_monitoring(interval_ms=1)
    trainer.controller.start_monitoring(interval_ms=1)
    assert threading.active_count() == before + 1
    reading = trainer.controller.metrics_queue.get(timeout=5)
    assert reading.budget_bytes == GIB
    trainer.shutdown()
    trainer.shutdown()
    assert threading.active_count() == before


def test_a_full_queue_drops_its_oldest_reading():
    controller = make().controller
    controller.metrics_queue = type(controller.metrics_queue)(maxsize=3)
    controller._stop = _StopAfter(10)  # type: ignore[assignment]  # stops without a clock
    controller._watch(0.0)
    assert controller.metrics_queue.qsize() == 3


class _StopAfter:
    def __init__(self, count: int) -> None:
        self.left = count

    def wait(self, _: float) -> bool:
        self.left -= 1
        return self.left < 0

    def set(self) -> None: ...


@pytest.mark.parametrize(
    ("free_of_24", "level", "capacity"),
    [(0.5, "CRITICAL", 0.0), (2.0, "HIGH", 0.2), (3.5, "MODERATE", 0.5), (6.5, "LOW", 1.0), (23.0, "LOW", 1.0)],
)
@pytest.mark.parametrize("card_gb", [6, 24, 140])
def test_pressure_and_capacity_mean_the_same_on_every_card(free_of_24, level, capacity, card_gb):
    memory = BudgetedCpuMemory(card_gb * GIB)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=1), memory=memory)
    memory._live_bytes = int(card_gb * GIB * (1 - free_of_24 / 24))
    assert controller.get_pressure_level() is MemoryPressureLevel[level]
    assert controller.get_difficulty_capacity() == pytest.approx(capacity, abs=1e-6)


def test_more_free_memory_never_gives_a_smaller_adaptive_batch():
    memory = BudgetedCpuMemory(24 * GIB)
    controller = MemoryPressureController("cpu", CurriculumConfig(), memory=memory)
    sizes = []
    for used in range(24, -1, -1):
        memory._live_bytes = used * GIB
        sizes.append(controller.adaptive_batch_size(64, 0.8))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (4, 64)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        controller.adaptive_batch_size(64, 1.5)


def test_a_headroom_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="target_headroom_gb 3 leaves nothing of memory_limit_gb 2"):
        CurriculumConfig(memory_limit_gb=2)
    with pytest.raises(ConfigError, match="target_headroom_gb 3 leaves nothing of 2 GB"):
        MemoryPressureController(config=CurriculumConfig(), memory=BudgetedCpuMemory(2 * GIB))


def test_checkpointed_activations_give_the_same_gradients_and_statistics():
    from acmds_optimizer.engine.prepare import checkpoint_activations

    def run(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        blocks = [
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2))
            for _ in range(3)
        ]
        model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(48, 2))
        if recompute:
            assert checkpoint_activations(model)
        torch.manual_seed(1)
        model(torch.randn(5, 3, 4, 4)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers())

    assert all(torch.allclose(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_recomputing_activations_lowers_the_peak():
    def peak(recompute: bool) -> int:
        blocks = [nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(8)]
        model = nn.Sequential(*blocks, nn.Linear(64, 2))
        dataset = data(count=1024, features=64)
        memory = BudgetedCpuMemory(GIB)
        config = CurriculumConfig(
            target_headroom_gb=0.1, min_batch_size=1024, max_batch_size=1024, gradient_checkpointing=recompute,
            enable_amp=False,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), fused=True)
        with ACMDSTrainer(model, dataset, optimizer, config, "cpu", memory=memory) as trainer:
            trainer.train_epoch()
            return trainer.recorder.peak_reserved_bytes

    assert peak(True) < 0.6 * peak(False)


def test_a_model_without_blocks_trains_without_checkpointing_and_says_so(caplog):
    from acmds_optimizer.engine.prepare import checkpoint_activations

    assert not checkpoint_activations(nn.Linear(2, 2))
    assert "no sequence of blocks" in caplog.text


@pytest.mark.parametrize("batch", [1, 33])  # 100 samples: one at a time, and 33 with one left over
def test_a_lone_sample_that_batchnorm_cannot_normalise_takes_the_running_statistics(batch, caplog):
    prepare._warn_of_single_samples.cache_clear()
    torch.manual_seed(2)
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(20, 8), norm, nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = CurriculumConfig(min_batch_size=1, max_batch_size=batch, target_headroom_gb=0.0001, enable_amp=False)
    with ACMDSTrainer(model, data(), optimizer, settings, "cpu", memory=BudgetedCpuMemory(GIB)) as trainer:
        losses = [trainer.train_epoch()["epoch_loss"] for _ in range(3)]
    assert losses[-1] < losses[0]
    assert norm.training
    assert norm.running_mean is not None
    assert bool(norm.running_mean.any()) == (batch > 1)
    assert caplog.text.count("BatchNorm cannot normalise it by itself") == 1


# --- files


DIGITS: dict[str, Any] = {
    "model": "small_cnn", "dataset": "digits", "device": "cpu", "memory_limit_gb": 0.05, "target_headroom_gb": 0.01,
    "max_batch_size": 64, "knee_gain_fraction": 0.0,
}  # fmt: skip


def test_a_run_writes_its_records(tmp_path):
    config = TrainConfig(**DIGITS, epochs=2)
    outcome = run_training(config, output_dir=tmp_path / "run")
    with (tmp_path / "run" / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(STEP_COLUMNS)
    assert len(rows) == outcome.steps == 2 * math.ceil(1618 / 64)
    assert int(rows[-1]["samples_seen"]) == outcome.samples == 2 * 1618
    assert (tmp_path / "run" / "events.csv").read_text().strip() == ",".join(EVENT_COLUMNS)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["val_accuracy"] == outcome.val_accuracy
    assert outcome.val_accuracy is not None
    assert outcome.val_accuracy > 0.9
    assert "torch" in json.loads((tmp_path / "run" / "environment.json").read_text())


@pytest.fixture(scope="module")
def resumed_run_with_logs(tmp_path_factory):
    """A run of 2 epochs (26 steps each) for TensorBoard and W&B, whose second was cut off and done again."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    folder = tmp_path_factory.mktemp("logs") / "run"
    config = TrainConfig(**DIGITS, epochs=2, tensorboard=True, wandb=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        run_training(dataclasses.replace(config, epochs=1), output_dir=folder)
        whole = (folder / "checkpoint.pt").read_bytes()
        run_training(dataclasses.replace(config, max_steps=40), output_dir=folder, resume=folder)
        (folder / "checkpoint.pt").write_bytes(whole)  # as if the run had been killed before it saved
        run_training(config, output_dir=folder, resume=folder)
    return folder


def wandb_records(path: Path) -> list[Any]:
    """The records of a W&B file: blocks of 32 KB hold pieces, each after its checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # too little for a header: filled up
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(whole))  # type: ignore[attr-defined]
            whole = b""
    return records


def wandb_history(folder: Path) -> dict[str, dict[int, Any]]:
    """What was logged offline, by name and step."""
    history: dict[str, dict[int, Any]] = {}
    first, _, last = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == last.name  # one run to W&B; the killed part in between is not compared
    for record in [*wandb_records(first), *wandb_records(last)]:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                history.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    return history


def test_curves_go_to_tensorboard_and_to_wandb_under_the_same_names_and_steps(resumed_run_with_logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(resumed_run_with_logs / "tensorboard")).Reload()
    history = wandb_history(resumed_run_with_logs)
    scalars = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    assert [event.step for event in board.Scalars("loss")] == list(range(52))  # none twice, though some ran twice
    assert list(scalars["val_accuracy"]) == [25, 51]
    assert {name.split("/")[0] for name in history if not name.startswith("_")} == {*scalars, "difficulty"}
    for name, points in scalars.items():
        assert list(history[name]) == list(points)
        assert [history[name][step] for step in points] == pytest.approx(list(points.values()), rel=1e-6, nan_ok=True)


def test_the_difficulties_are_drawn_as_a_histogram_after_each_epoch(resumed_run_with_logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(resumed_run_with_logs / "tensorboard"), {"histograms": 0}).Reload()
    history = wandb_history(resumed_run_with_logs)
    with (resumed_run_with_logs / "epochs.csv").open() as file:
        medians = {int(row["step"]): float(row["difficulty_p50"]) for row in csv.DictReader(file)}
    assert list(medians) == [event.step for event in board.Histograms("difficulty")] == [25, 51]
    for event in board.Histograms("difficulty"):
        kind, drawn, edges = (history[f"difficulty/{part}"][event.step] for part in ("_type", "values", "bins"))
        assert (kind, len(drawn), len(edges)) == ("histogram", 50, 51)
        assert sum(drawn) == event.histogram_value.num == 1618
        counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
        upper = [round(edge, 6) for edge in edges[1:]]
        assert {edge: count for edge, count in zip(upper, drawn, strict=True) if count} == {
            round(edge, 6): count for edge, count in counts.items() if count
        }
        below = sum(count for edge, count in zip(upper, drawn, strict=True) if edge <= medians[event.step])
        assert 0 < below <= 1618 / 2


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match="No API key configured: log in with `wandb login`, keep the run here"):
        run_training(TrainConfig(**DIGITS, max_steps=1, wandb=True), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_logger_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("acmds_optimizer.engine.scalars.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'acmds\[wandb\]'"):
        run_training(TrainConfig(**DIGITS, max_steps=1, wandb=True), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_written_over(tmp_path):
    run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path)
    with pytest.raises(ConfigError, match="holds a run already; use --resume"):
        run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path)


HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_another_process_writes_a_run_into_is_refused_until_that_has_ended(tmp_path, resumed):
    settings = TrainConfig(**DIGITS, max_steps=4)
    if resumed:
        run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is writing a run into"):
            run_training(settings, output_dir=tmp_path, resume=tmp_path if resumed else None)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == before
        other.communicate("\n")
    assert run_training(settings, output_dir=tmp_path, resume=tmp_path if resumed else None).steps == 4


def test_a_run_that_had_ended_says_so_when_it_is_resumed(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="acmds_optimizer.engine.run")
    run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path)
    assert not any("ended already" in record.getMessage() for record in caplog.records)
    run_training(TrainConfig(**DIGITS, max_steps=2), output_dir=tmp_path, resume=tmp_path)
    assert any("the run had ended already, after 2 steps" in record.getMessage() for record in caplog.records)
    caplog.clear()
    run_training(TrainConfig(**DIGITS, max_steps=3), output_dir=tmp_path, resume=tmp_path)
    assert not any("ended already" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("val_fraction", "warned"), [(0.0, True), (0.1, False)])
def test_patience_without_validation_is_warned_of(val_fraction, warned, caplog):
    caplog.set_level(logging.WARNING, logger="acmds_optimizer.engine.run")
    run_training(TrainConfig(**DIGITS, max_steps=1, patience_epochs=2, val_fraction=val_fraction))
    assert any("patience_epochs does nothing" in record.getMessage() for record in caplog.records) is warned


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError):
        run_training(
            TrainConfig(**DIGITS | {"target_headroom_gb": 1e6, "memory_limit_gb": None}), output_dir=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole checkpoint"),
        (b"hello", "not a whole checkpoint"),
        (b"PK\x03\x04 not really", "not a whole checkpoint"),
        (None, "no such checkpoint"),
        ("foreign", "file of another program"),
        ("truncated", "not a whole checkpoint"),
        ("version", "another version"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "file.pt"
    trainer = make()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "version":
        torch.save({"format": "acmds-checkpoint", "version": 99}, path)
    elif content == "truncated":
        trainer.save_checkpoint(path)
        path.write_bytes(path.read_bytes()[:-2000])
    before = weights(trainer).clone()
    with pytest.raises(CheckpointError, match=f"file.pt: .*{message}|{message}"):
        trainer.load_checkpoint(path)
    assert torch.equal(weights(trainer), before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make().save_checkpoint(tmp_path / "a.pt")
    other = nn.Linear(20, 2).double()
    trainer = ACMDSTrainer(
        other, data(), torch.optim.AdamW(other.parameters()), CurriculumConfig(target_headroom_gb=0.01), "cpu",
        memory=BudgetedCpuMemory(GIB),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="does not fit this model"):
        trainer.load_checkpoint(tmp_path / "a.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = make()
    path = tmp_path / "a.pt"
    trainer.save_checkpoint(path)
    old = path.read_bytes()

    def broken(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(ACMDSError, match="No space"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_cached_blocks_that_stand_in_the_headroom_are_released_and_ever_less_often():
    memory = _Caching(10 * GIB)
    controller = MemoryPressureController(
        "cpu", CurriculumConfig(target_headroom_gb=3, gc_threshold_gb=1), memory=memory
    )
    memory.reserved = 7 * GIB
    controller.observe(4)
    assert memory.released == []
    released_at: list[int] = []
    for step in range(200):
        memory.reserved = 8 * GIB  # 2 GB free: more than the threshold, less than the headroom
        controller.observe(4)
        if len(memory.released) > len(released_at):
            released_at.append(step)
    assert memory.released[0] == "cache"
    gaps = [b - a for a, b in itertools.pairwise(released_at)]
    assert gaps == sorted(gaps)
    assert len(released_at) < 12
    memory.reserved = int(9.5 * GIB)
    controller.step += 1000
    assert controller.emergency_gc()
    assert memory.released[-1] == "garbage and cache"


def test_a_controller_that_goes_back_to_an_earlier_state_releases_at_once_where_it_must():
    memory = _Caching(10 * GIB)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=3), memory=memory)
    controller.observe(4)
    state = controller.state_dict()
    for _ in range(300):
        memory.reserved = 8 * GIB
        controller.observe(4)
    controller.load_state_dict(state)
    memory.released.clear()
    memory.reserved = 8 * GIB
    controller.observe(4)
    assert memory.released == ["cache"]


class _Card(BudgetedCpuMemory):
    """Keeps what was allocated reserved until it is released, and the peaks of both until they are reset."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.present = MemoryReading(limit_bytes, 0, 0, 0, 0, 0, 0)

    def read(self) -> MemoryReading:
        return dataclasses.replace(self.present, budget_bytes=self.total_bytes - self.neighbour_bytes)

    def reset_peak(self) -> None:
        now = self.present
        self.present = dataclasses.replace(
            now, peak_allocated_bytes=now.allocated_bytes, peak_reserved_bytes=now.reserved_bytes
        )

    def release_cache(self, *, collect: bool = True) -> None:
        self.present = dataclasses.replace(self.present, reserved_bytes=self.present.allocated_bytes)

    def step(self, base: int, peak: int) -> None:
        reserved = max(self.present.reserved_bytes, peak)
        self.present = MemoryReading(
            self.total_bytes, base, reserved, peak, max(self.present.peak_reserved_bytes, reserved), 0, 0
        )


def test_what_was_reserved_before_a_release_does_not_count_in_the_next_step():
    memory = _Card(24 * GIB)
    config = CurriculumConfig(max_batch_size=512, batch_policy="free", knee_gain_fraction=0.0)
    controller = MemoryPressureController("cpu", config, memory=memory)
    for step in range(60):
        memory.neighbour_bytes = 8 * GIB * (step >= 30)
        batch = controller.decide().batch
        memory.step(GIB, round((1.4 + 0.09 * batch) * GIB))
        controller.observe(batch)
    assert controller.releases == 1
    assert controller.reading.peak_reserved_bytes == controller.reading.peak_allocated_bytes
    assert batch == 128, "of 13 GB, as a run would have that began beside the neighbour"


class _Caching(BudgetedCpuMemory):
    """Reserves more than is allocated, as CUDA's allocator does."""

    reserved = 0

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.released: list[str] = []

    def read(self) -> MemoryReading:
        return dataclasses.replace(super().read(), reserved_bytes=self.reserved, peak_reserved_bytes=self.reserved)

    def release_cache(self, *, collect: bool = True) -> None:
        self.released.append("garbage and cache" if collect else "cache")
        self.reserved = 0


def rates(folder: Path, **settings: Any) -> dict[int, float]:
    """Learning rate of each step of a run on digits, by the samples seen before it."""
    config = TrainConfig(**DIGITS | {"epochs": 1, "batch_policy": "free", "lr": 0.008} | settings)
    run_training(config, output_dir=folder)
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {int(row["samples_seen"]) - int(row["effective_batch"]): float(row["lr"]) for row in rows}


def test_the_learning_rate_follows_the_samples_seen_and_not_the_steps(tmp_path):
    small = rates(tmp_path / "small", min_batch_size=16, max_batch_size=16)
    large = rates(tmp_path / "large", min_batch_size=64, max_batch_size=64)
    assert len(small) > 3 * len(large)
    assert set(large) <= set(small)
    assert all(small[seen] == pytest.approx(rate, rel=1e-5) for seen, rate in large.items())
    assert max(large.values()) == pytest.approx(0.008, rel=0.02)
    assert min(list(large.values())[-2:]) < 0.0008


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_a_free_batch_changes_the_learning_rate_by_the_stated_rule(rule, power):
    trainer = make(
        BudgetedCpuMemory(130_000), batch_policy="free", min_batch_size=1, max_batch_size=64, lr_scaling=rule,
        target_headroom_gb=0.00001,
    )  # fmt: skip
    trainer.train_epoch()
    expected = 0.01 * (trainer.controller.batch_size / 64) ** power
    trainer.schedule.set(0.0, trainer.controller.batch_size)
    assert trainer.controller.batch_size < 64
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


class Searching(nn.Module):
    """Takes room once for each number of samples, as cuDNN does where it searches for kernels."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.seen: set[int] = set()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) not in self.seen:
            self.seen.add(len(inputs))
            torch.empty(len(inputs), 5 * self.features, dtype=torch.float64)
        return inputs


def test_what_the_first_use_of_a_size_takes_beyond_is_not_held_against_it():
    sizes = []
    for search in (nn.Identity(), Searching(200)):
        torch.manual_seed(2)
        model = nn.Sequential(search, Double(), nn.Linear(200, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        config = CurriculumConfig(target_headroom_gb=0.003, max_batch_size=512, enable_amp=False, knee_gain_fraction=0)
        trainer = ACMDSTrainer(model, data(1024, 200), optimizer, config, "cpu", memory=BudgetedCpuMemory(7_000_000))
        with trainer:
            trainer.train_epoch()
        sizes.append(trainer.recorder.figures["batches"] / trainer.recorder.figures["steps"])
    assert sizes == [512, 512]


class _Loose(BudgetedCpuMemory):
    """Reserves a fifth more than was allocated, as after a search for kernels."""

    def read(self) -> MemoryReading:
        reading = super().read()
        return dataclasses.replace(reading, peak_reserved_bytes=round(1.2 * reading.peak_allocated_bytes))


@pytest.mark.parametrize(
    ("card", "kept"),
    [(BudgetedCpuMemory(200_000), True), (BudgetedCpuMemory(130_000), False), (_Loose(400_000), False)],
    ids=["the last size is right", "another size is right", "much is left over"],
)
def test_blocks_that_the_first_step_will_need_are_kept_after_the_rehearsal(card, kept, monkeypatch):
    released = []
    trainer = make(card, min_batch_size=1, max_batch_size=64, target_headroom_gb=3e-5, batch_policy="free")
    steps = trainer.recorder.figures
    monkeypatch.setattr(trainer.controller, "release_cache", lambda **_: released.append(steps["steps"]))
    with trainer:
        trainer.train_epoch()
    assert released == ([] if kept else [0])


def test_what_comes_to_lie_between_steps_is_in_the_next_prediction_once_it_was_read():
    trainer = make()
    with trainer:
        trainer.train_epoch()
        controller, work = trainer.controller, float(trainer.controller.batch_size)
        controller.read_base()
        before = controller.state.peaks.predict(work)
        ballast = torch.zeros(1_000_000)
        controller.memory.track([ballast])
        controller.read_base()
        assert controller.state.peaks.predict(work) == before + ballast.nbytes


class Unwatched(BudgetedCpuMemory):
    """Without the mode that counts what is allocated, inside which PyTorch compiles nothing; CUDA needs none."""

    def watch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_the_model_is_compiled_for_sizes_that_come_again_only(monkeypatch):
    sizes = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        sizes.append(next(each for each in inputs if not isinstance(each, nn.Parameter)).shape[0])
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with (
        make(Unwatched(GIB), compile_model=True, min_batch_size=4) as compiled,
        make(Unwatched(GIB), min_batch_size=4) as plain,
    ):
        for trainer in (compiled, plain):
            for _ in range(2):  # of 100 samples: the last four of an epoch are a batch of their own
                trainer.train_epoch()
        assert compiled.step == plain.step == 8
        assert torch.equal(weights(compiled), weights(plain))
    assert sizes == [32]


def test_a_model_that_cannot_be_compiled_is_trained_as_it_is(monkeypatch, caplog):
    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with make(Unwatched(GIB), compile_model=True) as compiled, make(Unwatched(GIB)) as plain:
        assert compiled.train_epoch()["samples"] == plain.train_epoch()["samples"] == 100
        assert torch.equal(weights(compiled), weights(plain))
    assert caplog.text.count("training goes on without") == 1
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize(
    ("model", "optimizer", "said"),
    [
        (nn.Linear(20, 2), lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS evaluates the loss again"),
        (nn.LazyLinear(2), lambda model: torch.optim.SGD(model.parameters()), "run one batch through it"),
        (nn.Linear(20, 2), lambda model: torch.optim.SGD(nn.Linear(20, 2).parameters()), "no parameter of the model"),
        (nn.Linear(20, 2).requires_grad_(False), lambda model: torch.optim.SGD(model.parameters()), "freeze fewer"),
    ],
)
def test_an_optimizer_that_cannot_train_the_model_is_refused(model, optimizer, said):
    with pytest.raises(DataError, match=said):
        ACMDSTrainer(model, data(), optimizer(model), CurriculumConfig(), "cpu")
