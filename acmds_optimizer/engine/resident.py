"""Data held on the device: a batch is a gather, whatever its size."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from acmds_optimizer.curriculum.resolution import averaged
from acmds_optimizer.engine.batches import DataSource, EpochPart, EpochStream
from acmds_optimizer.engine.images import InputSpec, Normaliser, Shifts, draw_cutouts, pick


class ResidentSource(DataSource):
    """All images on the device as uint8 (or float32, passed through), augmented there.

    Args:
        images: (n, *spec.shape), uint8 or float32.
        targets: (n,) int64.
        spec: how images become inputs.
        device: where to keep them.
        augment: whether streams may augment at all.
        channels_last: whether images and inputs are stored as NHWC.
    """

    def __init__(
        self,
        images: Tensor,
        targets: np.ndarray,
        spec: InputSpec,
        device: torch.device,
        augment: bool,
        channels_last: bool = False,
    ) -> None:
        self.spec = spec
        self.device = device
        self.may_augment = augment and spec.crop == "pad"
        self.images = _moved(images, device, channels_last and images.dim() == 4)
        self.targets = torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64)).to(device)
        self.normalise = Normaliser(spec, device, channels_last)
        self.sized = self.images
        """The same images at the size that streams give."""

    def resize(self, size: tuple[int, int], most_bytes: float) -> None:
        self.sized = self.images
        count, channels, *full = self.images.shape
        if self.spec.is_float or size == tuple(full) or count * channels * math.prod(size) > most_bytes:
            return
        layout = torch.contiguous_format if self.images.is_contiguous() else torch.channels_last
        shape = (count, channels, *size)
        sized = torch.empty(shape, dtype=torch.uint8, device=self.device, memory_format=layout)
        pieces = _pieces(self.images)
        for target, piece in zip(sized.tensor_split(pieces), self.images.tensor_split(pieces), strict=True):
            target.copy_(averaged(piece.float(), size).round_())
        self.sized = sized

    def __len__(self) -> int:
        return len(self.images)

    def _open(self, part: EpochPart) -> ResidentStream:
        shifts = None
        if part.augment and self.may_augment:
            shifts = Shifts.draw(part.count, part.epoch, self.spec, self.device, part.positions)
        stream = ResidentStream(self, part, shifts)
        if shifts is not None:
            stream.cutouts = draw_cutouts(self.spec, part.count, part.epoch, self.device, part.positions)
        return stream


_CHUNK_BYTES = 32 * 2**20


def _moved(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Images (n, ...) on the device, contiguous; a piece at a time where the layout changes, to need no room twice.

    What is there already keeps its layout, since a copy would lie beside it.
    """
    if not channels_last:
        return images.contiguous().to(device)
    if images.device.type == device.type:
        kept = images if images.is_contiguous(memory_format=torch.channels_last) else images.contiguous()
        return kept.to(device)
    moved = torch.empty(images.shape, dtype=images.dtype, device=device, memory_format=torch.channels_last)
    pieces = _pieces(images)
    for target, piece in zip(moved.tensor_split(pieces), images.tensor_split(pieces), strict=True):
        target.copy_(piece)
    return moved


def _pieces(images: Tensor) -> int:
    return max(1, images.nbytes // _CHUNK_BYTES)


class ResidentStream(EpochStream):
    """Gathers from a ResidentSource. The order, weights and shifts reach the device once an epoch; no call syncs.

    On CUDA several small batches are made at once, since each of the dozen kernels costs a launch.
    """

    def __init__(self, source: ResidentSource, part: EpochPart, shifts: Shifts | None) -> None:
        super().__init__(part.order, part.weights, part.start, source.device)
        self._source = source
        self._shifts = shifts
        input_bytes = 4 * math.prod(source.images.shape[1:])
        self._ahead = _CHUNK_BYTES // max(1, input_bytes) if source.device.type == "cuda" else 0
        self._chunk: tuple[int, int, Tensor, Tensor] | None = None

    def _build(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if stop - start >= self._ahead:
            self._chunk = None
            return self._gather(start, stop)
        if self._chunk is None or not self._holds(*self._chunk[:3], start, stop):
            self._chunk = None
            end = min(start + self._ahead, len(self.order))
            self._chunk = (start, end, *self._gather(start, end))
        first, _, inputs, targets = self._chunk
        return inputs[start - first : stop - first], targets[start - first : stop - first]

    def _holds(self, first: int, last: int, inputs: Tensor, start: int, stop: int) -> bool:
        return first <= start <= stop <= last and inputs.shape[1:] == self._source.sized.shape[1:]

    def read_less_ahead(self) -> None:
        self._ahead, self._chunk = 0, None

    def _gather(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        source = self._source
        indices = self.order[start:stop]
        if self._shifts is None:
            images = pick(source.sized, indices)
        else:
            images = self._shifts.cut(source.sized, indices, start, stop)
        return source.normalise(images), source.targets.index_select(0, indices)
