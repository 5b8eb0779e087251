"""What an out-of-memory error is, and a step that can be undone.

A retry that only zeroes the gradients leaves another state behind: BatchNorm statistics, dropout's random numbers, a
half-applied foreach optimizer. `Guard` rolls all of it back, outside the `except` block (a kept exception keeps
every tensor of the failed step alive through its traceback), asks the controller for a smaller size and runs again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from acmds_optimizer.config import GIB
from acmds_optimizer.errors import OutOfMemoryForGoodError, first_line
from acmds_optimizer.memory.controller import MemoryPressureController

Result = TypeVar("Result")

_MESSAGES = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    "unable to find an engine to execute this computation",  # cuDNN with no room for any workspace
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cudaerrormemoryallocation",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the CPU's allocator, had no memory left.

    Recognised are `torch.OutOfMemoryError`, and the RuntimeError and `torch.AcceleratorError` variants of CUDA, the
    driver, cuDNN, cuBLAS and the CPU allocator, by their messages.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(message in text for message in _MESSAGES)


def shortage_bytes(message: str) -> int:
    """What was missing by the words of an out-of-memory error: asked for less free; 0 where they do not say."""
    asked = re.search(r"allocate ([\d.]+) (bytes|[KMGT]iB)", message)
    if not asked:
        return 0
    size = float(asked[1]) * _UNITS[asked[2]]
    free = re.search(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", message)
    room = float(free[1]) * _UNITS[free[2]] if free else 0.0
    # under a cap the card may have plenty free: "23.20 GiB allowed; Of the allocated memory 23.03 GiB is allocated"
    cap = re.search(r"([\d.]+) (bytes|[KMGT]iB) allowed; .*?memory ([\d.]+) (bytes|[KMGT]iB) is allocated", message)
    if cap:
        room = min(room, float(cap[1]) * _UNITS[cap[2]] - float(cap[3]) * _UNITS[cap[4]])
    held = re.search(r"budget of ([\d.]+) MiB of which ([\d.]+) MiB are allocated", message)
    if held:
        room = (float(held[1]) - float(held[2])) * 2**20
    return max(0, int(size - room))


class Stateful(Protocol):
    """Anything with the two methods that PyTorch's own parts have."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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


