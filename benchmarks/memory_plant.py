"""What runs in each child of the memory benchmark: the model on its card, one plain step, and the meter."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.engine.prepare import set_up_cuda
from acmds_optimizer.memory.device import BudgetedCpuMemory, MemoryReading, open_memory
from acmds_optimizer.memory.undo import create_optimizer_state
from acmds_optimizer.zoo.models import build_model
from benchmarks.memory_scenarios import Scenario, Setting

_WARM_STEPS = 20
_TIMELINE_POINTS = 4000


class Plant:
    """Model, optimizer and images on one card, the same for every system.

    Attributes:
        position: number of the next image; the pool of images is gone through again and again.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.memory = open_memory(setting.device, setting.cap_gb)
        self.device = self.memory.device
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(setting.seed)
        if self.cuda:
            set_up_cuda(CurriculumConfig())  # as our trainer does
        self.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[setting.amp]
        model = build_model(setting.model, setting.classes, image_size=setting.image_size).to(self.device)
        self.model: nn.Module = model.to(memory_format=torch.channels_last) if self.cuda else model
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        side, count = setting.image_size, setting.search_limit
        generator = torch.Generator(self.device).manual_seed(setting.seed)
        self.images = torch.randint(
            0, 256, (count, 3, side, side), dtype=torch.uint8, device=self.device, generator=generator
        )
        self.targets = torch.randint(0, setting.classes, (count,), device=self.device, generator=generator)
        self.position = 0
        self.memory.track([list(self.model.parameters()), list(self.model.buffers()), self.images, self.targets])

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Fused AdamW with its state made ahead."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        create_optimizer_state(optimizer)
        self.memory.track([list(state.values()) for state in optimizer.state.values()])
        return optimizer

    def take(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        """The next `count` images (count, 3, side, side) float32 in [0, 1] and their targets (count,)."""
        chosen = torch.arange(self.position, self.position + count, device=self.device) % len(self.images)
        images = self.images.index_select(0, chosen)[:, :, :side, :side]
        return images.float() / 255, self.targets.index_select(0, chosen)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in the table's precision and memory layout."""
        if self.cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype else nullcontext():
            return nn.functional.cross_entropy(self.model(images).float(), targets)

    def step(self, optimizer: torch.optim.Optimizer, count: int, side: int) -> None:
        """One optimizer step as everyone writes it: nothing is caught and nothing undone."""
        with self.memory.watch():
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(*self.take(count, side))
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)
            self.scaler.update()
        self.position += count

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Neighbour:
    """The other process of the neighbour scenario, seen from the training: real on CUDA, a number on the CPU's card."""

    def __init__(self, plant: Plant, connection: Any = None, held: Any = None) -> None:
        self._plant = plant
        self._connection = connection
        self._held = held

    def settle(self) -> None:
        """Make a larger card look like one of the cap's size, once the kernels of a small step are loaded."""
        if self._connection is not None:
            setting = self._plant.setting
            self._plant.loss(*self._plant.take(8, setting.image_size)).backward()
            self._plant.model.zero_grad(set_to_none=True)
            self._plant.memory.release_cache()
            reserved = self._plant.memory.read().reserved_bytes
            self._connection.send(("leave", setting.left_bytes - reserved))
            self._connection.recv()

    def want(self, size: int) -> None:
        """Have it hold `size` bytes, as far as they are to be had; 0: give all back."""
        if isinstance(self._plant.memory, BudgetedCpuMemory):
            self._plant.memory.neighbour_bytes = size
        elif self._connection is not None:
            self._connection.send(("take", size) if size else ("free", 0))

    @property
    def held_bytes(self) -> float:
        if isinstance(self._plant.memory, BudgetedCpuMemory):
            return self._plant.memory.neighbour_bytes
        return self._held.value if self._held is not None else 0.0


@dataclass(frozen=True)
class Point:
    """One step: when it ended, since the start with search; GB."""

    seconds: float
    images: int
    batch: int
    reserved_gb: float
    budget_gb: float
    target_gb: float
    neighbour_gb: float
    headroom_ok: bool


