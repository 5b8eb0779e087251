"""Augmentations beside crops and flips: cutout on the device, and torchvision's policies in the workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

POLICIES: dict[str, type[v2.Transform]] = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}
"""By their names in the configuration: Mueller and Hutter, 2021; Cubuk et al., 2020 (2 operations of magnitude 9)."""


def scaled(pixels: Tensor, side: int, full: int) -> Tensor:
    """Whole numbers of pixels of an image with `full` of them a side, in one with `side`."""
    return pixels if side == full else (pixels * (side / full)).round().to(pixels.dtype)


@dataclass(frozen=True)
class Cutouts:
    """One square for each sample of an epoch, by position in its order, set to zero: the mean of normalised images.

    The square may lie partly outside (DeVries and Taylor, 2017).

    rows, columns: (m,) int16 on the device, where its centre is; side: pixels; size: (height, width) of the images that
    they are meant for.
    """

    rows: Tensor
    columns: Tensor
    side: int
    size: tuple[int, int]

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
        side = max(1, round(min(shape[1:]) * fraction))
        return cls(rows.to(device), columns.to(device), side, (shape[1], shape[2]))

    def apply(self, inputs: Tensor, start: int) -> None:
        """Cut, in place, `inputs` (n, C, H, W): the samples from position `start` on. Smaller ones lose less."""
        inside = []
        for centres, size, full in zip((self.rows, self.columns), inputs.shape[2:], self.size, strict=True):
            side = max(1, round(self.side * size / full))
            low = scaled(centres[start : start + len(inputs), None], size, full) - side // 2
            at = torch.arange(size, device=inputs.device)
            inside.append((at >= low) & (at < low + side))
        inputs.masked_fill_(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0.0)
