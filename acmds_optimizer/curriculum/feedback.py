"""What a step tells the curriculum: the scores of its samples, and what the noise gate watches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.curriculum.difficulty import ScoreStore
from acmds_optimizer.curriculum.gate import NoiseGate
from acmds_optimizer.curriculum.scoring import Forgetting, is_score_file, loss, make_scoring, read_scores


class Feedback:
    """Enters each step into the score store and the noise gate, on the device and without a host sync.

    Args:
        scores: of the data set; moved to the device.
        config: scoring, noise_rate, noise_action and direction are used.
        device: where the training runs.
        num_classes: for the check of a foreign scoring function; None: not known.

    Raises:
        ConfigError: a scoring function or a file of scores that cannot be used.
    """

    def __init__(
        self, scores: ScoreStore, config: CurriculumConfig, device: torch.device, num_classes: int | None
    ) -> None:
        self.scores = scores.to(device)
        self.scoring = make_scoring(config.scoring, len(scores), device, num_classes)
        if is_score_file(config.scoring):
            scores.set_difficulty(read_scores(config.scoring, len(scores)))
        if isinstance(self.scoring, Forgetting):
            scores.alpha = 1.0
        rate = config.gate_rate
        self.gate = NoiseGate(len(scores), rate, device) if rate != 0 else None
        self._relabels = config.noise_action == "relabel"

    @property
    def needs_logits(self) -> bool:
        return self.gate is not None or self.scoring not in (None, loss)

    @property
    def flagged(self) -> NDArray[np.bool_] | None:
        """(n,) samples whose labels are suspected; None while the gate has not fired, or without one."""
        return self.gate.flagged if self.gate is not None and self.gate.fired else None

    @property
    def ignored(self) -> NDArray[np.bool_] | None:
        """(n,) samples that count nothing; None: all count."""
        return None if self._relabels else self.flagged

    @property
    def guesses(self) -> Tensor | None:
        """(n,) int64 classes that samples learn in place of their own, -1 where there is none; None: none does."""
        return self.gate.guesses if self.gate is not None and self.gate.fired and self._relabels else None

    def losses(self, outcome: Tensor) -> Tensor:
        """The losses (B,) in what a step gave: they alone, or with `needs_logits` losses and logits (B, 1 + C)."""
        return outcome[:, 0] if self.needs_logits else outcome

    def update(self, indices: Tensor, targets: Tensor | None, outcome: Tensor, epoch: int) -> None:
        """Enter one step, or several of one epoch.

        Args:
            indices: (B,) int64, each at most once.
            targets: (B,) int64; None only without `needs_logits`.
            outcome: as in `losses`.
            epoch: number of the epoch.
        """
        losses = self.losses(outcome)
        if targets is None or not self.needs_logits:
            if self.scoring is not None:
                self.scores.update(indices, losses)
            return
        logits = outcome[:, 1:]
        if self.scoring is not None:
            self.scores.update(indices, self.scoring(logits, targets, losses, indices, epoch))
        if self.gate is not None:
            self.gate.update(indices, targets, logits, losses)

    def end_epoch(self, progress: float) -> bool:
        """Judge after an epoch; whether the noise gate fired just now."""
        return self.gate is not None and self.gate.end_epoch(progress)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"scores": self.scores.state_dict()}
        if self.gate is not None:
            state["gate"] = self.gate.state_dict()
        if callable(save := getattr(self.scoring, "state_dict", None)):
            state["scoring"] = save()
        return state

    def load_state_dict(self, state: dict[str, Any], *, with_scores: bool = True) -> None:
        """Continue from `state_dict()`; parts that were not there before start afresh.

        Args:
            state: what to continue from.
            with_scores: whether its scores are those of the scoring function that is in use now.

        Raises:
            ValueError: it belongs to a data set of another size.
        """
        if with_scores:
            self.scores.load_state_dict(state["scores"])
            if callable(load := getattr(self.scoring, "load_state_dict", None)) and "scoring" in state:
                load(state["scoring"])
        if self.gate is not None and "gate" in state:
            self.gate.load_state_dict(state["gate"])
