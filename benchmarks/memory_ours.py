"""Ours in the memory benchmark: through the trainer where images have one size, else the controller in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from acmds_optimizer import ACMDSTrainer, CurriculumConfig, Guard, MemoryPressureController
from acmds_optimizer.engine.batches import DataSource, EpochPart, EpochStream
from acmds_optimizer.engine.telemetry import Recorder
from acmds_optimizer.errors import OutOfMemoryForGoodError
from acmds_optimizer.memory.device import MemoryReading
from benchmarks.memory_plant import Meter, Plant
from benchmarks.memory_systems import Known

_EPOCH_SAMPLES = {"cuda": 2**19, "cpu": 2**13}
"""Order, weights and scores of an epoch lie on the card too: those of a long one would fill the CPU's."""


@dataclass(frozen=True)
class Variant:
    """One row of ours."""

    policy: Literal["free", "hold"] = "free"
    knee: bool = True
    """Whether growth stops where it buys little speed; else memory alone decides."""
    auto: bool = False
    """Whether precision, layout and CUDA graphs are chosen by probes; else they are the table's, without graphs."""


_EQUAL: dict[str, Any] = {"channels_last": True, "enable_cuda_graphs": False}


def config_of(plant: Plant, variant: Variant, *, knee: bool) -> CurriculumConfig:
    setting = plant.setting
    more: dict[str, Any] = {} if knee else {"knee_gain_fraction": 0.0}
    if not variant.auto:
        more |= _EQUAL | {"amp_dtype": "fp16" if setting.amp == "fp16" else "bf16"}
    return CurriculumConfig(
        target_headroom_gb=setting.headroom_gb,
        memory_limit_gb=setting.cap_gb,
        max_batch_size=setting.max_batch,
        batch_policy=variant.policy,
        enable_amp=plant.amp_dtype is not None,
        seed=setting.seed,
        **more,
    )


class Named(Dataset[Any]):
    """What the trainer asks of data that are on the device already: how many, and the kind of one item."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._count, self._item = count, (torch.zeros(shape, dtype=torch.uint8), 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._item


class _PoolSource(DataSource):
    """The plant's images, which are on the device already, again and again."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant

    def __len__(self) -> int:
        return _EPOCH_SAMPLES[self.plant.device.type]

    def _open(self, part: EpochPart) -> EpochStream:
        return _PoolStream(self.plant, part)


class _PoolStream(EpochStream):
    def __init__(self, plant: Plant, part: EpochPart) -> None:
        super().__init__(part.order, part.weights, part.start, plant.device)
        self._plant = plant

    def _build(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        self._plant.position = start
        return self._plant.take(stop - start, self._plant.setting.image_size)


class _MeteredRecorder(Recorder):
    """Tells the meter of each step, in place of writing it down."""

    def __init__(self, plant: Plant, meter: Meter) -> None:
        super().__init__(None)
        self._plant = plant
        self._meter = meter

    def step(
        self, row: dict[str, Any], losses: Tensor, *, reserved_bytes: int, budget_bytes: int, headroom_bytes: int
    ) -> None:
        super().step(
            row, losses, reserved_bytes=reserved_bytes, budget_bytes=budget_bytes, headroom_bytes=headroom_bytes
        )
        reading = MemoryReading(budget_bytes, 0, reserved_bytes, 0, reserved_bytes, 0, 0)
        self._meter.step(row["effective_batch"], row["micro_batch"], reading)


def with_trainer(plant: Plant, meter: Meter, variant: Variant) -> None:
    """ACMDSTrainer as a user has it, but for its data, which are on the device already."""
    optimizer = plant.build_optimizer()
    names = Named(_EPOCH_SAMPLES[plant.device.type], tuple(plant.images.shape[1:]))
    trainer = ACMDSTrainer(
        plant.model, names, optimizer, config_of(plant, variant, knee=variant.knee),
        memory=plant.memory, recorder=_MeteredRecorder(plant, meter),
    )  # fmt: skip
    with trainer:
        trainer.source.close()
        trainer.source = _PoolSource(plant)
        trainer.should_stop = lambda: not meter.going()
        meter.start()
        while meter.going():
            trainer.train_epoch()


def with_controller(plant: Plant, meter: Meter, variant: Variant) -> None:
    """Guard and controller in a plain loop, which tells them how large the coming images are.

    Memory alone decides: the model of time knows sizes of micro-batches, not of images.
    """
    optimizer = plant.build_optimizer()
    controller = MemoryPressureController(config=config_of(plant, variant, knee=False), memory=plant.memory)
    guard = Guard(plant.model, optimizer, controller, plant.scaler)
    meter.start()
    while meter.going():
        side = meter.side()
        work = meter.scenario.work(side)
        decision = controller.decide(sample_work=work)
        images, targets = plant.take(decision.batch, side)

        def attempt(micro: int, images: Tensor = images, targets: Tensor = targets) -> None:
            for x, y in zip(images.split(micro), targets.split(micro), strict=True):
                plant.scaler.scale(plant.loss(x, y) * (len(x) / len(images))).backward()
            guard.optimizer_step()

        plant.memory.track([images, targets])
        result = guard.run(attempt, decision.batch, sample_work=work)
        reading = controller.observe(result.micro_batch, sample_work=work)
        plant.position += len(images)
        meter.step(len(images), result.micro_batch, reading)


def system(variant: Variant) -> Callable[[Plant, Meter, Known], None]:
    """The variant as a system of the table."""

    def train(plant: Plant, meter: Meter, known: Known) -> None:
        one_size = len(meter.scenario.sides) == 1
        try:
            (with_trainer if one_size else with_controller)(plant, meter, variant)
        except OutOfMemoryForGoodError as error:
            meter.escaped = str(error)

    return train
