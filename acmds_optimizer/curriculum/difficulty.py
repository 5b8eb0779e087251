"""One number a sample: how hard it is for the model, as a moving average of its own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScoreStore:
    """Moving average of each sample's own unsmoothed loss, kept on one device without host syncs.

    A sample's n-th loss enters with the share max(alpha, 1 / n), so that the first few set the average at once.
    Public difficulty is d = 1 - exp(-average): 0 for a sample the model is sure of, near 1 for one it gets wrong.

    Args:
        size: number of samples, n.
        alpha: share of the new loss in the average, in (0, 1].
        device: where the buffers live.
    """

    def __init__(self, size: int, alpha: float = 0.05, device: torch.device | str = "cpu") -> None:
        self.alpha = alpha
        self.average = torch.zeros(size, dtype=torch.float32, device=device)
        self.count = torch.zeros(size, dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return self.average.numel()

    def update(self, indices: Tensor, losses: Tensor) -> None:
        """Enter losses (B,), any float dtype, of the samples at `indices` (B,) int64, each at most once, on the device.

        A loss that is not finite leaves its sample's score as it was.
        """
        losses = losses.detach().to(self.average.dtype)
        average = self.average.index_select(0, indices)
        count = self.count.index_select(0, indices)
        finite = torch.isfinite(losses)
        share = (1.0 / (count + 1)).clamp_min(self.alpha)
        average = torch.where(finite, average + share * (losses - average), average)
        self.average.index_copy_(0, indices, average)
        self.count.index_copy_(0, indices, count + finite.to(count.dtype))

    def difficulty(self, index: int | slice = slice(None)) -> Tensor:
        """(n,) float32 in [0, 1], or those at `index`; 0.5 for a sample not seen yet."""
        return torch.where(self.count[index] > 0, 1.0 - torch.exp(-self.average[index]), 0.5)

    def set_difficulty(self, scores: Tensor) -> None:
        """Start from known difficulties (n,) in [0, 1], as if each sample had been seen once.

        Raises:
            ValueError: another length, or values outside [0, 1].
        """
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.average.device)
        if scores.shape != self.average.shape:
            raise ValueError(f"difficulty_scores has shape {tuple(scores.shape)}, expected ({len(self)},)")
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ValueError("difficulty_scores must lie in [0, 1]")
        self.average = -torch.log1p(-scores.clamp_max(1.0 - 1e-6))
        self.count = torch.ones_like(self.count)

    def to(self, device: torch.device | str) -> ScoreStore:
        """Move the buffers; returns self."""
        self.average = self.average.to(device)
        self.count = self.count.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: it belongs to a data set of another size.
        """
        if state["average"].shape != self.average.shape:
            raise ValueError(f"scores of {state['average'].numel()} samples do not fit a data set of {len(self)}")
        self.average.copy_(state["average"])
        self.count.copy_(state["count"])
