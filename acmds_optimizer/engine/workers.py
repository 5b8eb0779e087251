"""Data decoded ahead by worker processes, cut into batches on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from acmds_optimizer.engine.batches import DataSource, EpochPart, EpochStream
from acmds_optimizer.engine.decode import Chunk, ChunkReader
from acmds_optimizer.engine.images import InputSpec, Normaliser, Shifts, draw_cutouts
from acmds_optimizer.zoo.items import length


class WorkerSource(DataSource):
    """Images decoded ahead by worker processes. One stream at a time: a new one ends the one before.

    Args:
        dataset: map-style data set of (image, label).
        spec: how items become inputs.
        device: where batches are wanted.
        augment: whether streams may augment at all.
        workers: processes; 0 decodes in this process when a batch is taken.
        channels_last: whether inputs are stored as NHWC.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        spec: InputSpec,
        device: torch.device,
        augment: bool,
        workers: int,
        channels_last: bool = False,
    ) -> None:
        self._count = length(dataset)
        self.spec = spec
        self.device = device
        self.may_augment = augment and spec.crop != "none"
        self.normalise = Normaliser(spec, device, channels_last)
        self.reader = ChunkReader(dataset, spec, workers, pin=device.type == "cuda")
        self._stream: WorkerStream | None = None

    def __len__(self) -> int:
        return self._count

    def _open(self, part: EpochPart) -> WorkerStream:
        if self._stream is not None:
            self._stream.close()
        self._stream = WorkerStream(self, part)
        return self._stream

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self.reader.close()


class WorkerStream(EpochStream):
    """Cuts batches of any size from the chunks of a WorkerSource."""

    def __init__(self, source: WorkerSource, part: EpochPart) -> None:
        super().__init__(part.order, part.weights, part.start, source.device)
        self._source = source
        augment = part.augment and source.may_augment
        order = np.array(part.order, dtype=np.int64)  # a copy: requests hold views of it for the whole epoch
        self._chunks: Iterator[Chunk] | None = source.reader.read(
            order, part.start, part.epoch, augment, part.positions
        )
        self._fetched: Chunk | None = None
        self._buffer: deque[tuple[Tensor, Tensor]] = deque()
        self._buffered = part.start  # position up to which samples are on the device
        self._buffer_start = part.start
        self._shifts: Shifts | None = None
        if augment and source.spec.crop == "pad":
            self._shifts = Shifts.draw(part.count, part.epoch, source.spec, source.device, part.positions)
        if augment and not source.spec.is_float:
            self.cutouts = draw_cutouts(source.spec, part.count, part.epoch, source.device, part.positions)

    def _build(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        while self._buffered < stop:
            self._fetch()
        self._drop_before(start)
        images, targets = [], []
        at = self._buffer_start
        for chunk_images, chunk_targets in self._buffer:
            low, high = max(start - at, 0), min(stop - at, len(chunk_targets))
            if high > low:
                images.append(chunk_images[low:high])
                targets.append(chunk_targets[low:high])
            at += len(chunk_targets)
        spec = self._source.spec
        if not images:
            empty = torch.empty((0, *spec.shape), device=self._source.device)
            return empty, torch.empty(0, dtype=torch.int64, device=self._source.device)
        pixels = images[0] if len(images) == 1 else torch.cat(images)
        labels = targets[0] if len(targets) == 1 else torch.cat(targets)
        if self._shifts is not None:
            everyone = torch.arange(len(pixels), device=pixels.device)
            pixels = self._shifts.cut(pixels, everyone, start, stop)
        return self._source.normalise(pixels), labels

    def _fetch(self) -> None:
        """One more chunk onto the device. Kept if that runs out of memory, so that no sample is lost."""
        if self._chunks is None:
            raise ValueError("the stream is closed: its source was closed, or began another stream")
        if self._fetched is None:
            self._fetched = next(self._chunks)
        images, targets, _ = self._fetched
        device = self._source.device
        self._buffer.append((images.to(device, non_blocking=True), targets.to(device, non_blocking=True)))
        self._buffered += len(targets)
        self._fetched = None

    def _drop_before(self, position: int) -> None:
        """Let go of chunks whose samples have all been taken."""
        while self._buffer and self._buffer_start + len(self._buffer[0][1]) <= position:
            self._buffer_start += len(self._buffer[0][1])
            self._buffer.popleft()

    def close(self) -> None:
        self._chunks = None
        self._fetched = None
        self._buffer.clear()
