"""Losses on their way into the score store."""

from __future__ import annotations

import torch
from torch import Tensor

from acmds_optimizer.curriculum.feedback import Feedback
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.distributed import Ranks

_STEPS = 64
_NUMBERS = 2**20
_CLASSES_IF_UNKNOWN = 1000


class PendingScores:
    """What the last steps found, entered together: a dozen small kernels for each step would cost as much as a graph.

    Args:
        feedback: where it goes.
        ranks: the processes that train together; all enter what all have found.
        num_classes: of the data; None: not known.
    """

    def __init__(self, feedback: Feedback, ranks: Ranks, num_classes: int | None) -> None:
        self._feedback = feedback
        self._ranks = ranks
        self._width = 1 + (num_classes or _CLASSES_IF_UNKNOWN) if feedback.needs_logits else 1
        self._steps: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._most_steps = 1
        """The first step's are entered alone: as in the recorder, kernels are to be loaded at the start."""

    def add(self, batch: Batch, outcomes: Tensor, total: int, epoch: int) -> None:
        """Keep what a step found.

        Args:
            batch: its samples in this process.
            outcomes: (n,) their losses, or (n, 1 + C) losses and logits.
            total: its samples in all processes, so that all enter together.
            epoch: its epoch.
        """
        self._steps.append((batch.indices, batch.targets if self._feedback.needs_logits else None, outcomes))
        if len(self._steps) >= self._most_steps or len(self._steps) * total * self._width >= _NUMBERS:
            self.enter(epoch)

    def drop(self) -> None:
        """Forget what is pending."""
        self._steps.clear()

    def enter(self, epoch: int) -> None:
        """Enter all that is pending."""
        if self._steps:
            indices, targets, outcomes = zip(*self._steps, strict=True)
            self._steps.clear()
            self._most_steps = _STEPS
            everywhere = self._ranks.concatenate
            labels = everywhere(torch.cat(targets)) if self._feedback.needs_logits else None
            self._feedback.update(everywhere(torch.cat(indices)), labels, everywhere(torch.cat(outcomes)), epoch)
