"""One optimizer step: micro-batches whose gradients add up to the effective batch's."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from acmds_optimizer.engine.batches import Batch, near_equal
from acmds_optimizer.engine.graphs import GraphedMicroBatches
from acmds_optimizer.engine.loss import TrainingLoss
from acmds_optimizer.engine.prepare import logits_of, running_statistics
from acmds_optimizer.errors import DataError, first_line
from acmds_optimizer.memory.guard import Guard
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_MOST_SIZES = 64


def parts(total: int, largest: int) -> list[int]:
    """Near-equal sizes of at most `largest` that add up to `total`: few distinct shapes, no tiny remainder."""
    return near_equal(total, math.ceil(total / largest))


class TrainStep:
    """Forward, backward and optimizer for one effective batch, in micro-batches.

    Args:
        model: in training mode, on the device.
        guard: its optimizer is stepped, so that a failure in it can be undone.
        loss: of the logits, in float32.
        amp_dtype: autocast dtype; None: float32.
        channels_last: whether 4-d inputs are converted to NHWC.
        cuda_graphs: whether steps are replayed as graphs; auto: where that is 2 % faster.
        compiled: whether the model is compiled, once for each micro-batch size.
    """

    def __init__(
        self,
        model: nn.Module,
        guard: Guard,
        loss: TrainingLoss,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        cuda_graphs: bool | Literal["auto"] = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.keep_logits = False
        """Whether the logits come back beside the losses, for what the curriculum makes of them."""
        self.num_classes: int | None = None
        """Outputs that the labels need; None: not known."""
        self.compiles = False
        """Whether the size of the batch will come again, so that it is worth compiling for."""
        self._compiled: Callable[[Tensor], Any] = _compiled(model) if compiled else model
        self.guard = guard
        self.loss = loss
        self.amp_dtype = amp_dtype
        self.channels_last = channels_last
        self.device_type = guard.controller.device.type
        self.graphs = GraphedMicroBatches(self, only_if_faster=cuda_graphs == "auto") if cuda_graphs else None
        if self.graphs is not None:
            guard.zero_grad = self.graphs.zero_grad

    def __call__(self, batch: Batch, micro_batch: int) -> Tensor:
        """Run the step; losses (n,) float32 of its samples (unsmoothed), detached, in their order; see `backward`.

        The gradient is that of sum(weight * loss) / n over the whole batch, whatever the micro-batch is.
        """
        losses = self.accumulate(batch, micro_batch, len(batch))
        self.update()  # last: what allocates after it could fail when the step can no longer be undone
        return losses

    def accumulate(self, batch: Batch, micro_batch: int, total: int) -> Tensor:
        """Forward and backward of `batch`, which is a part of `total` samples; its losses, as of a call."""
        losses = []
        start = 0
        for size in parts(len(batch), micro_batch):
            losses.append(self.micro(batch.slice(start, start + size), total))
            start += size
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def update(self) -> None:
        """Step the optimizer with the gradients that are there."""
        if self.graphs is None or not self.graphs.optimizer_step():
            self.guard.optimizer_step()

    def rehearse(self, batch: Batch, micro_batch: int) -> Tensor:
        """Forward and backward of the first micro-batch alone, without the optimizer; its losses, detached."""
        self.compiles = False
        return self.micro(batch.slice(0, micro_batch), micro_batch)

    def micro(self, part: Batch, total: int) -> Tensor:
        """Forward and backward of one micro-batch out of `total` samples; its losses (B,), detached."""
        if self.graphs is not None:
            return self.graphs(part, total)
        return self.backward(part.inputs, part.targets, part.weights / total, part.soft)

    def backward(self, inputs: Tensor, targets: Tensor, shares: Tensor, soft: Tensor | None = None) -> Tensor:
        """Add the gradient of sum(shares * loss), shares (B,).

        Returns:
            The unreduced, unsmoothed losses (B,), detached; with `keep_logits` (B, 1 + C): losses, then logits.

        Raises:
            DataError: there are fewer outputs than classes.
        """
        try:
            logits = self.logits(inputs)
        except ValueError as error:
            if len(inputs) > 1 or "more than 1 value per channel" not in str(error):
                raise
            with running_statistics(self.model):
                logits = self.logits(inputs)
        if self.num_classes is not None and logits.shape[-1] < self.num_classes:
            # on CUDA a label without an output is an assertion in a kernel, after which the process is of no use
            raise DataError(
                f"the model has {logits.shape[-1]} outputs for {self.num_classes} classes; build it with num_classes "
                "outputs"
            )
        minimised, losses = self.loss(logits, targets, soft)
        weighted = (minimised * shares).sum()
        if self.guard.scaler is not None:
            weighted = self.guard.scaler.scale(weighted)
        weighted.backward()
        return torch.cat((losses[:, None], logits.detach()), dim=1) if self.keep_logits else losses

    def logits(self, inputs: Tensor, model: nn.Module | None = None) -> Tensor:
        """The outputs (B, C) of the model (or of `model`), in float32 where it computed in half precision.

        Raises:
            DataError: the model gives something else than one tensor.
        """
        if self.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # a cached cast of a weight would be made in one graph and read in another
        cache = self.graphs is None
        model = model or self.model
        run = self._compiled if self.compiles and model is self.model and model.training else model
        with torch.autocast(self.device_type, self.amp_dtype, cache_enabled=cache) if self.amp_dtype else nullcontext():
            outputs = logits_of(self.model, run(inputs))
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """The model, compiled anew for each shape of its inputs; as it is, with a warning, from when that fails."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SIZES)
    run = torch.compile(model, dynamic=False)

    def call(inputs: Tensor) -> Any:
        nonlocal run
        try:
            return run(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(getattr(error, "inner_exception", error))
            logger.warning("torch.compile failed, so training goes on without (%s)", reason)
            run = model
            return run(inputs)

    return call


@dataclass(frozen=True)
class Timing:
    """What one micro-batch of a step took."""

    micro_batch: int
    seconds: float
    replayed: bool = False
    """Whether it was a CUDA graph."""

    waited: bool = False
    """Whether the GPU had nothing left to do when the host came to the next step."""


@dataclass
class _Pending:
    micro_batch: int
    micro_batches: int
    replayed: bool
    begin: torch.cuda.Event
    end: torch.cuda.Event
    waited: bool = True


class StepClock:
    """Times steps without waiting for the device: by CUDA events, read once they have passed, or the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[_Pending] = deque()
        self._done: list[Timing] = []
        self._start: torch.cuda.Event | float = 0.0
        self._last = (0, False)

    def start(self) -> None:
        if self._cuda:
            if self._pending and not self._pending[-1].end.query():
                self._pending[-1].waited = False
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self, micro_batch: int, micro_batches: int, *, steady: bool, replayed: bool = False) -> None:
        """End of a step. The first at a size, and those with errors or captures (not `steady`), are not counted."""
        counted = steady and (micro_batch, replayed) == self._last
        self._last = (micro_batch, replayed)
        if not counted:
            return
        if isinstance(self._start, float):
            self._done.append(Timing(micro_batch, (time.perf_counter() - self._start) / micro_batches, replayed))
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._pending.append(_Pending(micro_batch, micro_batches, replayed, self._start, end))

    def timings(self) -> list[Timing]:
        """Those of the steps that have ended since the last call."""
        while self._pending and self._pending[0].end.query():
            ended = self._pending.popleft()
            seconds = ended.begin.elapsed_time(ended.end) / 1000 / ended.micro_batches
            self._done.append(Timing(ended.micro_batch, seconds, ended.replayed, ended.waited))
        done, self._done = self._done, []
        return done
