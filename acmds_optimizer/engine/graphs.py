"""Forward and backward of a micro-batch as one CUDA graph, captured once for each size.

Below the knee a step is bound by kernel launches; a graph replays them as one. All graphs share one memory pool, into
which the largest captured size fits them all, and add up their gradients in the same buffers. The optimizer runs
outside, so learning rates, scalers and roll-back work as they do in eager mode.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.memory.guard import is_out_of_memory

if TYPE_CHECKING:
    from acmds_optimizer.engine.step import TrainStep

logger = logging.getLogger(__name__)

_EAGER_FIRST = 4
"""Uses of a size before it is captured: they warm the kernels up, and an odd last batch never gets there."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    shares: Tensor
    losses: Tensor
    peak_bytes: int


class GraphedMicroBatches:
    """Runs `TrainStep.backward` on micro-batches, by replaying a graph where the size has been seen often enough.

    Args:
        step: the eager step; its model, scaler and autocast settings are captured.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._graphs: dict[int, _Captured] = {}
        self._uses: Counter[int] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self.off_reason = ""
        """Why nothing is captured any more; empty while graphs are in use."""

    def begin_step(self) -> None:
        """Zero the gradients in buffers that stay where they are, since graphs write into them."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        torch._foreach_zero_(self._gradients)

    def __call__(self, part: Batch, shares: Tensor) -> Tensor:
        """Add the gradient of sum(shares * loss) to the buffers; losses (B,) of the samples, detached."""
        size = len(part)
        self._uses[size] += 1
        if size not in self._graphs:
            if self.off_reason or self._uses[size] <= _EAGER_FIRST:
                return self._step.backward(part.inputs, part.targets, shares)
            captured = self._capture(part, shares)
            if captured is None:
                return self._step.backward(part.inputs, part.targets, shares)
            self._graphs[size] = captured
        captured = self._graphs[size]
        captured.inputs.copy_(part.inputs)
        captured.targets.copy_(part.targets)
        captured.shares.copy_(shares)
        captured.graph.replay()
        return captured.losses.clone()

    def peak_bytes(self, size: int) -> int | None:
        """Peak of a replayed micro-batch, measured at capture, since a replay asks the allocator for nothing."""
        captured = self._graphs.get(size)
        return captured.peak_bytes if captured else None

    @property
    def largest(self) -> int:
        """Largest captured size; 0 where there is none."""
        return max(self._graphs, default=0)

    def release(self) -> None:
        """Drop all graphs and their memory; sizes that are used again are captured again."""
        self._graphs.clear()
        self._gradients.clear()
        self._uses.clear()

    def _capture(self, part: Batch, shares: Tensor) -> _Captured | None:
        inputs, targets, static_shares = part.inputs.clone(), part.targets.clone(), shares.clone()
        graph = torch.cuda.CUDAGraph()
        memory = self._step.guard.controller.memory
        before = memory.read().peak_allocated_bytes
        memory.reset_peak()
        failure = None
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                losses = self._step.backward(inputs, targets, static_shares)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if failure is not None:
            self.off_reason = failure
            logger.warning("CUDA graphs are off, this model cannot be captured (%s)", failure)
            self.release()
            return None
        peak = max(before, memory.read().peak_allocated_bytes)
        return _Captured(graph, inputs, targets, static_shares, losses, peak)
