"""What one optimizer step changes, kept so that it can be put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map


class Stateful(Protocol):
    """Anything with the two methods that PyTorch's own parts have."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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


class StepUndo:
    """Keeps what a step changes and puts it back: buffers, random numbers, the optimizer, its scaler, others.

    Args:
        model: buffers of the modules that it has now are kept.
        optimizer: as `Guard` says.
        scaler: an enabled GradScaler whose state belongs to the step; None: none.
        others: anything else that a step changes.
        device: whose random numbers are kept beside those of the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        others: tuple[Stateful, ...],
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.others = others
        self.device = device
        self.copy_on_host = False
        """Whether the optimizer's tensors are copied to the host, where there is no room for it on the device."""
        self.keep_gradients = False
        """Whether gradients that the step changes are kept, too."""
        self.of_optimizer: Callable[[], None] | None = None
        """Puts back what the optimizer has changed since `remember_optimizer`."""
        self._buffers, self._step_counts = _Shadow(), _Shadow()
        self._holders = [module._buffers for module in model.modules()]

    def remember(self) -> Callable[[], None]:
        """Keep what forward and backward change; the result puts it back."""
        # the dicts that hold them, since walking the modules costs as much as a small step
        held = [dict(holder) for holder in self._holders]  # a model may put another tensor in the place of a buffer
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]  # a schedule that the attempt steps sets the learning rate
        self._buffers.take([b for holder in [*held, *settings] for b in holder.values() if isinstance(b, torch.Tensor)])
        cpu_rng = torch.get_rng_state()
        device = self.device
        device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        scaler_state = _scaler_state(self.scaler)
        others = [(other, copy.deepcopy(other.state_dict())) for other in self.others]  # else it may be its own tensors

        def undo() -> None:
            self.undo_optimizer()
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

    def undo_optimizer(self) -> None:
        """Put back what the optimizer has changed, if it was remembered."""
        if self.of_optimizer is not None:
            self.of_optimizer()
            self.of_optimizer = None

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

    def remember_optimizer(self) -> bool:
        """Keep what the optimizer changes, as far as its step can fail half-way, in `of_optimizer`.

        Returns:
            Whether that cannot put it back once the step has been taken.
        """
        earlier = [p for group in self.optimizer.param_groups[:-1] for p in group["params"] if p.grad is not None]
        steps = self._atomic_step_counts()
        if steps is not None and not (earlier and self.copy_on_host):
            # after the last group's kernel nothing can fail, so only what those before it change is copied
            copies = _Shadow()
            states = [value for p in earlier for value in self.optimizer.state[p].values()]
            copies.take([*earlier, *(value for value in states if isinstance(value, torch.Tensor) and value.dim())])
            self._step_counts.take(steps)

            def undo_fused() -> None:
                self._step_counts.restore()
                copies.restore()

            self.of_optimizer = undo_fused
            return True
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        kept = [(p.data, self._copy(p.data)) for p in parameters]
        if self.keep_gradients and self.scaler is not None:  # it unscales them where they are
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

        self.of_optimizer = undo
        return False

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True) if self.copy_on_host else tensor.detach().clone()


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
