"""Augmentations beside crops and flips: cutout on the device, and torchvision's policies in the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

POLICIES: dict[str, type[v2.Transform]] = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
"""By their names in the configuration: Mueller and Hutter, 2021; Cubuk et al., 2020 (2 operations of magnitude 9)."""


@dataclass(frozen=True)
class Cutouts:
    """One square for each sample of an epoch, by position in its order, set to zero: the mean of normalised images.

    The square may lie partly outside (DeVries and Taylor, 2017).

    rows, columns: (m,) int16 on the device, where its centre is; side: pixels.
    """

    rows: Tensor
    columns: Tensor
    side: int

    @classmethod
    def draw(
        cls,
        count: int,
        shape: tuple[int, ...],
        fraction: float,
        seed: int,
        device: torch.device,
        positions: np.ndarray | None = None,
    ) -> Cutouts:
        """The same for the same (count, shape, seed), on every device.

        Args:
            count: samples of the epoch.
            shape: (C, H, W) of one input.
            fraction: side as a share of the smaller side of the image, in (0, 1].
            seed: of this epoch.
            device: where inputs are.
            positions: (k,) int64, of those samples only; None: of all.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, shape[1], (count,), generator=generator, dtype=torch.int16)
        columns = torch.randint(0, shape[2], (count,), generator=generator, dtype=torch.int16)
        if positions is not None:
            rows, columns = rows[torch.from_numpy(positions)], columns[torch.from_numpy(positions)]
        return cls(rows.to(device), columns.to(device), max(1, round(min(shape[1:]) * fraction)))

    def apply(self, inputs: Tensor, start: int) -> None:
        """Cut, in place, `inputs` (n, C, H, W): the samples from position `start` on."""
        count, _, height, width = inputs.shape
        inside = []
        for centres, size in ((self.rows, height), (self.columns, width)):
            low = centres[start : start + count, None] - self.side // 2
            at = torch.arange(size, device=inputs.device)
            inside.append((at >= low) & (at < low + self.side))
        inputs.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0.0)
