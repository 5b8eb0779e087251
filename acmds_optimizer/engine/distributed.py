"""The processes of one run, one for each GPU, and what they say to one another.

Forward and backward of a process talk to no other, so it may run out of memory, undo and repeat as often as it needs
to: the others wait for it once a step, when all meet on the CPU, agree that the step has gone through everywhere, and
add up their gradients. A process that gives up says so at that meeting, and all end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acmds_optimizer.engine.shares import Standing
from acmds_optimizer.errors import ConfigError, RankFailedError
from acmds_optimizer.memory.device import no_cuda_reason
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

Value = TypeVar("Value")

_BUCKET_NUMBERS = 2**23
_BITS = 32


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started; alone without it.

    Args:
        device: `cuda` (each process takes the one of its local rank) or `cpu`.

    Raises:
        ConfigError: a device with a number, which all processes of this machine would share; or WORLD_SIZE without the
            rest of what torchrun sets.
        RuntimeError: CUDA is not available and the CPU was not asked for.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            "torchrun",
            [
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not set are {', '.join(missing)}; "
                "start the processes with torchrun, or unset WORLD_SIZE to train with one"
            ],
        )
    if device not in ("cuda", "cpu"):
        raise ConfigError("torchrun", [f"device {device}: each process takes its own; give --device cuda or cpu"])
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            if not torch.cuda.is_available():
                raise RuntimeError(f"CUDA is not available: {no_cuda_reason()}. To train on the CPU: --device cpu")
            raise ConfigError(
                "torchrun", [f"there are {torch.cuda.device_count()} CUDA devices; lower --nproc-per-node to that"]
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    yield Ranks.current()
    dist.destroy_process_group()  # not after an error: it would wait for the others


@dataclass
class _Bucket:
    """Gradients that are added up together: their parameters, and where each lies in `flat`."""

    flat: Tensor
    parameters: list[nn.Parameter] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)


class Ranks:
    """This process among those of its run. Alone, it has nothing to say, and its methods give back what they are given.

    All processes must call the same methods in the same order.

    Args:
        rank: number of this process, from 0.
        world_size: number of processes.
        control: group for what is said on the CPU, of backend gloo; None: alone.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._control = control
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._buckets: list[_Bucket] = []
        self._bucketed: list[bool] = []
        self._gave_up = False

    @classmethod
    def current(cls) -> Ranks:
        """All processes of torch.distributed's default group, or this one alone where there is none."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        control = dist.new_group(backend="gloo")
        assert isinstance(control, dist.ProcessGroup)  # else this process would not be in it
        return cls(dist.get_rank(), dist.get_world_size(), control)

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    # --- plain values, on the CPU

    def gather(self, value: Value) -> list[Value]:
        """What each process gave, by rank; anything that can be pickled."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        with naming_failures():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def of_first(self, value: Value) -> Value:
        """What the first process gave."""
        return self.gather(value)[0]

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The others enter once the first process has left: it downloads what they then find."""
        if not self.first:
            self.gather(None)
        yield
        if self.first:
            self.gather(None)

    def agree(self, settings: dict[str, Any]) -> None:
        """Make sure that all gave the same settings.

        Raises:
            ConfigError: they did not; names those that differ.
        """
        everyone = self.gather(settings)
        found = {name: sorted({repr(other[name]) for other in everyone}) for name in settings}
        problems = [
            f"{name} must be the same in all processes, but is {' and '.join(values)}"
            for name, values in found.items()
            if len(values) > 1
        ]
        if problems:
            raise ConfigError("torchrun", problems)

    # --- once a step

    def meet(self, standing: Standing, used: Sequence[bool]) -> tuple[list[Standing], list[bool]]:
        """Say that the gradients of this step are there, and wait for the others to say so.

        Args:
            standing: of this process.
            used: which parameters have a gradient here.

        Returns:
            The standings of all, and which parameters have a gradient anywhere.

        Raises:
            RankFailedError: another process gave up, or is gone.
        """
        rows = self._exchange(standing, used)
        if failed := [rank for rank, row in enumerate(rows) if not row[0]]:
            self._gave_up = True
            raise RankFailedError(f"process {failed[0]} of {self.world_size} gave up; its own message says why")
        standings = [Standing(int(row[1]), row[2], row[3], row[4], bool(row[5])) for row in rows]
        words = [[int(word) for word in row[6:]] for row in rows]
        anywhere = [0] * len(words[0])
        for row in words:
            anywhere = [a | b for a, b in zip(anywhere, row, strict=True)]
        return standings, [bool(anywhere[i // _BITS] >> i % _BITS & 1) for i in range(len(used))]

    def give_up(self, parameters: int) -> None:
        """Come to the meeting of this step only to say that it failed here for good. To be followed by an error."""
        if self.several and not self._gave_up:
            self._gave_up = True
            with contextlib.suppress(RankFailedError):
                self._exchange(None, [False] * parameters)

    def _exchange(self, standing: Standing | None, used: Sequence[bool]) -> list[list[float]]:
        words = [0] * -(-len(used) // _BITS)
        for i, is_used in enumerate(used):
            words[i // _BITS] |= is_used << i % _BITS
        said = standing or Standing(0)
        times = (said.seconds_per_piece, said.seconds_per_sample, said.seconds)
        row = [float(standing is not None), said.micro_batch, *times, float(said.stop)]
        mine = torch.tensor(row + words, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        with naming_failures():
            dist.all_gather(rows, mine, group=self._control)
        return [other.tolist() for other in rows]

    # --- tensors, on their device

    def prepare(self, parameters: Sequence[nn.Parameter], model: nn.Module) -> list[Tensor]:
        """Make room for gradients on their way, so that nothing is allocated in a step, and start the connections.

        Args:
            parameters: whose gradients will be added up.
            model: whose parameters and buffers, frozen ones too, are made those of the first process.

        Returns:
            The room, which is held as long as this object.
        """
        if not self.several:
            return []
        self._scratch, self._bucketed = {}, []
        for dtype in {parameter.dtype for parameter in parameters}:
            sizes = [parameter.numel() for parameter in parameters if parameter.dtype == dtype]
            room = max(max(sizes), min(sum(sizes), _BUCKET_NUMBERS))
            self._scratch[dtype] = torch.zeros(room, dtype=dtype, device=parameters[0].device)
        with naming_failures(), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                once = tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]  # if expanded
                gapless = once.clone()  # of a slice only its first elements would come, and go into the gaps
                dist.broadcast(gapless, 0)
                once.copy_(gapless)
            for scratch in self._scratch.values():
                dist.all_reduce(scratch)
        return list(self._scratch.values())

    def sum_gradients(self, parameters: Sequence[nn.Parameter], used: Sequence[bool], sums: Tensor) -> None:
        """Put the sum over all processes in the place of each gradient, and of `sums`; nothing large is allocated.

        Args:
            parameters: those of `prepare`.
            used: which have a gradient anywhere; zeros stand in where one has none here.
            sums: (m,) further numbers.
        """
        if list(used) != self._bucketed:
            self._buckets = self._fill_buckets([p for p, is_used in zip(parameters, used, strict=True) if is_used])
            self._bucketed = list(used)
        with naming_failures(), torch.no_grad():
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                gradients: list[Tensor] = [p.grad for p in bucket.parameters if p.grad is not None]
                torch._foreach_copy_(bucket.views, gradients)
                dist.all_reduce(bucket.flat)
                torch._foreach_copy_(gradients, bucket.views)
            dist.all_reduce(sums)

    def _fill_buckets(self, parameters: list[nn.Parameter]) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        for dtype, scratch in self._scratch.items():
            at = len(scratch)  # full
            for parameter in (p for p in parameters if p.dtype == dtype):
                if at + parameter.numel() > len(scratch):
                    at = 0
                    buckets.append(_Bucket(scratch[:0]))
                bucket = buckets[-1]
                bucket.parameters.append(parameter)
                # as the parameter lies, which is how its gradient lies: one kernel then copies them all. But without
                # the gaps of one that is a slice, where the next would be
                dense = torch.empty_like(parameter, device="meta")
                bucket.views.append(scratch.as_strided(parameter.shape, dense.stride(), at))
                at += parameter.numel()
                bucket.flat = scratch[:at]
        return buckets

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, one after the other by rank; n may differ, and none be of any kind."""
        if not self.several:
            return rows
        kinds = self.gather((tuple(rows.shape), rows.dtype))
        counts = [shape[0] for shape, _ in kinds]
        (_, *width), dtype = kinds[counts.index(max(counts))]
        padded = torch.zeros((max(counts), *width), dtype=dtype, device=rows.device)
        if len(rows):
            padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in kinds]
        with naming_failures():
            dist.all_gather(everyone, padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    def average_statistics(self, model: nn.Module) -> None:
        """Put the mean over all processes in the place of the running statistics of normalisations."""
        if not self.several:
            return
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        if not statistics:
            return
        with naming_failures(), torch.no_grad():
            together = torch.cat([statistic.reshape(-1) for statistic in statistics])
            dist.all_reduce(together)
            together /= self.world_size
            means = together.split([statistic.numel() for statistic in statistics])
            for statistic, mean in zip(statistics, means, strict=True):
                statistic.copy_(mean.view_as(statistic))


@contextlib.contextmanager
def naming_failures() -> Iterator[None]:
    """What goes wrong within, but for a lack of memory, is that another process is gone."""
    try:
        yield
    except RuntimeError as error:  # of the connection: the other end is gone
        if is_out_of_memory(error):
            raise
        raise RankFailedError("another process of this run is gone; its own message says why") from error
