"""The learning rate: a function of the share of the training that is done, and for `plateau` of the validation loss."""

from __future__ import annotations

import math
from typing import Any

import torch

from acmds_optimizer.config import CurriculumConfig, TrainConfig

WARMUP_FRACTION = 0.05
ONE_CYCLE_WARMUP_FRACTION = 0.3
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 1e4
"""As in torch.optim.lr_scheduler.OneCycleLR: pct_start, div_factor and final_div_factor. Momentum is left alone."""


def schedule_factor(config: TrainConfig, progress: float) -> float:
    """Factor on the peak learning rate at `progress`, the share of the training that is done, in [0, 1].

    All rise over `warmup_fraction` first (linearly; one_cycle along a cosine from 1/25). Then `cosine` and `one_cycle`
    fall along half a cosine to 0 and 4e-6, `linear` along a line to 0, `step` by `lr_decay_factor` every
    `lr_decay_epochs`; `constant` stays, and so does `plateau`, whose drops are those of `Plateau`.
    """
    one_cycle = config.lr_schedule == "one_cycle"
    warmup = config.warmup_fraction
    if warmup is None:
        warmup = ONE_CYCLE_WARMUP_FRACTION if one_cycle else WARMUP_FRACTION
    if progress < warmup:
        risen = progress / warmup
        return _cosine(ONE_CYCLE_START, 1.0, risen) if one_cycle else max(risen, 1e-3)
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    if config.lr_schedule == "cosine":
        return _cosine(1.0, 0.0, done)
    if one_cycle:
        return _cosine(1.0, ONE_CYCLE_END, done)
    if config.lr_schedule == "linear":
        return 1.0 - done
    if config.lr_schedule == "step":
        epochs = config.lr_decay_epochs or config.epochs / 3
        return config.lr_decay_factor ** int(min(progress, 1.0 - 1e-9) * config.epochs / epochs + 1e-9)
    return 1.0


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


class LearningRate:
    """Sets the learning rate of every parameter group before a step.

    Args:
        optimizer: its groups' learning rates are the peaks, also those of groups that are added later.
        config: a TrainConfig for its schedule; else the rates stay as they are, or as others set them between steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: CurriculumConfig) -> None:
        self.optimizer = optimizer
        self.config = config
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._last_lrs, self._factor = list(self.base_lrs), 1.0
        self.drops = 0
        self.best_loss = math.inf
        self.epochs_since_best = 0

    def set(self, progress: float, batch: float) -> float:
        """Set the rates for a step of `batch` samples at `progress` in [0, 1]; that of the first group.

        Of several processes `batch` is the mean, so that lr is the rate of the largest step of all together.
        """
        config = self.config
        self._follow()
        factor = 1.0
        if isinstance(config, TrainConfig):
            factor = schedule_factor(config, progress) * config.lr_decay_factor**self.drops
        if config.batch_policy == "free" and config.lr_scaling != "none":
            power = {"linear": 1.0, "sqrt": 0.5}[config.lr_scaling]
            factor *= min(1.0, batch / config.max_batch_size) ** power
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        self._last_lrs, self._factor = [base * factor for base in self.base_lrs], factor
        return self._last_lrs[0]

    def _follow(self) -> None:
        """Take over the rates of new groups, and without a schedule those that others have set since the last step."""
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        if not isinstance(self.config, TrainConfig):
            for number, (lr, last) in enumerate(zip(lrs, self._last_lrs, strict=False)):
                if lr != last:
                    self.base_lrs[number] = lr / self._factor
        self.base_lrs += lrs[len(self.base_lrs) :]

    def end_epoch(self, loss: float) -> None:
        """Enter the validation loss of an epoch (the training loss without validation), for `plateau`.

        The rate drops once as many epochs in a row as `lr_decay_epochs` (rounded up) were not better than the best one,
        and then after as many again.
        """
        config = self.config
        if not isinstance(config, TrainConfig) or config.lr_schedule != "plateau":
            return
        if loss < self.best_loss:
            self.best_loss, self.epochs_since_best = loss, 0
            return
        self.epochs_since_best += 1
        if self.epochs_since_best >= (config.lr_decay_epochs or config.epochs / 10):
            self.drops += 1
            self.epochs_since_best = 0

    def state_dict(self) -> dict[str, Any]:
        self._follow()
        return {
            "base_lrs": list(self.base_lrs),
            "drops": self.drops,
            "best_loss": self.best_loss,
            "epochs_since_best": self.epochs_since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; the optimizer has to be loaded before."""
        self.base_lrs = list(state["base_lrs"])
        self._last_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.drops = state["drops"]
        self.best_loss, self.epochs_since_best = state["best_loss"], state["epochs_since_best"]
