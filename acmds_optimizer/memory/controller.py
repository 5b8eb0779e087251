"""The controller that a training loop talks to: a thin shell that feeds the law with readings of a device."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import queue
import threading
from typing import Any

import torch

from acmds_optimizer.config import GIB, CurriculumConfig
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.memory import law
from acmds_optimizer.memory.device import MemoryDevice, MemoryReading, open_memory
from acmds_optimizer.memory.model import PeakModel, TimeModel

_REFERENCE_CARD_GB = 24.0
_QUEUE_LENGTH = 1000
_LONGEST_RELEASE_PAUSE = 512


class MemoryPressureLevel(enum.Enum):
    """How little memory is free. GB are for a card of 24 GB; other cards in proportion."""

    CRITICAL = "critical"
    """Less than 1 GB."""
    HIGH = "high"
    """1 to 3 GB."""
    MODERATE = "moderate"
    """3 to 6 GB."""
    LOW = "low"
    """More than 6 GB."""


class MemoryPressureController:
    """Holds a headroom of device memory by choosing the micro-batch of each step.

    Args:
        device_id: number of a CUDA device, or `"cuda:N"`, or `"cpu"` for a card on the CPU with a byte budget.
        config: settings; None: the defaults.
        memory: an open device to use in place of `device_id`; it is not closed on shutdown.

    Raises:
        RuntimeError: CUDA is not available and the CPU was not asked for.
        ConfigError: the headroom leaves nothing of the card.

    Example:
        >>> controller = MemoryPressureController("cpu", CurriculumConfig(memory_limit_gb=1, target_headroom_gb=0.2))
        >>> decision = controller.decide()           # before the step: how many samples
        >>> controller.observe(decision.batch)       # after it: what it needed
    """

    def __init__(
        self,
        device_id: int | str | torch.device = 0,
        config: CurriculumConfig | None = None,
        *,
        memory: MemoryDevice | None = None,
    ) -> None:
        self.config = config or CurriculumConfig()
        self._owns_memory = memory is None
        self.memory = memory or open_memory(device_id, self.config.memory_limit_gb)
        self.device = self.memory.device
        self.vram_total = self.memory.total_bytes or int(_REFERENCE_CARD_GB * GIB)
        """Bytes of the card, or of the limit set below it; 24 GiB where detection fails."""
        if self.config.target_headroom_gb * GIB >= self.vram_total:
            headroom, total = self.config.target_headroom_gb, self.vram_total / GIB
            problem = (
                f"target_headroom_gb {headroom:g} leaves nothing of {total:.3g} GB; set a smaller --target-headroom-gb"
            )
            raise ConfigError("memory", [problem])
        self.limits = law.Limits.from_config(self.config)
        self.state = law.State()
        self.step = 0
        self.metrics_queue: queue.Queue[MemoryReading] = queue.Queue(maxsize=_QUEUE_LENGTH)
        """Newest readings of the monitor thread; when it is full the oldest is dropped."""
        self._gc_threshold_bytes = min(self.config.gc_threshold_gb, self.config.target_headroom_gb) * GIB
        self._reading = self.memory.read()
        self._reserved_ratio = 1.0
        """What is reserved above what lies between steps, by what is allocated there."""
        self._pool_ratio = 1.0
        """The same in replays of CUDA graphs, where it is the pool that leaves gaps."""
        self._highest_allocated = 0
        self.releases = 0
        """How often cached blocks were given back to keep the headroom."""
        self._release_pause = 1
        self._next_release_step = 0
        self._monitor: threading.Thread | None = None
        self._stop = threading.Event()

    # --- the loop's side

    @property
    def reading(self) -> MemoryReading:
        """The device as read at the last step boundary."""
        return self._reading

    @property
    def batch_size(self) -> int:
        """The present micro-batch, in samples."""
        return self.state.batch or law.first_batch(self.limits)

    def decide(self, sample_work: float = 1.0, *, rehearsal: bool = False) -> law.Decision:
        """The micro-batch for the coming step.

        Args:
            sample_work: size of the largest coming sample relative to the usual one; 1 where all are alike.
            rehearsal: whether the step will be undone, so that the size may grow as far as the model allows at once.
        """
        self.state, decision = law.decide(
            self.state, self.limits, self._reading.budget_bytes, sample_work, self.step, rehearsal
        )
        return decision

    def keeps_headroom(self, batch: int, sample_work: float = 1.0) -> bool:
        """Whether a micro-batch of `batch` samples is expected to, by the steps seen so far."""
        return batch * sample_work <= law.work_that_fits(self.state, self.limits, self._reading.budget_bytes)

    def read_base(self) -> None:
        """Learn what lies between steps now: something has come or gone that no step knows of."""
        self._reading = self.memory.read()
        peaks = dataclasses.replace(self.state.peaks, base=float(self._reading.allocated_bytes))
        self.state = dataclasses.replace(self.state, peaks=peaks)

    def begin_step(self) -> None:
        """Start the peak of a step. `observe` does it for the next one."""
        self.memory.reset_peak()

    def release_cache(self, *, collect: bool = True) -> None:
        """Release cached blocks between two steps, and start the peak of the next one without them."""
        self.memory.release_cache(collect=collect)
        self.memory.reset_peak()
        self._highest_allocated = 0

    def observe(
        self,
        batch: int,
        *,
        sample_work: float = 1.0,
        base_bytes: int | None = None,
        excess_bytes: int | None = None,
        pool_bytes: int | None = None,
    ) -> MemoryReading:
        """Learn from a finished step: reads the peak once, and starts the next.

        Cached blocks that stand in the headroom are released.

        Args:
            batch: samples in its largest micro-batch.
            sample_work: size of its largest sample relative to the usual one.
            base_bytes: allocated between steps; None: as read now.
            excess_bytes: of a step that replayed a CUDA graph, at least how far its peak is above what lies between
                steps, since the allocator cannot tell. All that is reserved counts then as used: the blocks of a
                graph's pool are of no use to others. None: it ran eagerly.
            pool_bytes: reserved by the pool of larger graphs, where the step was a replay, or by that of any, where it
                was an eager one at a size that may become a graph. The step counts then with what a replay in a pool of
                its own would need, as far as replays were seen. None: there is no such pool, or it stays eager.

        Returns:
            The reading, whose peaks are those of the step.
        """
        reading = self.memory.read()
        base = base_bytes if base_bytes is not None else reading.allocated_bytes
        if excess_bytes is not None:
            peak = max(reading.peak_allocated_bytes, reading.allocated_bytes + excess_bytes)
            reading = dataclasses.replace(reading, peak_allocated_bytes=peak)
            if pool_bytes is None:
                needed = float(max(peak, reading.peak_reserved_bytes))
                self._learn_pool_ratio(peak, reading.peak_reserved_bytes, base)
            else:
                needed = base + (peak - base) * self._pool_ratio
        else:
            peak, reserved = reading.peak_allocated_bytes, reading.peak_reserved_bytes - (pool_bytes or 0)
            self._learn_reserved_ratio(peak, reserved, base)
            ratio = self._reserved_ratio if pool_bytes is None else max(self._reserved_ratio, self._pool_ratio)
            needed = base + (peak - base) * ratio
        self._reading = reading
        seen = law.Observation(
            step=self.step,
            batch=batch,
            work=batch * sample_work,
            peak_bytes=needed,
            base_bytes=float(base),
            budget_bytes=reading.budget_bytes,
        )
        self.state = law.observe(self.state, seen, self.limits)
        self.step += 1
        # reserved never falls by itself: what a larger step or an odd size has cached stays in the headroom
        if not self._release_cache(reading, self._gc_threshold_bytes, collect=True):
            self._release_cache(reading, self.limits.headroom_bytes, collect=False)
        self.memory.reset_peak()  # last: else what was released would count as reserved in the next step
        return reading

    def time(self, batch: int, seconds: float) -> None:
        """Learn the seconds of one micro-batch of `batch` samples; apart from `observe`, since a GPU tells it later."""
        self.state = law.time(self.state, batch, seconds, self.limits)

    def forget(self) -> None:
        """Learn what steps need and take anew: the model trains other parameters from now on."""
        self.release_cache()
        self._reserved_ratio = self._pool_ratio = 1.0
        self.state = law.State(times=TimeModel(needed=self.state.times.needed))

    def forget_times(self) -> None:
        """Drop all timings, and the knee found from them: samples take another time from now on."""
        times = TimeModel(needed=self.state.times.needed)
        self.state = dataclasses.replace(self.state, times=times, knee_batch=0)

    def out_of_memory(
        self, batch: int, shortage_bytes: int = 0, attempt: int = 1, *, sample_work: float = 1.0
    ) -> law.Decision:
        """Learn from an out-of-memory error, after the step was undone.

        Args:
            batch: samples in its largest micro-batch.
            shortage_bytes: what was missing; 0 where it is not known.
            attempt: how many times in a row the step has failed now.
            sample_work: size of its largest sample relative to the usual one.

        Returns:
            The decision with the size to repeat it with.
        """
        self.release_cache()
        self._reading = self.memory.read()
        failure = law.Failure(
            step=self.step,
            batch=batch,
            work=batch * sample_work,
            budget_bytes=self._reading.budget_bytes,
            shortage_bytes=shortage_bytes,
            attempt=attempt,
            base_bytes=float(self._reading.allocated_bytes),
        )
        self.state, decision = law.fail(self.state, failure, self.limits)
        return decision

    def _learn_reserved_ratio(self, allocated: int, reserved: int, base: int) -> None:
        # of what comes and goes, since what stays leaves no gaps. Reserved never falls by itself, so it belongs to the
        # highest allocated since the cache was last released
        if allocated >= 0.98 * self._highest_allocated and allocated > base:
            self._highest_allocated = max(self._highest_allocated, allocated)
            # blocks are rounded up, which is much of a small step: it says nothing of one that needs twice as much
            peaks = self.state.peaks
            share = 1.0 if allocated - base > 2.0 * (peaks.largest_peak - peaks.base) else 0.3
            self._reserved_ratio += share * (_ratio(reserved, allocated, base) - self._reserved_ratio)

    def _learn_pool_ratio(self, allocated: int, reserved: int, base: int) -> None:
        if allocated > base:
            share = 0.3 if self._pool_ratio > 1.0 else 1.0
            self._pool_ratio += share * (_ratio(reserved, allocated, base) - self._pool_ratio)

    def emergency_gc(self) -> bool:
        """Collect garbage and release cached blocks if less than `gc_threshold_gb` (at most the headroom) is free.

        `observe` does it by itself after every step. It costs up to 0.3 s, unless `gc.freeze()` was called once PyTorch
        was imported, as `acmds-train` and every trial do. So while it is needed again and again it is repeated after 1,
        2, 4 and so on steps, up to 512.

        Returns:
            Whether it was done.
        """
        return self._release_cache(self.memory.read(), self._gc_threshold_bytes, collect=True)

    def _release_cache(self, reading: MemoryReading, threshold: float, *, collect: bool) -> bool:
        cached = reading.reserved_bytes - reading.allocated_bytes
        free = reading.budget_bytes - reading.reserved_bytes
        if free >= threshold or cached <= 0 or self.step < self._next_release_step:
            return False
        self.memory.release_cache(collect=collect)
        again = self.step < self._next_release_step + 4 * self._release_pause
        self._release_pause = min(2 * self._release_pause, _LONGEST_RELEASE_PAUSE) if again else 1
        self._next_release_step = self.step + self._release_pause
        self._highest_allocated = 0
        self.releases += 1
        return True

    # --- what others ask

    def get_pressure_level(self) -> MemoryPressureLevel:
        """How little is free now of what this process may hold; cached blocks count as free."""
        free = self.memory.read().free_bytes / self.vram_total * _REFERENCE_CARD_GB
        if free < 1.0:
            return MemoryPressureLevel.CRITICAL
        if free < 3.0:
            return MemoryPressureLevel.HIGH
        if free <= 6.0:
            return MemoryPressureLevel.MODERATE
        return MemoryPressureLevel.LOW

    def get_difficulty_capacity(self) -> float:
        """How much room there is for costly samples: 0 where pressure is critical, 1 where it is low, linear between.

        Free memory is taken as a share of the card, so it means the same on every card.
        """
        free = self.memory.read().free_bytes / self.vram_total * _REFERENCE_CARD_GB
        return min(1.0, max(0.0, (free - 1.0) / 5.0))

    def adaptive_batch_size(self, base_batch_size: int, sample_difficulty: float = 0.0) -> int:
        """A batch of at most `base_batch_size` samples for samples of this difficulty, as memory allows.

        Where the difficulty exceeds the present capacity the batch is smaller in that proportion. More free memory
        never gives a smaller batch.

        Args:
            base_batch_size: samples wanted.
            sample_difficulty: 0 (easy, small) to 1 (hard, large).

        Returns:
            A size in [min_batch_size, max_batch_size].
        """
        if not 0.0 <= sample_difficulty <= 1.0:
            raise ValueError(f"sample_difficulty {sample_difficulty} is outside [0, 1]")
        size = min(base_batch_size, self.config.max_batch_size)
        if self.state.peaks.known:
            size = min(size, self.batch_size)
        capacity = self.get_difficulty_capacity()
        if sample_difficulty > capacity:
            size = math.floor(size * capacity / sample_difficulty)
        return max(self.config.min_batch_size, size)

    # --- the monitor

    def start_monitoring(self, interval_ms: int = 50) -> None:
        """Start the thread that puts a reading into `metrics_queue` every `interval_ms` milliseconds. Idempotent."""
        if interval_ms <= 0:
            raise ValueError(f"interval_ms {interval_ms} must be positive")
        if self._monitor is not None and self._monitor.is_alive():
            return
        self._stop.clear()
        self._monitor = threading.Thread(
            target=self._watch, args=(interval_ms / 1000,), name="acmds-memory-monitor", daemon=True
        )
        self._monitor.start()

    def _watch(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            reading = self.memory.read()
            try:
                self.metrics_queue.put_nowait(reading)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self.metrics_queue.get_nowait()
                with contextlib.suppress(queue.Full):
                    self.metrics_queue.put_nowait(reading)

    def shutdown(self) -> None:
        """Stop the monitor and give the device back. Idempotent."""
        self._stop.set()
        if self._monitor is not None:
            self._monitor.join(timeout=5.0)
            self._monitor = None
        if self._owns_memory:
            self.memory.close()
            self._owns_memory = False

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that was learned, as plain numbers."""
        scalars = {
            name: getattr(self.state, name)
            for name in (field.name for field in dataclasses.fields(self.state))
            if name not in ("peaks", "times")
        }
        return {
            "step": self.step,
            "reserved_ratio": self._reserved_ratio,
            "pool_ratio": self._pool_ratio,
            "highest_allocated": self._highest_allocated,
            "law": scalars,
            "peaks": self.state.peaks.state_dict(),
            "times": [[size, list(values)] for size, values in self.state.times.timings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is not one; nothing has been changed.
        """
        step, highest = int(state["step"]), int(state["highest_allocated"])
        ratio, pool_ratio = float(state["reserved_ratio"]), float(state["pool_ratio"])
        times = TimeModel(tuple((int(size), tuple(values)) for size, values in state["times"]))
        scalars = {name: type(getattr(law.State(), name))(value) for name, value in state["law"].items()}
        self.state = law.State(**scalars, peaks=PeakModel.from_state_dict(state["peaks"]), times=times)
        self.step, self._reserved_ratio, self._highest_allocated = step, ratio, highest
        self._pool_ratio = pool_ratio
        self._release_pause, self._next_release_step = 1, 0


def _ratio(reserved: int, allocated: int, base: int) -> float:
    """What is reserved above `base` by what is allocated above it, in [1, 2]."""
    return max(1.0, min((reserved - base) / (allocated - base), 2.0))
