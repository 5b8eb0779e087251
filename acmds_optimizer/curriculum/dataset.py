"""A data set whose samples carry their difficulty, their cost in memory and their index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from acmds_optimizer.curriculum.difficulty import ScoreStore


class DifficultyAwareDataset(Dataset[dict[str, Any]]):
    """Wraps a map-style data set; an item is a dict with data, difficulty, memory_cost and index.

    Args:
        base_dataset: n samples; `data` of an item is what it returns, unchanged.
        difficulty_scores: (n,) in [0, 1] to start from; None: not known, 0.5.
        memory_costs: (n,) above 0, a sample's size relative to the usual one; None: ones.
        alpha: share of a new loss in the moving average behind the difficulty.

    Raises:
        ValueError: scores or costs of another length or range.
    """

    def __init__(
        self,
        base_dataset: Dataset[Any],
        difficulty_scores: Any = None,
        *,
        memory_costs: Any = None,
        alpha: float = 0.05,
    ) -> None:
        self.base_dataset = base_dataset
        size = len(base_dataset)  # type: ignore[arg-type]
        self.scores = ScoreStore(size, alpha)
        if difficulty_scores is not None:
            self.scores.set_difficulty(difficulty_scores)
        self.memory_costs = torch.ones(size) if memory_costs is None else torch.as_tensor(memory_costs).float()
        if self.memory_costs.shape != (size,) or not bool((self.memory_costs > 0).all()):
            raise ValueError(f"memory_costs must be ({size},) and above 0")

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return {
            "data": self.base_dataset[index],
            "difficulty": self.scores.difficulty(index),
            "memory_cost": self.memory_costs[index],
            "index": index,
        }

    @property
    def difficulty_scores(self) -> Tensor:
        """(n,) float32 in [0, 1], where the scores live."""
        return self.scores.difficulty()

    def update_difficulties(self, indices: Tensor, losses: Tensor) -> None:
        """Enter new unreduced losses (B,) of the samples at `indices` (B,) int64."""
        device = self.scores.average.device
        indices = torch.as_tensor(indices, dtype=torch.int64, device=device)
        self.scores.update(indices, torch.as_tensor(losses, device=device))
