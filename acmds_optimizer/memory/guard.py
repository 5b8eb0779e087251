"""What an out-of-memory error is, and a step that can be undone.

A retry that only zeroes the gradients leaves another state behind: BatchNorm statistics, dropout's random numbers, a
half-applied foreach optimizer. `Guard` rolls all of it back, outside the `except` block (a kept exception keeps
every tensor of the failed step alive through its traceback), asks the controller for a smaller size and runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

from acmds_optimizer.config import GIB
from acmds_optimizer.errors import OutOfMemoryForGoodError, first_line
from acmds_optimizer.memory.controller import MemoryPressureController
from acmds_optimizer.memory.out_of_memory import is_out_of_memory, shortage_bytes
from acmds_optimizer.memory.undo import Stateful, StepUndo, create_optimizer_state

Result = TypeVar("Result")


@dataclass(frozen=True)
class OutOfMemoryEvent:
    """One out-of-memory error that was caught, in a guarded step."""

    attempt: int
    micro_batch: int
    next_micro_batch: int
    shortage_bytes: int
    budget_bytes: int
    peak_bytes: int
    message: str


@dataclass(frozen=True)
class GuardedResult(Generic[Result]):
    """What a guarded step returned, the size it ran with in the end, and the errors on the way."""

    value: Result
    micro_batch: int
    events: tuple[OutOfMemoryEvent, ...]


class Guard:
    """Runs optimizer steps so that an out-of-memory error leaves no trace but a smaller micro-batch.

    The state of Adam, AdamW and SGD is created at once, so that the memory of the first step is that of all others.

    Args:
        model: buffers (BatchNorm statistics) of the modules it has now are restored; its parameters too where the
            optimizer is not atomic.
        optimizer: of a fused one whose state exists, without a scaler, all parameter groups but the last are copied
            just before it steps, so the largest is best put last; others are copied whole, on the device, or on the
            host where the copy itself does not fit.
        controller: is asked for the next size, and told of every error.
        scaler: a GradScaler whose state belongs to the step.
        others: anything else with `state_dict`/`load_state_dict` that a step changes.

    Example:
        >>> def attempt(micro_batch):                        # one optimizer step, in pieces of micro_batch samples
        ...     for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch)):
        ...         (loss_fn(model(x), y) * len(x) / len(inputs)).backward()
        ...     guard.optimizer_step()
        >>> guard.run(attempt, min(controller.decide().batch, len(inputs)))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        controller: MemoryPressureController,
        scaler: torch.amp.GradScaler | None = None,
        others: tuple[Stateful, ...] = (),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.controller = controller
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.zero_grad: Callable[[], None] = lambda: optimizer.zero_grad(set_to_none=True)
        """How gradients are dropped before each try."""
        self._undo = StepUndo(model, optimizer, self.scaler, others, controller.device)
        controller.memory.track([list(model.parameters()), list(model.buffers())])
        self.create_optimizer_state()

    def create_optimizer_state(self) -> None:
        """Create the state of parameters that have none, such as of a group that was added since."""
        create_optimizer_state(self.optimizer)
        self.controller.memory.track([list(state.values()) for state in self.optimizer.state.values()])

    def run(
        self, attempt: Callable[[int], Result], micro_batch: int, *, sample_work: float = 1.0
    ) -> GuardedResult[Result]:
        """Run `attempt(micro_batch)`; after an out-of-memory error undo it and run it again, smaller.

        Gradients are dropped before each attempt. Any other error is raised untouched.

        Args:
            attempt: one optimizer step, in pieces of at most so many samples.
            micro_batch: the size to begin with; not more than there are samples.
            sample_work: size of the largest sample relative to the usual one, as told to `controller.decide`.

        Raises:
            OutOfMemoryForGoodError: it failed twice at micro-batch 1, or more than `max_oom_retries` times in a row.
        """
        undo = self._start()
        events: list[OutOfMemoryEvent] = []
        while True:
            value, message = self._try(attempt, micro_batch)
            if message is None:
                if self._undo.of_optimizer is not None and micro_batch > 1:  # there is room for copies on the device
                    self._undo.copy_on_host = False
                self._undo.of_optimizer = None
                return GuardedResult(cast(Result, value), micro_batch, tuple(events))
            undo()
            events.append(self._shrink(message, micro_batch, len(events) + 1, sample_work))
            self._check_tries(events)
            micro_batch = events[-1].next_micro_batch

    def finish(self, update: Callable[[], None]) -> tuple[OutOfMemoryEvent, ...]:
        """Run `update`, which steps the optimizer with the gradients that are there; after an error undo only that.

        For gradients that cannot be computed again at will, since other processes have a part in them.

        Args:
            update: calls `optimizer_step`, and leaves the gradients alone before it, since it may be called again.

        Returns:
            The errors on the way.

        Raises:
            OutOfMemoryForGoodError: it failed with the cache released, and with copies on the host.
        """
        events: list[OutOfMemoryEvent] = []
        while True:
            message = self._try(lambda _: update(), 0, keep_gradients=True)[1]
            if message is None:
                self._undo.of_optimizer = None
                return tuple(events)
            self._undo.undo_optimizer()
            if self.scaler is not None:
                self.scaler._per_optimizer_states.clear()  # else it believes that it has unscaled, or stepped
            memory, size = self.controller.memory, self.controller.batch_size
            peak = memory.read().peak_allocated_bytes
            memory.release_cache()
            budget, shortage = memory.read().budget_bytes, shortage_bytes(message)
            said = first_line(message)
            events.append(OutOfMemoryEvent(len(events) + 1, size, size, shortage, budget, peak, said))
            if len(events) > 2:
                raise OutOfMemoryForGoodError(self._advice(events[-1], "the optimizer's step does not fit"), events)
            self._undo.copy_on_host = memory.device.type == "cuda"

    def rehearse(
        self, attempt: Callable[[int], Any], micro_batch: int, failed: int = 0, *, sample_work: float = 1.0
    ) -> OutOfMemoryEvent | None:
        """Run `attempt(micro_batch)` once and undo it, whatever comes of it: to learn what it needs.

        Args:
            attempt: forward and backward of one micro-batch, without the optimizer.
            micro_batch: its samples.
            failed: how many rehearsals have failed before this one.
            sample_work: as for `run`.

        Returns:
            The out-of-memory error, if there was one; the controller knows of it.

        Raises:
            OutOfMemoryForGoodError: as for `run`.
        """
        undo = self._start()
        try:
            _, message = self._try(attempt, micro_batch)
        finally:
            undo()
        if message is None:
            return None
        event = self._shrink(message, micro_batch, failed + 1, sample_work)
        self._check_tries([event])
        return event

    def _start(self) -> Callable[[], None]:
        undo, message = self._try(lambda _: self._undo.remember(), 0)
        if message is None:
            return cast(Callable[[], None], undo)
        self.controller.release_cache()  # nothing has changed yet, so all it takes is room for the copies
        try:
            return self._undo.remember()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryForGoodError(
                "out of memory: not even copies of the BatchNorm statistics fit before a step. Free memory held by "
                f"other processes, or try a larger --memory-limit-gb. The error was: {first_line(error)}"
            ) from None

    def _try(
        self, attempt: Callable[[int], Result], micro_batch: int, *, keep_gradients: bool = False
    ) -> tuple[Result | None, str | None]:
        """Its value, or the message of the out-of-memory error that ended it."""
        self._undo.keep_gradients = keep_gradients
        self._undo.of_optimizer = None  # of a step that another error ended, or that was taken outside `run`
        try:
            if not keep_gradients:
                self.zero_grad()
            with self.controller.memory.watch():
                return attempt(micro_batch), None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None, str(error)
        # the caller goes on after the exception is gone, and with it the tensors of the failed attempt

    def _check_tries(self, events: list[OutOfMemoryEvent]) -> None:
        last = events[-1]
        if last.micro_batch == 1:
            # one more try, since the cache has been released and neighbours come and go; and without the copy of the
            # optimizer's state on the device, which may be what does not fit
            self._undo.copy_on_host = self.controller.device.type == "cuda"
            if len(events) > 1 and events[-2].micro_batch == 1:
                raise OutOfMemoryForGoodError(self._advice(last, "even one sample does not fit"), events)
        if last.attempt > self.controller.config.max_oom_retries:
            raise OutOfMemoryForGoodError(self._advice(last, f"{last.attempt} tries in a row failed"), events)

    def optimizer_step(self) -> None:
        """Step the optimizer (through the scaler, if any) so that a failure in it can be undone.

        To be the last thing of an attempt: a fused step that has been taken cannot be undone, so an out-of-memory
        error after it ends the training.
        """
        final = self._undo.remember_optimizer()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if final:
            self._undo.of_optimizer = _refuse_to_undo

    def _shrink(self, message: str, micro_batch: int, attempt: int, sample_work: float) -> OutOfMemoryEvent:
        peak = self.controller.memory.read().peak_allocated_bytes
        shortage = shortage_bytes(message)
        decision = self.controller.out_of_memory(micro_batch, shortage, attempt, sample_work=sample_work)
        return OutOfMemoryEvent(
            attempt=attempt,
            micro_batch=micro_batch,
            next_micro_batch=decision.batch,
            shortage_bytes=shortage,
            budget_bytes=self.controller.reading.budget_bytes,
            peak_bytes=peak,
            message=first_line(message),
        )

    def _advice(self, event: OutOfMemoryEvent, what: str) -> str:
        return (
            f"out of memory: {what} (micro-batch {event.micro_batch}, budget {event.budget_bytes / GIB:.3g} GB). "
            "Try --gradient-checkpointing, a smaller --image-size or model, a larger --memory-limit-gb, "
            f"or free memory held by other processes. The last error was: {event.message}"
        )


def _refuse_to_undo() -> None:
    raise OutOfMemoryForGoodError(
        "out of memory, and the optimizer's step has been taken, which cannot be undone: let guard.optimizer_step() be "
        "the last thing of the attempt, and do what follows it after guard.run"
    )
