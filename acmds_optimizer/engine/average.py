"""A running average of the weights, which often generalises better than the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """Exponential moving average of a model's parameters and buffers, on their device.

    The decay warms up as (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that short runs do not
    average over their first weights. An update is made after a guarded step has gone through; it works in place and
    allocates nothing, so it cannot run out of memory.

    Args:
        model: copied as it is now, before anything is hooked into its forward.
        decay: share of the old average that a step keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.module.requires_grad_(False).eval()
        self.decay = decay
        self._averages: list[Tensor] = []
        self._values: list[Tensor] = []
        self._counters: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._holding: list[dict[str, Tensor | None]] = []
        self._present: list[Tensor] = []

    def update_parameters(self, model: nn.Module, steps: float = 1.0) -> None:
        """Enter the weights of `model`, always the same one; the first time they are copied.

        Args:
            model: the one that is trained.
            steps: how many optimizer steps' worth of samples this update stands for.
        """
        if not self._averages:  # once: to walk through a model takes longer than the kernel that averages it
            self._averages, self._counters = _tensors(self.module)
            self._holding = [module._buffers for module in model.modules()]
        buffers = [buffer for holder in self._holding for buffer in holder.values() if buffer is not None]
        same = len(buffers) == len(self._present) and all(a is b for a, b in zip(buffers, self._present, strict=True))
        if not self._values or not same:  # a model may put another tensor in the place of a buffer
            self._present = buffers
            self._values, self._counts = _tensors(model)
        count = int(self.n_averaged)
        share = 1.0 if count == 0 else 1.0 - min(self.decay, (1 + count) / (10 + count)) ** steps
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._values, share)
            if self._counters:
                torch._foreach_copy_(self._counters, self._counts)
        self.n_averaged += 1


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What is averaged, and what is copied: such as BatchNorm's count of batches."""
    everything = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    return [t for t in everything if t.is_floating_point()], [t for t in everything if not t.is_floating_point()]
