"""Forward and backward of a micro-batch as one CUDA graph, captured once for each size, and the optimizer as another.

Below the knee a step is bound by kernel launches; a graph replays them as one. All graphs share one memory pool, into
which the largest captured size fits them all, and add up their gradients in the same buffers. Learning rates and loss
scales are read from device memory, so they may change from step to step; a replay allocates nothing, so it cannot run
out of memory half-way.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.capture import CaptureError, capture, give_up_pool
from acmds_optimizer.engine.replayable import Beside, can_be_captured, fixed_settings, plain_attributes, skipped
from acmds_optimizer.memory.law import Decision

if TYPE_CHECKING:
    from acmds_optimizer.engine.step import Timing, TrainStep

logger = logging.getLogger(__name__)

_EAGER_FIRST = 4
"""Uses of a size before it is captured: they warm the kernels up, and an odd last batch never gets there."""
_TIMINGS = 5
_LEAST_EAGER_TIMINGS, _MOST_EAGER_TIMINGS = 3, 16
"""Of the newest eager steps of a size: they say whether a capture is worth a try, and what its graph has to beat."""
_BUSY, _LAUNCHES = 2.5, 64
"""Steps that take so many times the shortest of the newest launches are not worth a try, unless the GPU was seen to
wait: it also waits within a step, where kernels are short."""
_LEAST_GAIN = 0.02
"""What a graph must gain at a size to be kept there, where nobody asked for graphs; five timings tell so much."""
_CHANGING = "which parameters it uses changes from step to step"


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    shares: Tensor
    soft: Tensor | None
    losses: Tensor
    peak_bytes: int
    excess_bytes: int | None = None
    """The peak above what lies between steps; None until the step of the capture is over."""


@dataclass(frozen=True)
class _CapturedOptimizer:
    graph: torch.cuda.CUDAGraph
    rates: list[Tensor]
    """Learning rates of the groups, on the device."""
    settings: list[Any]
    """What is fixed in the graph: another value of it asks for another capture."""


class GraphedMicroBatches:
    """Runs `TrainStep.backward` on micro-batches, by replaying a graph where the size has been seen often enough.

    Args:
        step: the eager step; its model, scaler and autocast settings are captured.
        only_if_faster: whether a size is captured only where its steps were seen to wait for launches, and its graph
            kept only if it gains 2 %.
    """

    def __init__(self, step: TrainStep, *, only_if_faster: bool = False) -> None:
        self._step = step
        self._only_if_faster = only_if_faster
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self._buffers: list[Tensor | None] = []
        """For each parameter its gradient, once anything is captured; None for those that the model does not use."""
        self._used: tuple[bool, ...] | None = None
        """Which parameters had a gradient in the steps so far."""
        self._zero = True
        self._graphs: dict[int, _Captured] = {}
        self._optimizer: _CapturedOptimizer | None = None
        self._optimizer_uses = 0
        self._optimizer_eager = not can_be_captured(step.guard.optimizer)
        self._uses: Counter[int] = Counter()
        self._odd = False
        self._alone = True
        """Whether nothing eager has left blocks beside the pool, so that all that is reserved is what replays need."""
        self._eager: defaultdict[int, deque[Timing]] = defaultdict(lambda: deque(maxlen=_MOST_EAGER_TIMINGS))
        self._replays: defaultdict[int, list[float]] = defaultdict(list)
        self._launches: deque[float] = deque(maxlen=_LAUNCHES)
        """Seconds in which the host launched an eager micro-batch, of whatever size."""
        self._not_faster: set[int] = set()
        self._attributes: list[tuple[str, Any]] | None = None
        """Those of the model when the epoch began."""
        self.pool_bytes = 0
        """What the pool keeps between steps, beside which anything eager has to fit."""
        self._pool = torch.cuda.graph_pool_handle()
        self.off_reason = ""
        """Why nothing is captured any more; empty while graphs are in use."""
        self.captures = 0
        """How many graphs were captured so far; the steps in which they were are not typical."""
        self.replayed = False
        """Whether the last micro-batch was a replay."""

    def zero_grad(self) -> None:
        """Drop the gradients; once anything is captured zero them, in buffers that stay, since graphs write into them.

        Until then each step tells which parameters the model uses: the others have no buffer, so that the optimizer
        leaves them alone as it does in eager mode. A model that does not always use the same is never captured.
        """
        if self._buffers:
            for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
                if parameter.grad is not buffer:
                    parameter.grad = buffer
            if not self._zero:
                torch._foreach_zero_(self._gradients)
            self._zero = True
            return
        used = tuple(parameter.grad is not None for parameter in self._parameters)
        if any(used):
            if self._used not in (None, used) and not self.off_reason:
                self._turn_off(_CHANGING)
            self._used = used
        for parameter in self._parameters:
            parameter.grad = None

    def __call__(self, part: Batch, total: int) -> Tensor:
        """Add the gradient of sum(weight * loss) / total to the buffers; losses (B,) of the samples, detached."""
        size = len(part)
        self._zero = False
        self._uses[size] += not self._odd
        captured = self._graphs.get(size)
        if captured is None and self._is_due(size):
            captured = self._capture(part, total)
        self.replayed = captured is not None
        if captured is None:
            self._alone &= not self._graphs
            began = time.perf_counter()
            losses = self._step.backward(part.inputs, part.targets, part.weights / total, part.soft)
            self._launches.append(time.perf_counter() - began)
            pairs = zip(self._parameters, self._buffers, strict=False)
            if any(p.grad is not None and buffer is None for p, buffer in pairs):
                self._turn_off(_CHANGING)
            return losses
        captured.inputs.copy_(part.inputs)
        captured.targets.copy_(part.targets)
        torch.div(part.weights, total, out=captured.shares)
        if captured.soft is not None and part.soft is not None:
            captured.soft.copy_(part.soft)
        captured.graph.replay()
        return captured.losses.clone()

    @property
    def _modules(self) -> list[nn.Module]:
        """All modules of model and loss."""
        parts = (part for part in (self._step.model, self._step.loss.own) if isinstance(part, nn.Module))
        return [module for part in parts for module in part.modules()]

    @property
    def _asks_the_gpu(self) -> bool:
        """Whether steps wait for the GPU, to learn of an overflow, until the optimizer is captured too."""
        scaled = self._step.guard.scaler is not None
        return scaled and self._optimizer is None and not self._optimizer_eager and not self.off_reason

    @property
    def _gradients(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers if buffer is not None]

    def _fix_gradients(self) -> None:
        """Make the gradients stay where they are from now on, with what the step under way has added up so far."""
        if self._buffers:
            return
        assert self._used is not None
        for parameter, used in zip(self._parameters, self._used, strict=True):
            if parameter.grad is None and used:
                parameter.grad = torch.zeros_like(parameter)
        self._buffers = [parameter.grad for parameter in self._parameters]

    def _turn_off(self, reason: str) -> None:
        """Drop all graphs for good; the gradients of the step that is under way stay."""
        logger.warning("CUDA graphs: this model cannot be captured (%s)", reason)
        self.off_reason = reason
        gradients = [parameter.grad for parameter in self._parameters]
        self.release()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def optimizer_step(self) -> bool:
        """Step the optimizer and zero the gradients by a graph; False where it is to be stepped eagerly."""
        self._zero = False  # also where this process had no samples: those of others are in its gradients now
        if self._optimizer_eager or self.off_reason or self._used is None:
            return False
        optimizer, scaler = self._step.guard.optimizer, self._step.guard.scaler
        self._optimizer_uses += 1
        if self._optimizer_uses <= _EAGER_FIRST:
            return False
        # beside an eager model it costs more, in gradients that stay and are added to, than the launches that it saves;
        # but with a scaler it saves the guard a copy of all that a step changes
        if not self._graphs and scaler is None:
            return False
        self._fix_gradients()
        settings = fixed_settings(optimizer)
        if self._optimizer is None or self._optimizer.settings != settings:
            self._optimizer = self._capture_optimizer(settings)
            if self._optimizer is None:
                self._optimizer_eager = True
                return False
        for group, rate in zip(optimizer.param_groups, self._optimizer.rates, strict=True):
            rate.fill_(group["lr"])
        self._optimizer.graph.replay()
        self._zero = True
        return True

    def timed(self, timing: Timing) -> None:
        """Learn what a micro-batch took; a graph that does not gain enough is dropped."""
        if not self._only_if_faster:
            return
        size = timing.micro_batch
        if not timing.replayed:
            if self._asks_the_gpu:
                timing = replace(timing, waited=False)
            self._eager[size].append(timing)
            return
        replays, eager = self._replays[size], self._eager[size]
        if len(replays) == _TIMINGS or size not in self._graphs or not eager:
            return
        replays.append(timing.seconds)
        if len(replays) < _TIMINGS:
            return
        gain = median(each.seconds for each in eager) / median(replays) - 1.0
        if gain >= _LEAST_GAIN:
            logger.info("CUDA graphs: on for micro-batches of %d, %.2f times as fast", size, 1.0 + gain)
            return
        logger.info("CUDA graphs: off for micro-batches of %d, %+.1f %% is too little", size, 100 * gain)
        self._not_faster.add(size)
        del self._graphs[size]
        if not self._eager[size - 1]:  # captured for the sake of this size, without a look at its own time
            self._graphs.pop(size - 1, None)
        if not self._graphs:
            self.release()
        self._step.guard.controller.release_cache(collect=False)  # the pool's blocks are of no use to others

    def untold(self, size: int) -> dict[str, int]:
        """What the allocator cannot tell of a step in micro-batches of `size`: arguments of `controller.observe`."""
        pool = {"pool_bytes": self.pool_bytes}
        if self.replayed:
            captured = self._graphs.get(size)
            told = {"excess_bytes": (captured and captured.excess_bytes) or 0}
            return told if self._alone and size >= self.largest else told | pool
        return pool if self._may_capture(size) else {}

    def end_step(self, base_bytes: int) -> None:
        """Learn what lies between steps after those in which graphs were captured, their buffers included."""
        for captured in self._graphs.values():
            if captured.excess_bytes is None:
                captured.excess_bytes = max(0, captured.peak_bytes - base_bytes)

    @property
    def largest(self) -> int:
        """Largest captured size; 0 where there is none."""
        return max(self._graphs, default=0)

    def make_room(self, decision: Decision, micro_batch: int, sample_work: float, *, odd: bool) -> int:
        """Drop the pool where it is in the way; the micro-batch for what runs eagerly beside it.

        A pool is as large as its largest graph; where memory is what makes the size fall, and where another, larger one
        is about to be warmed up eagerly, it has to go.

        Args:
            decision: for the coming step.
            micro_batch: what the step would run with; less than was decided where there are fewer samples.
            sample_work: size of its largest sample relative to the usual one.
            odd: whether it is the last of an epoch and of another size than the others, so that nothing is captured.
        """
        if decision.reason in ("shrink", "budget", "below_min"):
            self.drop_above(decision.batch)
        elif self.largest < micro_batch:
            self.drop_above(0)
        self._odd = odd
        if not odd or not self._graphs or micro_batch in self._graphs:
            return micro_batch
        peaks = self._step.guard.controller.state.peaks
        room = peaks.work_within(decision.target_bytes - self.pool_bytes) / sample_work
        if room < 1.0:
            self.drop_above(0)
            return micro_batch
        return int(min(room, micro_batch))

    def clear_surroundings(self) -> None:
        """Give back the blocks that eager work has left beside the pool, which no replay can use. Waits for the GPU."""
        if self._graphs:
            self._step.guard.controller.release_cache(collect=False)
            self._alone = True

    def drop_above(self, micro_batch: int) -> None:
        """Drop the graphs and give their memory back, if a larger size than this is captured."""
        if self.largest > micro_batch:
            self.release()
            self._step.guard.controller.release_cache()

    def release(self) -> None:
        """Drop all graphs and their memory; sizes that are used again are captured again."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph
        self.pool_bytes = 0
        self._optimizer = None
        self._buffers = []
        for parameter in self._parameters:
            parameter.grad = None
        self._uses.clear()
        self._optimizer_uses = 0
        self.replayed = False

    def begin_epoch(self) -> None:
        """Capture anew where an attribute of the model has changed, such as a rate of dropout: graphs have the old."""
        attributes = plain_attributes(self._modules)
        if self._graphs and self._attributes not in (None, attributes):
            self.forget()
            self._step.guard.controller.release_cache()
        self._attributes = attributes

    def set_parameters(self, parameters: list[nn.Parameter]) -> None:
        """Train these from now on: what is captured has gradients for others."""
        self.forget()
        self._parameters, self._used = parameters, None

    def forget(self) -> None:
        """Drop all graphs, and what was timed: inputs have another shape, or cost another time, from now on."""
        self.release()
        self._eager.clear()
        self._replays.clear()
        self._not_faster.clear()

    def _may_capture(self, size: int) -> bool:
        """Whether micro-batches of this size will be replayed if they are used often enough, by what is known now."""
        return not self.off_reason and size not in self._not_faster and not self._is_busy(size)

    def _is_busy(self, size: int) -> bool:
        """Whether the GPU was seen to have enough to do in eager steps of this size."""
        eager = self._eager[size]
        if not self._only_if_faster or len(eager) < _LEAST_EAGER_TIMINGS:
            return False
        waited = sum(timing.waited for timing in eager)
        launch = min(self._launches, default=0.0)
        return 2 * waited <= len(eager) and median(timing.seconds for timing in eager) > _BUSY * launch

    def _is_due(self, size: int) -> bool:
        if not self._may_capture(size) or self._used is None or self._uses[size] <= _EAGER_FIRST:
            return False
        if not self._only_if_faster or size + 1 in self._graphs:  # the parts of a batch differ by one sample at most
            return True
        return len(self._eager[size]) >= _LEAST_EAGER_TIMINGS

    def _capture(self, part: Batch, total: int) -> _Captured | None:
        if reason := skipped(self._step.model):
            self._turn_off(reason)
            return None
        inputs, targets, shares = part.inputs.clone(), part.targets.clone(), part.weights / total
        soft = None if part.soft is None else part.soft.clone()
        self._fix_gradients()
        memory = self._step.guard.controller.memory
        memory.release_cache(collect=False)
        self._alone = True
        before = memory.read()
        memory.reset_peak()
        beside = Beside(self._modules)
        graph, losses = self._record(lambda: self._step.backward(inputs, targets, shares, soft))
        if graph is None:
            return None
        if reason := beside.changed(Beside(self._modules)):
            self._turn_off(f"{reason}, which a replay would not")
            return None
        assert losses is not None
        after = memory.read()
        self.pool_bytes += max(0, after.reserved_bytes - before.reserved_bytes)
        peak = max(before.peak_allocated_bytes, after.peak_allocated_bytes)
        self._graphs[len(part)] = captured = _Captured(graph, inputs, targets, shares, soft, losses, peak)
        return captured

    def _capture_optimizer(self, settings: list[Any]) -> _CapturedOptimizer | None:
        guard = self._step.guard
        groups = guard.optimizer.param_groups
        before = [(group["lr"], group.get("capturable")) for group in groups]
        device = self._parameters[0].device
        rates = [torch.as_tensor(lr, dtype=torch.float32, device=device) for lr, _ in before]

        def step() -> None:
            if guard.scaler is not None:
                guard.scaler.step(guard.optimizer)
                guard.scaler.update()
            else:
                guard.optimizer.step()
            torch._foreach_zero_(self._gradients)

        try:
            for group, rate, (_, capturable) in zip(groups, rates, before, strict=True):
                group["lr"] = rate
                if capturable is not None:
                    group["capturable"] = True
            graph, _ = self._record(step, what="optimizer")
            if graph is None and guard.scaler is not None:
                guard.scaler._per_optimizer_states.clear()  # else it believes that the step was taken
        finally:
            for group, (lr, capturable) in zip(groups, before, strict=True):
                group["lr"] = lr
                if capturable is not None:
                    group["capturable"] = capturable
        return None if graph is None else _CapturedOptimizer(graph, rates, settings)

    def _record(
        self, run: Callable[[], Tensor | None], what: str = "model"
    ) -> tuple[torch.cuda.CUDAGraph | None, Tensor | None]:
        """What `run` launches, as a graph, and what it returns; (None, None) where it cannot be captured."""
        device, pool = self._parameters[0].device, self._pool
        self.captures += 1
        try:
            return capture(run, pool, device)
        except CaptureError as error:
            reason, closed = str(error), error.closed
        if what == "model":
            self._turn_off(reason)
            self._step.guard.controller.release_cache()
            if not closed and give_up_pool(pool, device):
                self._step.guard.controller.release_cache()
        else:
            logger.warning("CUDA graphs: this %s cannot be captured (%s)", what, reason)
        return None, None


def wanted_graphs(config: CurriculumConfig, device: torch.device) -> bool | Literal["auto"]:
    """What the configuration asks for, where it can be had; warns where graphs were asked for and cannot."""
    wanted, reason = config.enable_cuda_graphs, ""
    if device.type != "cuda":
        reason = f"there are none on {device}"
    elif config.gradient_checkpointing:
        reason = "recomputed activations cannot be captured"
    if reason and wanted is True:
        logger.warning("CUDA graphs: %s; training without", reason)
    return False if reason else wanted