class _Shadow:
    """A copy of tensors, made with a kernel or two for all of them, in memory that is kept for the next time."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._pairs: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def take(self, tensors: list[torch.Tensor]) -> None:
        """Copy `tensors` as they are now."""
        known = self._tensors
        if len(tensors) != len(known) or any(a is not b for a, b in zip(tensors, known, strict=True)):
            kinds: dict[Any, list[torch.Tensor]] = {}
            for tensor in filter(_can_be_written, tensors):
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
            pairs = [(kind, [torch.empty_like(tensor) for tensor in kind]) for kind in kinds.values()]
            self._tensors, self._pairs = tensors, pairs
        with torch.no_grad():
            for originals, copies in self._pairs:
                torch._foreach_copy_(copies, originals)

    def restore(self) -> None:
        """Put back what `take` copied last."""
        with torch.no_grad():
            for originals, copies in self._pairs:
                torch._foreach_copy_(originals, copies)


def _can_be_written(tensor: torch.Tensor) -> bool:
    """Whether PyTorch writes into `tensor` in place; not where one element is shown as several (`expand`)."""
    if tensor.layout is not torch.strided:
        return True
    return all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


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
        self.others = others
        self.zero_grad: Callable[[], None] = lambda: optimizer.zero_grad(set_to_none=True)
        """How gradients are dropped before each try."""
        self._undo_optimizer: Callable[[], None] | None = None
        self._copy_on_host = False
        self._keep_gradients = False
        self._buffers, self._step_counts = _Shadow(), _Shadow()
        self._holders = [module._buffers for module in model.modules()]
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
                if self._undo_optimizer is not None and micro_batch > 1:  # there is room for copies on the device
                    self._copy_on_host = False
                self._undo_optimizer = None
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
                self._undo_optimizer = None
                return tuple(events)
            self._undo_step()
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
            self._copy_on_host = memory.device.type == "cuda"

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
        undo, message = self._try(lambda _: self._remember(), 0)
        if message is None:
            return cast(Callable[[], None], undo)
        self.controller.release_cache()  # nothing has changed yet, so all it takes is room for the copies
        try:
            return self._remember()
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
        self._keep_gradients = keep_gradients
        self._undo_optimizer = None  # of a step that another error ended, or that was taken outside `run`
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
            self._copy_on_host = self.controller.device.type == "cuda"
            if len(events) > 1 and events[-2].micro_batch == 1:
                raise OutOfMemoryForGoodError(self._advice(last, "even one sample does not fit"), events)
        if last.attempt > self.controller.config.max_oom_retries:
            raise OutOfMemoryForGoodError(self._advice(last, f"{last.attempt} tries in a row failed"), events)

    def optimizer_step(self) -> None:
        """Step the optimizer (through the scaler, if any) so that a failure in it can be undone.

        To be the last thing of an attempt: a fused step that has been taken cannot be undone, so an out-of-memory
        error after it ends the training.
        """
        self._undo_optimizer, final = self._remember_optimizer()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if final:
            self._undo_optimizer = _refuse_to_undo

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

    # --- what a step changes

    def _remember(self) -> Callable[[], None]:
        """Keep what forward and backward change; the result puts it back."""
        # the dicts that hold them, since walking the modules costs as much as a small step
        held = [dict(holder) for holder in self._holders]  # a model may put another tensor in the place of a buffer
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]  # a schedule that the attempt steps sets the learning rate
        self._buffers.take([b for holder in [*held, *settings] for b in holder.values() if isinstance(b, torch.Tensor)])
        cpu_rng = torch.get_rng_state()
        device = self.controller.device
        device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        scaler_state = _scaler_state(self.scaler)
        others = [(other, copy.deepcopy(other.state_dict())) for other in self.others]  # else it may be its own tensors

        def undo() -> None:
            self._undo_step()
            self.optimizer.zero_grad(set_to_none=True)
            for holder, buffers in zip(self._holders, held, strict=True):
                holder.clear()  # of those that the failed attempt was the first to make, too
                holder.update(buffers)
            for group, values in zip(self.optimizer.param_groups, settings, strict=False):
                group.update(values)
            self._buffers.restore()
            torch.set_rng_state(cpu_rng)
            if device_rng is not None:
                torch.cuda.set_rng_state(device_rng, device)
            _restore_scaler(self.scaler, scaler_state)
            for other, state in others:
                other.load_state_dict(copy.deepcopy(state))  # an optimizer goes on in the tensors that it is given

        return undo

    def _undo_step(self) -> None:
        if self._undo_optimizer is not None:
            self._undo_optimizer()
            self._undo_optimizer = None

    def _atomic_step_counts(self) -> list[torch.Tensor] | None:
        """The step counts of an optimizer that changes all of a parameter group or nothing of it; None for others.

        That is a fused one, whose step is a kernel for each group, over parameters of one kind.
        """
        groups, state = self.optimizer.param_groups, self.optimizer.state
        alone = steps_alone(self.optimizer, torch.optim.Adagrad)
        if not alone or not all(group.get("fused") for group in groups) or self.scaler is not None:
            return None
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        if len({(p.device, p.dtype) for p in parameters}) != 1 or any(p not in state for p in parameters):
            return None
        return [step for p in parameters if isinstance(step := state[p].get("step"), torch.Tensor)]

    def _remember_optimizer(self) -> tuple[Callable[[], None], bool]:
        """Keep what the optimizer changes, as far as its step can fail half-way.

        Returns:
            What puts it back, and whether it cannot once the step has been taken.
        """
        earlier = [p for group in self.optimizer.param_groups[:-1] for p in group["params"] if p.grad is not None]
        steps = self._atomic_step_counts()
        if steps is not None and not (earlier and self._copy_on_host):
            # after the last group's kernel nothing can fail, so only what those before it change is copied
            copies = _Shadow()
            states = [value for p in earlier for value in self.optimizer.state[p].values()]
            copies.take([*earlier, *(value for value in states if isinstance(value, torch.Tensor) and value.dim())])
            self._step_counts.take(steps)

            def undo_fused() -> None:
                self._step_counts.restore()
                copies.restore()

            return undo_fused, True
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        kept = [(p.data, self._copy(p.data)) for p in parameters]
        if self._keep_gradients and self.scaler is not None:  # it unscales them where they are
            kept += [(p.grad, self._copy(p.grad)) for p in parameters if p.grad is not None]
        fresh = [p for p in parameters if p not in self.optimizer.state]
        holders: list[dict[Any, Any]] = [self.optimizer.state[p] for p in parameters if p in self.optimizer.state]
        holders += self.optimizer.param_groups  # where some count their steps
        held = []
        for holder in holders:
            values = {name: _unshared(value) for name, value in holder.items() if name != "params"}
            tensors = [leaf for value in values.values() for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]
            kept += [(tensor, self._copy(tensor)) for tensor in tensors]
            held.append((holder, values))
        attributes = dict(vars(self.optimizer))

        def undo() -> None:
            # a scaler hands its scale to a fused optimizer in attributes, and a failed step leaves them there
            vars(self.optimizer).clear()
            vars(self.optimizer).update(attributes)
            with torch.no_grad():
                for tensor, copy in kept:
                    tensor.copy_(copy)
            for holder, values in held:
                for name in holder.keys() - values.keys() - {"params"}:
                    del holder[name]
                holder.update(values)
            for parameter in fresh:
                self.optimizer.state.pop(parameter, None)

        return undo, False

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True) if self._copy_on_host else tensor.detach().clone()


def _refuse_to_undo() -> None:
    raise OutOfMemoryForGoodError(
        "out of memory, and the optimizer's step has been taken, which cannot be undone: let guard.optimizer_step() be "
        "the last thing of the attempt, and do what follows it after guard.run"
    )


def _unshared(value: Any) -> Any:
    """`value`, where it is a list or the like as another one with the same contents."""
    return tree_map(lambda leaf: leaf, value) if isinstance(value, (list, tuple, dict)) else value


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(value) if isinstance(value, (list, tuple, dict)) else [value]


def _scaler_state(scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    """A copy of all that a GradScaler holds, without the host sync that its `state_dict` costs."""
    if scaler is None:
        return None
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in vars(scaler).items()
        if name != "_per_optimizer_states"
    }


def _restore_scaler(scaler: torch.amp.GradScaler | None, state: dict[str, Any] | None) -> None:
    if scaler is None or state is None:
        return
    for name, value in state.items():
        # the scale is a tensor that captured graphs may hold: write into it rather than put another in its place
        present = getattr(scaler, name)
        if isinstance(present, torch.Tensor) and isinstance(value, torch.Tensor):
            present.copy_(value)
        else:
            setattr(scaler, name, value)
    scaler._per_optimizer_states.clear()  # which optimizers were unscaled in the failed attempt


def steps_alone(optimizer: torch.optim.Optimizer, *others: type[torch.optim.Optimizer]) -> bool:
    """Whether it is Adam, AdamW, SGD or one of `others` itself, and has no hooks: these, and derived classes, do more
    in a step than is known of it.
    """
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, *others) and not hooks


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of Adam, AdamW or SGD ahead, so that it is there before memory is learned.

    Takes one step with zero gradients, learning rate and weight decay, and sets the state to zero again, which is how
    these three begin. Parameters that have a state are left alone, and so are other optimizers, classes derived from
    these, and one that has hooks, which would take it for a step of the training.
    """
    new = [
        [p for p in group["params"] if p.requires_grad and p not in optimizer.state] for group in optimizer.param_groups
    ]
    parameters = [parameter for group in new for parameter in group]
    if not steps_alone(optimizer) or not parameters:
        return
    if any(group.get("dampening") for group in optimizer.param_groups):
        return  # the first momentum buffer of SGD is the whole gradient, which one from zero would dampen
    settings = [dict(group) for group in optimizer.param_groups]
    grads = [p.grad for p in parameters]
    for group, without in zip(optimizer.param_groups, new, strict=True):
        group["params"] = without
        group["lr"], group["weight_decay"] = group["lr"] * 0.0, 0.0
        if "eps" in group:
            group["eps"] = 1.0  # nothing divided by nothing is no number: with 0, or what 1e-8 is in float16
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor):
                value.zero_()
