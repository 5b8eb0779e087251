"""What the loop asks of its data: batches of any size, cut from an epoch's order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from acmds_optimizer.engine.augment import Cutouts


@dataclass(frozen=True)
class Batch:
    """Samples on the device.

    Attributes:
        inputs: (n, C, H, W) float32, normalised (float data: (n, ...) as it came).
        targets: (n,) int64 class numbers.
        indices: (n,) int64, which samples of the data set.
        weights: (n,) float32, how much each counts in the loss.
        soft: (n, classes) float32, targets of samples that are mixed with others; None: nothing is mixed.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    weights: Tensor
    soft: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def slice(self, start: int, stop: int) -> Batch:
        """Samples start to stop, as views."""
        if start == 0 and stop == len(self):
            return self
        soft = None if self.soft is None else self.soft[start:stop]
        return Batch(
            self.inputs[start:stop], self.targets[start:stop], self.indices[start:stop], self.weights[start:stop], soft
        )


def near_equal(total: int, count: int) -> list[int]:
    """`count` sizes that add up to `total` and differ by one at most, the larger ones first."""
    size, longer = divmod(total, max(1, count))
    return [size + 1] * longer + [size] * (count - longer)


class EpochStream(ABC):
    """One epoch's samples, in order. Usable as a context manager.

    Attributes:
        order: (m,) int64, the whole epoch's data set indices, on the device.
        weights: (m,) float32, on the device.
        position: samples taken so far, those before `start` included.
        cutouts: squares to cut out of the inputs; None: none.
    """

    def __init__(self, order: np.ndarray, weights: np.ndarray | None, start: int, device: torch.device) -> None:
        if not 0 <= start <= len(order):
            raise ValueError(f"start {start} lies outside the epoch's {len(order)} samples")
        if weights is not None and len(weights) != len(order):
            raise ValueError(f"{len(weights)} weights for {len(order)} samples")
        self.order = torch.from_numpy(np.ascontiguousarray(order, dtype=np.int64)).to(device, copy=True)
        if weights is None:
            self.weights = torch.ones(len(order), device=device)
        else:
            self.weights = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)).to(device, copy=True)
        self.position = start
        self.cutouts: Cutouts | None = None

    @property
    def remaining(self) -> int:
        """Samples not yet taken."""
        return len(self.order) - self.position

    def take(self, count: int) -> Batch:
        """The next min(count, remaining) samples, exactly in order; none are skipped if this raises.

        The samples do not depend on how earlier calls cut the epoch.

        Raises:
            DataError: a sample cannot be read.
            ValueError: count is negative.
        """
        if count < 0:
            raise ValueError(f"cannot take {count} samples")
        stop = self.position + min(count, self.remaining)
        inputs, targets = self._build(self.position, stop)
        if self.cutouts is not None:
            self.cutouts.apply(inputs, self.position)
        batch = Batch(inputs, targets, self.order[self.position : stop], self.weights[self.position : stop])
        self.position = stop
        return batch

    @abstractmethod
    def _build(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of positions start to stop. Called again with the same start if it raised."""

    def read_less_ahead(self) -> None:  # noqa: B027  # most streams keep nothing on the device
        """Keep no samples on the device beyond those asked for: memory is short."""

    def close(self) -> None:  # noqa: B027  # most streams hold nothing; those that do override it
        """Stop reading ahead. The stream cannot be used afterwards."""

    def __enter__(self) -> EpochStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class EpochPart:
    """What is asked of a data source: an epoch's samples, or those of them that this process feeds.

    Attributes:
        order: (m,) int64 indices into the data set.
        weights: (m,) float32, or None for ones.
        start: how many are not to be fed any more.
        epoch: with the seed and the position, decides the augmentation.
        augment: whether to augment, where the source may.
        positions: (m,) int64, where they stand in the epoch's order; None: one after the other from 0.
        count: samples of the whole epoch.
    """

    order: np.ndarray
    weights: np.ndarray | None
    start: int
    epoch: int
    augment: bool
    positions: np.ndarray | None
    count: int


class DataSource(ABC):
    """A data set that can be streamed in any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    def stream(
        self,
        order: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        epoch: int,
        start: int = 0,
        augment: bool = False,
        positions: np.ndarray | None = None,
    ) -> EpochStream:
        """The samples of one epoch.

        Args:
            order: (m,) int64 indices into the data set, in the order to be fed; repeats are allowed.
            weights: (m,) float32, or None for ones.
            epoch: with the seed and the position in `order`, decides the augmentation.
            start: position to begin at, as if the samples before it had been taken.
            augment: random crops and flips, where the source was made for training and the configuration asks for them.
            positions: (k,) int64, the positions in `order` to feed, the others being fed elsewhere; `start` then counts
                these. None: all.

        Raises:
            ValueError: an index or `start` lies outside, or the lengths differ.
        """
        if len(order) and (order.min() < 0 or order.max() >= len(self)):
            raise ValueError(f"the order names samples outside the data set's {len(self)}")
        own, own_weights = order, weights
        if positions is not None:
            own, own_weights = order[positions], None if weights is None else weights[positions]
        return self._open(EpochPart(own, own_weights, start, epoch, augment, positions, len(order)))

    def resize(self, size: tuple[int, int], most_bytes: float) -> None:  # noqa: B027  # only where it is cheaper
        """Give images of this size (height, width) from now on, if a copy of all takes `most_bytes` at most."""

    @abstractmethod
    def _open(self, part: EpochPart) -> EpochStream:
        """The samples of a part of an epoch, or of all of it."""

    def close(self) -> None:  # noqa: B027  # only sources with worker processes override it
        """Free what the source holds beside memory (worker processes). Open streams end."""
