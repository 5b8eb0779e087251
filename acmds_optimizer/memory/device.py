"""The memory a process may hold on one device, read and capped in one place.

Two devices keep the same contract: `CudaMemory` asks PyTorch's caching allocator and the driver; `BudgetedCpuMemory`
makes a card of the CPU by adding up live tensor storage, and raises the real `torch.OutOfMemoryError` at its budget.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acmds_optimizer.config import GIB
from acmds_optimizer.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_CPU_LIMIT_GB = 24.0
"""What the card on the CPU holds where nobody says: as much as an RTX 3090."""


@dataclass(frozen=True)
class MemoryReading:
    """What a device says of this process at one moment. All in bytes, counts since the device was opened."""

    budget_bytes: int
    """What this process may hold now: driver-free plus what its allocator has reserved, within the limit."""
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    """Highest allocated bytes since the last `reset_peak`."""
    peak_reserved_bytes: int
    alloc_retries: int
    """Times the allocator had to release its cache to serve a request: the last warning before an error."""
    out_of_memory_errors: int

    @property
    def free_bytes(self) -> int:
        """What this process may still allocate: the budget less what is allocated. Cached blocks count as free."""
        return max(0, self.budget_bytes - self.allocated_bytes)


class MemoryDevice(ABC):
    """One device's memory as this process sees it."""

    device: torch.device
    total_bytes: int
    """Capacity of the card, or the limit where one is set below it."""

    @abstractmethod
    def read(self) -> MemoryReading:
        """The present reading. Costs microseconds and never waits for the device."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start a new peak at what is allocated now."""

    @abstractmethod
    def release_cache(self, *, collect: bool = True) -> None:
        """Return cached, unused blocks to the driver; collect garbage before, which takes longer."""

    def track(self, values: Any) -> None:
        """Count tensors that were made outside `watch()`, in any nest of lists and dicts. CUDA counts them itself."""
        del values

    @abstractmethod
    def watch(self) -> AbstractContextManager[Any]:
        """Within this context the device's budget is enforced and counted."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was set for the process."""


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Within this context a CUDA `device` is PyTorch's current one, to whose streams all goes that names none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaMemory(MemoryDevice):
    """A CUDA card through PyTorch's caching allocator.

    Args:
        device: `cuda` or `cuda:N`.
        limit_bytes: cap for this process, set with `set_per_process_memory_fraction` so that overshoot is an
            error that can be caught; None: what the card has.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        _, card_bytes = torch.cuda.mem_get_info(self.device)
        # the cap is a fraction of the device's total as PyTorch sees it
        self._limit_bytes = min(limit_bytes, card_bytes) if limit_bytes else None
        if self._limit_bytes:
            torch.cuda.set_per_process_memory_fraction(self._limit_bytes / card_bytes, self.device)
        self.total_bytes = self._limit_bytes or card_bytes

    def read(self) -> MemoryReading:
        # the nested form costs 16 us, `memory_stats()` 86 us: it flattens and sorts the same numbers
        stats = torch.cuda.memory.memory_stats_as_nested_dict(self.device)
        if not stats:  # nothing allocated yet
            stats = {}
        allocated = stats.get("allocated_bytes", {}).get("all", {})
        reserved = stats.get("reserved_bytes", {}).get("all", {})
        driver_free, _ = torch.cuda.mem_get_info(self.device)
        budget = driver_free + reserved.get("current", 0)
        if self._limit_bytes:
            budget = min(budget, self._limit_bytes)
        return MemoryReading(
            budget_bytes=budget,
            allocated_bytes=allocated.get("current", 0),
            reserved_bytes=reserved.get("current", 0),
            peak_allocated_bytes=allocated.get("peak", 0),
            peak_reserved_bytes=reserved.get("peak", 0),
            alloc_retries=stats.get("num_alloc_retries", 0),
            out_of_memory_errors=stats.get("num_ooms", 0),
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_cache(self, *, collect: bool = True) -> None:
        if collect:
            gc.collect()
        torch.cuda.empty_cache()

    def watch(self) -> AbstractContextManager[Any]:
        return made_current(self.device)

    def close(self) -> None:
        if self._limit_bytes:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


class BudgetedCpuMemory(MemoryDevice):
    """A card on the CPU: live tensor storage is added up, and the budget raises the real out-of-memory error.

    Within `watch()` every operation that PyTorch dispatches is seen, in forward, backward and optimizer; about 13 us
    an operation. Workspace inside a kernel is not seen. There is no caching allocator, so reserved equals allocated.

    Args:
        limit_bytes: size of the card.

    Example:
        >>> memory = BudgetedCpuMemory(64 * 2**20)
        >>> memory.track(model.parameters())
        >>> with memory.watch():
        ...     model(inputs).sum().backward()
    """

    def __init__(self, limit_bytes: int) -> None:
        self.device = torch.device("cpu")
        self.total_bytes = limit_bytes
        self.neighbour_bytes = 0
        """What another process is taken to hold of this card."""
        self.on_operation: Callable[[Any], None] | None = None
        """Called with each dispatched operation before it runs; tests raise errors from it."""
        self._live_bytes = 0
        self._peak_bytes = 0
        self._errors = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        _cpu_cards.add(self)

    def track(self, values: Any) -> None:
        if isinstance(values, Iterable) and not isinstance(values, (torch.Tensor, dict, list, tuple)):
            values = list(values)
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)

    def read(self) -> MemoryReading:
        return MemoryReading(
            budget_bytes=max(0, self.total_bytes - self.neighbour_bytes),
            allocated_bytes=self._live_bytes,
            reserved_bytes=self._live_bytes,
            peak_allocated_bytes=self._peak_bytes,
            peak_reserved_bytes=self._peak_bytes,
            alloc_retries=0,
            out_of_memory_errors=self._errors,
        )

    def reset_peak(self) -> None:
        self._peak_bytes = self._live_bytes

    def release_cache(self, *, collect: bool = True) -> None:
        if collect:
            gc.collect()

    def watch(self) -> AbstractContextManager[Any]:
        return _CountingMode(self)

    def close(self) -> None:
        self._seen.clear()
        self._live_bytes = 0  # else what is used again would count twice

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
            return
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        if not size:
            return
        # the Python object of a storage lives as long as the storage, so its end is the end of the bytes
        self._seen[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))  # type: ignore[misc]
        self._live_bytes += size
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes = self._live_bytes

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self._live_bytes -= size

    def _count_outputs(self, outputs: Any) -> None:
        before, peak_before = self._live_bytes, self._peak_bytes
        if isinstance(outputs, torch.Tensor):
            self._count(outputs)
        else:
            for leaf in tree_leaves(outputs):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        budget = self.total_bytes - self.neighbour_bytes
        if self._live_bytes > budget and self._live_bytes > before:
            self._errors += 1
            asked, live = self._live_bytes - before, before
            self._peak_bytes = max(peak_before, before)  # what was refused was never held
            raise torch.OutOfMemoryError(
                f"CPU card out of memory. Tried to allocate {asked / 2**20:.2f} MiB. The card has a budget of "
                f"{budget / 2**20:.2f} MiB of which {live / 2**20:.2f} MiB are allocated."
            )


_cpu_cards: weakref.WeakSet[BudgetedCpuMemory] = weakref.WeakSet()


def occupy_cpu_cards(size: int) -> None:
    """From now on another process is taken to hold `size` bytes of every CPU card of this process."""
    for card in _cpu_cards:
        card.neighbour_bytes = size


class _CountingMode(TorchDispatchMode):
    def __init__(self, memory: BudgetedCpuMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        memory = self._memory
        if memory.on_operation is not None:
            memory.on_operation(func)
        outputs = func(*args, **(kwargs or {}))
        memory._count_outputs(outputs)
        return outputs


def prefer_expandable_segments() -> None:
    """Let PyTorch's allocator grow its segments, so that blocks of one size do not stand beside those of the next.

    Holds for what is allocated from now on. PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, where set, are obeyed.
    """
    if os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"):
        return
    # renamed in PyTorch 2.9
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    try:
        setter("expandable_segments:True")
    except RuntimeError as error:  # another allocator is in use
        logger.debug("expandable segments: %s", error)


def no_cuda_reason() -> str:
    """Why CUDA cannot be used here, in words."""
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    if torch.version.cuda is None:
        return "this PyTorch is built for another kind of GPU"
    return "no NVIDIA GPU or driver was found"


def open_memory(device: str | int | torch.device, memory_limit_gb: float | None = None) -> MemoryDevice:
    """The memory of `device`, capped to `memory_limit_gb` GB (2**30 bytes).

    Args:
        device: `cuda`, `cuda:N`, `cpu`, a CUDA device's number, or a torch.device.
        memory_limit_gb: cap; None: all that is free on CUDA, 24 on the CPU.

    Raises:
        RuntimeError, ConfigError: as for `usable_device`.
    """
    device = usable_device(device)
    limit_bytes = int(memory_limit_gb * GIB) if memory_limit_gb else None
    if device.type == "cpu":
        return BudgetedCpuMemory(limit_bytes or int(DEFAULT_CPU_LIMIT_GB * GIB))
    return CudaMemory(device, limit_bytes)


def usable_device(device: str | int | torch.device) -> torch.device:
    """`device`, if it is there.

    Raises:
        RuntimeError: CUDA is asked for and not available; says how to ask for the CPU.
        ConfigError: another kind of device, or a CUDA device that is not there.
    """
    try:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise ConfigError("device", [f"{device!r} is no device; use cuda, cuda:N or cpu"]) from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError("device", [f"{device.type!r} is not supported; use cuda, cuda:N or cpu"])
    if not torch.cuda.device_count():  # asks the driver's library; `is_available` starts CUDA, a quarter of a second
        raise RuntimeError(
            f"CUDA is not available: {no_cuda_reason()}. To train on the CPU, with a budget of memory_limit_gb, pass "
            f'device_id="cpu" (command line: --device cpu)'
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            "device", [f"{device} is not there; this machine has {torch.cuda.device_count()} CUDA device(s)"]
        )
    return device
