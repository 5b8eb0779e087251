"""Whether a step does no more than the kernels that it launches, so that a CUDA graph may replay it.

A replay runs no Python: what a model or an optimizer does there would be left out of it.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acmds_optimizer.memory.undo import steps_alone

_PLAIN = (bool, int, float, str)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_OF_TORCH = frozenset(vars(nn.Module()))
_DEEPEST, _LONGEST = 4, 10_000
"""Levels and entries of a container that are looked at for what a step has changed there."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_attributes(modules: list[nn.Module]) -> list[tuple[str, Any]]:
    """The plain attributes of modules, such as a rate of dropout, and what is in their lists, sets and dicts."""
    return [
        (name, _contents(value))
        for each in modules
        for name, value in vars(each).items()
        if isinstance(value, _PLAIN) or (isinstance(value, _CONTAINERS) and name not in _OF_TORCH)
    ]


def _contents(value: Any, depth: int = 0) -> Any:
    """What can be compared with the same later; of anything but plain values and short containers only its id."""
    if isinstance(value, _PLAIN):
        return value
    if not isinstance(value, _CONTAINERS) or depth == _DEEPEST or len(value) > _LONGEST:
        return id(value), len(value) if isinstance(value, _CONTAINERS) else 0
    parts = chain.from_iterable(value.items()) if isinstance(value, dict) else value
    return type(value), [_contents(part, depth + 1) for part in parts]


class Beside:
    """What a step's Python may read or change besides launching kernels; a graph has it as it was, and changes nothing.

    Attributes:
        attributes: plain ones of the modules of model and loss, and their containers.
        tensors: those that modules keep, other than parameters.
        chance: the state of the host's random numbers.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.attributes = plain_attributes(modules)
        # what torch's hooks keep is made anew from parameters before each use
        own = [module for module in modules if not any(getattr(module, kind, None) for kind in _HOOKS)]
        values = [value for module in own for value in (*vars(module).values(), *module._buffers.values())]
        self.tensors = [value for value in values if isinstance(value, Tensor)]
        states = (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy())  # noqa: NPY002
        self.chance = pickle.dumps(states)

    def changed(self, after: Beside) -> str:
        """What a step has changed; empty where nothing."""
        if self.chance != after.chance:
            return "it draws random numbers on the host"
        if self.attributes != after.attributes:
            return "it changes an attribute"
        if list(map(id, self.tensors)) != list(map(id, after.tensors)):
            return "it puts another tensor in the place of one that it keeps"
        return ""


def skipped(model: nn.Module) -> str:
    """What the model does in Python besides its layers, which a replay would skip; empty where there is nothing.

    Hooks of torch.nn.utils, such as of spectral_norm, compute on the device, and so are in the graph.
    """
    for name, module in model.named_modules():
        for hook in (hook for kind in _HOOKS for hook in getattr(module, kind, {}).values()):
            if not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils."):
                return f"{name or 'the model'} has a hook, which a replay would not call"
    return ""


def can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is fused, so that its step is a few kernels without a look at the host, and nothing beside them."""
    return steps_alone(optimizer) and all(group.get("fused") for group in optimizer.param_groups)


def fixed_settings(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a captured step has fixed: the groups' settings but the learning rate, and the state's tensors."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found += [value for name, value in group.items() if name not in ("params", "lr")]
        found += [id(value) for value in optimizer.state.get(group["params"][0], {}).values()]
    return found