class Meter:
    """Measures one run, the same way for every system, and moves its scenario on.

    A system asks `going()` and `side()` before a step and tells `step()` after it.
    """

    def __init__(self, plant: Plant, scenario: Scenario, neighbour: Neighbour) -> None:
        self.plant = plant
        self.scenario = scenario
        self.neighbour = neighbour
        self.points: list[Point] = []
        self.images = 0
        self.escaped = ""
        self._half: tuple[float, int] | None = None
        self._end: float | None = None
        self._first_s: float | None = None
        self._worst_bytes = 0
        self._neighbour_active = False
        self._neighbour_wanted = self._neighbour_got = 0.0
        self._errors_at_20: int | None = None
        self._start_reading = plant.memory.read()
        self._errors = self._start_reading.out_of_memory_errors
        self._began = time.perf_counter()

    def start(self) -> None:
        """The clock starts: all is ready but the batch size."""
        self.plant.wait()
        self.plant.memory.reset_peak()
        self._start_reading = self.plant.memory.read()
        self._errors = self._start_reading.out_of_memory_errors
        self._began = time.perf_counter()

    def searched_before(self, seconds: float) -> None:
        """Count the seconds of a search that was made in an earlier scenario under the same conditions."""
        self._began -= seconds

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]; the time until the end of the first step does not count."""
        if not self.points:
            return 0.0
        setting = self.scenario.setting
        share = (time.perf_counter() - self._began - self.points[0].seconds) / setting.seconds
        limit = setting.first_images if self.scenario.name == "cold" else setting.images
        return min(1.0, max(share, self.images / limit if limit else 0.0))

    def going(self) -> bool:
        """Whether there is more to do; the clock stops at the first no, once the last step is done."""
        if self._end is None and self.progress >= 1.0:
            self.plant.wait()
            self._end = time.perf_counter() - self._began
        return self._end is None

    def side(self) -> int:
        return self.scenario.side(self.progress, len(self.points))

    def step(self, images: int, batch: int, reading: MemoryReading | None = None) -> None:
        """A step of `images` samples in micro-batches of `batch` is done; reading: as taken after it, if it was."""
        now = self.plant.memory.read()
        if reading is None:
            reading = now
            self.plant.memory.reset_peak()
        setting = self.scenario.setting
        failed = now.out_of_memory_errors > self._errors and bool(self.points)  # those of the search are not steps
        self._errors = now.out_of_memory_errors
        headroom = 0 if failed else reading.budget_bytes - reading.peak_reserved_bytes
        seconds = time.perf_counter() - self._began
        self.images += images
        self.points.append(
            Point(
                seconds,
                images,
                batch,
                reading.peak_reserved_bytes / GIB,
                reading.budget_bytes / GIB,
                max(0, reading.budget_bytes - setting.headroom_bytes) / GIB,
                self.neighbour.held_bytes / GIB,
                headroom >= setting.headroom_bytes,
            )
        )
        self._worst_bytes = max(self._worst_bytes, setting.headroom_bytes - headroom)
        self._milestones(seconds)

    def _milestones(self, seconds: float) -> None:
        setting = self.scenario.setting
        if self._first_s is None and self.images >= setting.first_images:
            self.plant.wait()
            # the time at which the last of them was done lies within this step
            over = (self.images - setting.first_images) / self.points[-1].images
            before = self.points[-2].seconds if len(self.points) > 1 else 0.0
            end = time.perf_counter() - self._began
            self._first_s = end - over * (seconds - before)
        progress = self.progress
        if self._half is None and progress >= 0.5:
            self.plant.wait()
            self._half = (time.perf_counter() - self._began, self.images)
        if len(self.points) == _WARM_STEPS:
            self._errors_at_20 = self._errors
        if self._neighbour_active:
            self._neighbour_wanted += setting.neighbour_bytes
            self._neighbour_got += self.neighbour.held_bytes
        active = self.scenario.has_neighbour(progress)
        if active != self._neighbour_active:
            self._neighbour_active = active
            self.neighbour.want(setting.neighbour_bytes if active else 0)

    def row(self) -> dict[str, Any]:
        """The figures of the run, by column."""
        end_progress = self.progress
        self.plant.wait()
        end = self._end or time.perf_counter() - self._began
        last = self.plant.memory.read()
        errors = last.out_of_memory_errors - self._start_reading.out_of_memory_errors
        escaped = int(bool(self.escaped))
        row: dict[str, Any] = {
            "oom_escaped": escaped,
            "oom_recovered": max(0, errors - escaped),
            "oom_after_20_steps": max(0, last.out_of_memory_errors - self._errors_at_20)
            if self._errors_at_20 is not None
            else None,
            "alloc_retries": last.alloc_retries - self._start_reading.alloc_retries,
            "done_fraction": end_progress,
            "steps": len(self.points),
            "images": self.images,
            "seconds": end,
        }
        if not self.points:
            return row
        first = self.points[0]
        batches = [point.batch for point in self.points]
        gaps = [b.seconds - a.seconds for a, b in itertools.pairwise(self.points)]
        usual = statistics.median(gaps) if gaps else 0.0
        trained = end - first.seconds
        row |= {
            "headroom_kept_fraction": sum(point.headroom_ok for point in self.points) / len(self.points),
            "worst_breach_gb": max(0, self._worst_bytes) / GIB,
            "images_per_second": (self.images - first.images) / trained if len(self.points) > 1 else None,
            "steady_images_per_second": (self.images - self._half[1]) / (end - self._half[0])
            if self._half and self.images > self._half[1]
            else None,
            "first_images_per_second": self.scenario.setting.first_images / self._first_s if self._first_s else None,
            "search_seconds": max(0.0, first.seconds - usual),
            "size_changes": sum(a != b for a, b in itertools.pairwise(batches)),
            "distinct_sizes": len(set(batches)),
            "batch_mean": statistics.fmean(batches),
            "batch_last": batches[-1],
        }
        if self._neighbour_wanted:
            row["neighbour_got_fraction"] = self._neighbour_got / self._neighbour_wanted
        return row

    def timeline(self) -> list[Point]:
        """The steps, thinned to a few thousand."""
        return self.points[:: max(1, len(self.points) // _TIMELINE_POINTS)]
