"""The validation loop, and which epoch was the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from acmds_optimizer.engine.batches import DataSource
from acmds_optimizer.engine.distributed import Ranks, naming_failures
from acmds_optimizer.engine.prepare import evaluating
from acmds_optimizer.errors import OutOfMemoryForGoodError, first_line
from acmds_optimizer.memory.controller import MemoryPressureController
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from torchmetrics import Metric


class Best:
    """Which epoch's validation was the best so far.

    Args:
        metric: name of the figure; a loss is better lower, all else higher.
        patience: epochs without a better one after which it is `exhausted`; None: never.
    """

    def __init__(self, metric: str = "val_accuracy", patience: int | None = None) -> None:
        self.metric = metric
        self.patience = patience
        self.value: float | None = None
        self.epoch: int | None = None
        self.epochs_since = 0

    def update(self, figures: Mapping[str, float], epoch: int) -> bool:
        """Enter the figures of an epoch, by its number from 1; whether it is the best so far."""
        value = figures.get(self.metric)
        if value is None:
            return False
        sign = -1 if self.metric.endswith("loss") else 1
        better = not math.isnan(value) and (self.value is None or sign * value > sign * self.value)
        if better:
            self.value, self.epoch, self.epochs_since = value, epoch, 0
        else:
            self.epochs_since += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop early."""
        return self.patience is not None and self.epochs_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "epoch": self.epoch, "epochs_since": self.epochs_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; with another metric, from the start."""
        if state["metric"] == self.metric:
            self.value, self.epoch, self.epochs_since = state["value"], state["epoch"], state["epochs_since"]


def evaluate(
    model: nn.Module,
    forward: Callable[[nn.Module, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    source: DataSource,
    controller: MemoryPressureController,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """val_loss (mean) and val_accuracy, val_top5 (fractions; the latter where there are more than 5 classes).

    An out-of-memory error halves the batch and starts over; nothing is lost, since nothing changes.

    Args:
        model: put into evaluation mode meanwhile.
        forward: (model, inputs) -> logits (B, C) float32.
        loss_fn: (logits, targets (B,)) -> losses (B,), unreduced.
        source: the validation set.
        controller: where to begin is its batch size, or the largest it may have where no step was taken yet; its
            memory is watched.
        ranks: the processes that validate a part each; None: this one alone. The figures are those of all.

    Raises:
        OutOfMemoryForGoodError: not even one sample fits.
    """
    batch = controller.batch_size if controller.state.peaks.known else controller.limits.buckets[-1]
    while True:
        try:
            with controller.memory.watch(), torch.no_grad():
                metrics = _evaluate(model, forward, loss_fn, source, ranks or Ranks(), batch)
                break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        if batch == 1:
            raise OutOfMemoryForGoodError(f"out of memory: not one sample can be validated. {message}")
        batch = max(1, batch // 2)
        controller.memory.release_cache()
    with naming_failures():
        return {name: float(metric.compute()) for name, metric in metrics.items()}


def _evaluate(
    model: nn.Module,
    forward: Callable[[nn.Module, Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    source: DataSource,
    ranks: Ranks,
    batch_size: int,
) -> dict[str, Metric]:
    """The figures of this process's part, to be computed, which joins those of all."""
    from torchmetrics import MeanMetric  # takes two seconds, and not every run validates
    from torchmetrics.classification import MulticlassAccuracy

    metrics: dict[str, Metric] = {}
    with evaluating(model):
        order = np.arange(len(source))
        together = len(order) >= ranks.world_size > 1
        if together:
            order = order[ranks.rank :: ranks.world_size]
        with source.stream(order, epoch=0) as stream:
            while stream.remaining:
                batch = stream.take(batch_size)
                logits = forward(model, batch.inputs)
                if not metrics:
                    classes = logits.shape[-1]
                    # neither checks its input: a check would wait for the device
                    loss = MeanMetric(nan_strategy="disable", sync_on_compute=together)
                    metrics["val_loss"] = loss.set_dtype(torch.float64)
                    for name, k in (("val_accuracy", 1), ("val_top5", 5)):
                        if k < classes:
                            metrics[name] = MulticlassAccuracy(
                                classes, top_k=k, average="micro", validate_args=False, sync_on_compute=together
                            )
                    for metric in metrics.values():
                        metric.to(logits.device)
                for name, metric in metrics.items():
                    if name == "val_loss":
                        metric.update(loss_fn(logits, batch.targets))
                    else:
                        metric.update(logits, batch.targets)
    return metrics
