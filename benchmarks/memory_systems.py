"""The systems that the memory benchmark compares ours with. Each trains a plant until its meter says that it is over.

Where a system has no answer to an out-of-memory error in the middle of training, the error escapes and ends its run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from acmds_optimizer.memory.out_of_memory import is_out_of_memory
from benchmarks.memory_plant import Meter, Plant
from benchmarks.memory_scenarios import Probe, best_batch, grid, largest_batch

_PROBE_STEPS = 3
_AIMD_STEPS = 5


class MissingPackageError(Exception):
    """A package that a system needs is not installed."""


class NothingFitsError(Exception):
    """The offline search found no batch size for this budget."""


@dataclass(frozen=True)
class Known:
    """What was found before the run: offline, or by the same search in an earlier scenario."""

    probes: list[Probe] = field(default_factory=list)
    found: int = 0
    """Batch that this system's search found under the same conditions; 0: not known."""
    found_seconds: float = 0.0


def probe(plant: Plant, sides: list[int], timed_seconds: float) -> list[Probe]:
    """Try batch sizes offline at each side, ascending, until one does not fit; largest side first.

    Each is timed for `timed_seconds`; of the smaller sides three steps, and of them the smallest batches are left out.
    """
    optimizer = plant.build_optimizer()
    found = []
    limit = plant.setting.search_limit
    for side in sorted(sides, reverse=True):
        largest = side == max(sides)
        for batch in grid(limit):
            if not largest and batch < limit // 4:
                continue
            plant.memory.release_cache()
            plant.memory.reset_peak()
            rate = _try(plant, optimizer, batch, side, timed_seconds if largest else 0.0)
            if rate is None:
                break
            found.append(Probe(side, batch, plant.memory.read().peak_reserved_bytes, rate))
        optimizer.zero_grad(set_to_none=True)
    return found


def _try(plant: Plant, optimizer: torch.optim.Optimizer, batch: int, side: int, timed_seconds: float) -> float | None:
    def seconds(steps: int) -> float:
        plant.wait()
        began = time.perf_counter()
        for _ in range(steps):
            plant.step(optimizer, batch, side)
        plant.wait()
        return time.perf_counter() - began

    try:
        seconds(2)
        once = seconds(_PROBE_STEPS)
        steps = int(timed_seconds / once * _PROBE_STEPS)
        return batch * steps / seconds(steps) if steps > _PROBE_STEPS else batch * _PROBE_STEPS / once
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _train_fixed(plant: Plant, meter: Meter, batch: Callable[[], int]) -> None:
    optimizer = plant.build_optimizer()
    last = 0
    while meter.going():
        size = batch()
        if size < last:
            plant.memory.release_cache()  # what a smaller batch reserves shows only then
        last = size
        plant.step(optimizer, size, meter.side())
        meter.step(size, size)


def _found(size: int) -> int:
    if not size:
        raise NothingFitsError("no batch size tried offline fits")
    return size


def oracle(plant: Plant, meter: Meter, known: Known) -> None:
    """The fastest fixed batch that keeps the headroom at the largest image size, found offline."""
    setting = plant.setting
    side = max(meter.scenario.sides)
    size = _found(best_batch(known.probes, side, setting.cap_bytes - setting.headroom_bytes))
    meter.start()
    _train_fixed(plant, meter, lambda: size)


def oracle_phases(plant: Plant, meter: Meter, known: Known) -> None:
    """For each image size and each budget the fastest batch that keeps the headroom: knows the scenario ahead."""
    setting = plant.setting

    def size() -> int:
        budget = setting.cap_bytes
        if meter.scenario.has_neighbour(meter.progress):
            slack = setting.left_bytes - setting.cap_bytes if plant.cuda else 0
            budget += slack - setting.neighbour_bytes
        return _found(best_batch(known.probes, meter.side(), budget - setting.headroom_bytes))

    size()
    meter.start()
    _train_fixed(plant, meter, size)


def fixed_cap(plant: Plant, meter: Meter, known: Known) -> None:
    """The largest fixed batch that fits the cap with the images that come first."""
    size = _found(largest_batch(known.probes, meter.scenario.sides[0]))
    meter.start()
    _train_fixed(plant, meter, lambda: size)


