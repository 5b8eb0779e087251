"""The order of an epoch: a pure function of scores, progress and seed; and a batch sampler around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.curriculum.dataset import DifficultyAwareDataset
from acmds_optimizer.curriculum.pacing import admitted_share
from acmds_optimizer.memory.controller import MemoryPressureController


@dataclass(frozen=True)
class EpochPlan:
    """Which samples an epoch feeds, in order, and what each counts."""

    order: NDArray[np.int64]
    """(m,) indices, each at most once."""
    weights: NDArray[np.float32]
    """(m,) one over the probability that the sample was included, so that the expected gradient sum is the full one."""


def plan_epoch(
    difficulty: NDArray[np.floating[Any]],
    epoch: int,
    share: float,
    config: CurriculumConfig,
    flagged: NDArray[np.bool_] | None = None,
) -> EpochPlan:
    """Draw the samples of one epoch without replacement.

    The `share` of the samples that comes first in `config.direction` is fed in full. Of the others, one of
    `coverage_epochs` fixed random groups takes part in turn, with that weight: each of them is included with
    probability 1 / coverage_epochs, and none is unseen for that many epochs. The direction `matched` instead takes as
    many samples as that, those that the shuffle puts first, with weight 1.

    Args:
        difficulty: (n,) scores in [0, 1].
        epoch: number of the epoch, from 0.
        share: admitted share in (0, 1].
        config: direction, coverage_epochs and seed are used.
        flagged: (n,) samples that are fed with weight 0, so that their scores stay fresh; the weights of the others
            grow to the same sum. None: none.

    Returns:
        The plan. With direction none or auto, or a share of 1, its order is the plain shuffle of that seed and epoch.
    """
    plan = _paced(difficulty, epoch, share, config)
    if flagged is None or not flagged.any():
        return plan
    kept = np.where(flagged[plan.order], np.float32(0.0), plan.weights)
    total = float(kept.sum(dtype=np.float64))
    scale = float(plan.weights.sum(dtype=np.float64)) / total if total else 0.0
    return EpochPlan(plan.order, (kept * scale).astype(np.float32))


def _paced(difficulty: NDArray[np.floating[Any]], epoch: int, share: float, config: CurriculumConfig) -> EpochPlan:
    size = len(difficulty)
    order = np.random.default_rng((config.seed, epoch)).permutation(size)
    admitted = min(size, math.ceil(share * size))
    if config.direction in ("none", "auto") or admitted == size:
        return EpochPlan(order, np.ones(size, dtype=np.float32))
    if config.direction == "matched":
        count = admitted + round((size - admitted) / config.coverage_epochs)
        return EpochPlan(order[:count], np.ones(count, dtype=np.float32))
    if config.direction == "random":
        ranked = np.random.default_rng((config.seed, epoch, 1)).permutation(size)
    else:
        # ranking a shuffled list with a stable sort breaks ties at random
        key = difficulty[order] if config.direction == "easy" else -difficulty[order]
        ranked = order[np.argsort(key, kind="stable")]
    group = np.random.default_rng((config.seed,)).permutation(size) % config.coverage_epochs
    weights = np.where(group == epoch % config.coverage_epochs, np.float32(config.coverage_epochs), np.float32(0.0))
    weights[ranked[:admitted]] = 1.0
    kept = order[weights[order] > 0]
    return EpochPlan(kept, weights[kept].astype(np.float32))


class AdaptiveCurriculumSampler(Sampler[list[int]]):
    """A batch sampler whose order follows the curriculum and whose batches follow memory.

    Yields lists of indices: of the effective batch with batch_policy hold, of the controller's present size with
    free. The last list of an epoch may be shorter, and the epoch ends. With a `direction` samples have weights:
    `plan.weights`, in the order of `plan.order`.

    Args:
        dataset: its difficulties order the samples.
        memory_controller: its batch size is read before each list.
        config: curriculum settings.
        total_epochs: length of the training, for the pacing.
    """

    def __init__(
        self,
        dataset: DifficultyAwareDataset,
        memory_controller: MemoryPressureController,
        config: CurriculumConfig | None = None,
        *,
        total_epochs: int = 10,
    ) -> None:
        self.dataset = dataset
        self.memory_controller = memory_controller
        self.config = config or memory_controller.config
        self.total_epochs = total_epochs
        self.position = 0
        """Samples of this epoch that have been handed out."""
        self.flagged: NDArray[np.bool_] | None = None
        """(n,) samples that the next planned epochs feed with weight 0; None: none."""
        self._resumed = False
        self.set_epoch(0)

    def set_epoch(self, epoch: int, progress: float | None = None) -> None:
        """Plan this epoch from the present difficulties.

        Args:
            epoch: number of the epoch, from 0.
            progress: share of the training that is done; None: epoch / total_epochs.
        """
        self.epoch = epoch
        self.progress = min(1.0, epoch / self.total_epochs) if progress is None else progress
        self.share = admitted_share(
            self.config.pacing, self.progress, self.config.start_fraction, self.config.pacing_end_fraction
        )
        difficulty = self.dataset.difficulty_scores.cpu().numpy()
        self.plan = plan_epoch(difficulty, epoch, self.share, self.config, self.flagged)
        self.position = 0

    @property
    def num_samples(self) -> int:
        """Samples of this epoch."""
        return len(self.plan.order)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumed:
            self.position = 0
        self._resumed = False
        while self.position < self.num_samples:
            hold = self.config.batch_policy == "hold"
            size = self.config.step_samples if hold else self.memory_controller.batch_size
            batch = self.plan.order[self.position : self.position + size].tolist()
            self.position += len(batch)
            yield batch

    def __len__(self) -> int:
        if self.config.batch_policy == "free":
            raise TypeError("with batch_policy free the number of batches is not known ahead; see num_samples")
        begun = self.position if self._resumed else 0
        return math.ceil((self.num_samples - begun) / self.config.step_samples)

    def state_dict(self, trained: int | None = None) -> dict[str, Any]:
        """The plan and the position in it, so that an epoch can be resumed in its middle.

        Args:
            trained: samples of this epoch that have been trained on; None: all that have been handed out. With workers
                a DataLoader asks for batches ahead, which would be lost.
        """
        return {
            "epoch": self.epoch,
            "progress": self.progress,
            "position": self.position if trained is None else trained,
            "order": torch.from_numpy(self.plan.order),
            "weights": torch.from_numpy(self.plan.weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`: the next iteration starts at its position."""
        self.set_epoch(state["epoch"], state["progress"])
        self.plan = EpochPlan(state["order"].numpy(), state["weights"].numpy())
        self.position = state["position"]
        self._resumed = True