def accelerate_find(plant: Plant, meter: Meter, known: Known) -> None:
    """find_executable_batch_size of accelerate around the training.

    Kinder to it than its documentation, which builds model and optimizer anew inside: here a call after an error goes
    on where the failed one stopped.
    """
    try:
        from accelerate.utils import find_executable_batch_size
    except ImportError as error:
        raise MissingPackageError(f"accelerate is not installed ({error})") from None

    def train(batch_size: int) -> None:
        while meter.going():
            plant.step(optimizer, batch_size, meter.side())
            meter.step(batch_size, batch_size)

    optimizer = plant.build_optimizer()
    meter.start()
    find_executable_batch_size(train, starting_batch_size=plant.setting.search_limit)()


def halving(plant: Plant, meter: Meter, known: Known) -> None:
    """By hand: start above, halve on an out-of-memory error, run the same images again, never grow."""
    _by_hand(plant, meter, plant.setting.search_limit, lambda size, calm: size)


def aimd(plant: Plant, meter: Meter, known: Known) -> None:
    """By hand: a sixteenth of the largest batch more after every five steps without an error, half on an error."""
    part = max(1, plant.setting.max_batch // 16)
    limit = plant.setting.search_limit
    _by_hand(plant, meter, part, lambda size, calm: min(limit, size + part) if calm % _AIMD_STEPS == 0 else size)


def _by_hand(plant: Plant, meter: Meter, size: int, grown: Callable[[int, int], int]) -> None:
    optimizer = plant.build_optimizer()
    meter.start()
    calm = 0
    while meter.going():
        failed = False
        try:
            plant.step(optimizer, size, meter.side())
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            failed = True
        if failed:  # outside the except block, whose exception keeps the failed step's tensors
            size, calm = size // 2, 0
            optimizer.zero_grad(set_to_none=True)
            plant.memory.release_cache()
            continue
        meter.step(size, size)
        calm += 1
        size = grown(size, calm)


class _StepNumbers(IterableDataset[int]):
    """The numbers of the steps; the images are taken in the step.

    Lightning asks its loader for the next batch ahead, also while the traceback of an out-of-memory error still holds
    the failed step, where images on the card no longer fit.
    """

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _lightning(plant: Plant, meter: Meter, known: Known, mode: str) -> None:
    size = known.found
    if not size:
        pl = _import_lightning()
        meter.start()
        size = _search_with_lightning(pl, plant, meter, mode)
    else:
        meter.start()
        meter.searched_before(known.found_seconds)
    _train_fixed(plant, meter, lambda: size)


def _import_lightning() -> Any:
    missing = None
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = missing or str(error)
    raise MissingPackageError(f"lightning is not installed ({missing})")


def _search_with_lightning(pl: Any, plant: Plant, meter: Meter, mode: str) -> int:
    """What Tuner.scale_batch_size finds, with its defaults, for a module with the table's model and flags."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    precision = {"bf16": "bf16-mixed", "fp16": "16-mixed", "off": "32-true"}[plant.setting.amp]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = plant.model
            self.batch_size = 2

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, targets = plant.take(self.batch_size, meter.scenario.side(0.0, int(batch)))
            images = images.contiguous(memory_format=torch.channels_last) if plant.cuda else images
            return torch.nn.functional.cross_entropy(self.model(images).float(), targets)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            message = None
            try:
                super().optimizer_step(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                if plant.cuda:
                    raise
                message = str(error)
            if message:  # Lightning knows the error of a CUDA card by its words
                raise torch.OutOfMemoryError(f"as CUDA would: {message}")

        def train_dataloader(self) -> Any:
            return DataLoader(_StepNumbers(), batch_size=None)

    module = Module()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), plant.memory.watch():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="gpu" if plant.cuda else "cpu", devices=1, precision=precision, max_steps=1,
            default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):
            tuner = importlib.import_module(f"{pl.__name__}.tuner").Tuner(trainer)
            size = tuner.scale_batch_size(module, mode=mode)
        plant.model.to(plant.device)  # Lightning leaves a model on the CPU
        plant.model.zero_grad(set_to_none=True)
    del trainer, tuner, module  # optimizer and its state
    gc.collect()
    plant.memory.release_cache()
    return int(size)


def lightning_power(plant: Plant, meter: Meter, known: Known) -> None:
    """Lightning's batch size finder, doubling from 2; then that batch in the plain loop."""
    _lightning(plant, meter, known, "power")


def lightning_binsearch(plant: Plant, meter: Meter, known: Known) -> None:
    """Lightning's batch size finder, binary search with its 5 % margin; then that batch in the plain loop."""
    _lightning(plant, meter, known, "binsearch")
