"""Items decoded into chunks of one size, by worker processes or here."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from acmds_optimizer.engine.augment import POLICIES
from acmds_optimizer.engine.batches import near_equal
from acmds_optimizer.engine.images import InputSpec, prepare, sample_rng
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.folders import UNREADABLE, WHAT_TO_DO, ImageFiles, unreadable
from acmds_optimizer.zoo.items import as_image, length, split_item

logger = logging.getLogger(__name__)

CHUNK_SAMPLES = 64
PREFETCHED_CHUNKS = 3
"""Chunks that each worker works ahead."""
_FIRST_SAMPLES = 8
"""Of each worker's first chunk in an epoch, for which the training has to wait."""

SHARED_MEMORY = Path("/dev/shm")

Chunk = tuple[Tensor, Tensor, str]
"""images (k, ...), targets (k,) int64, and what went wrong, or "", since a worker's exception would lose its own text:
without images an error, with them a line for each file that was skipped."""


@dataclass(frozen=True)
class Request:
    """One chunk to decode: samples by their indices, and by their positions in the epoch's order."""

    indices: np.ndarray
    positions: np.ndarray
    epoch: int
    augment: bool


class Decoder(Dataset[Chunk]):
    """Runs in the workers: a request to a chunk of uint8 images at their final size (or float tensors as they are)."""

    def __init__(self, dataset: Dataset[Any], spec: InputSpec) -> None:
        self.dataset = dataset
        self.spec = spec
        self.is_foreign = not isinstance(dataset, ImageFiles)
        name = "none" if spec.is_float or spec.crop == "none" else spec.auto_augment
        self.policy = POLICIES[name]() if name != "none" else None

    def __getitem__(self, request: Request) -> Chunk:
        spec = self.spec
        images = _empty(len(request.indices), spec)
        rows = images.numpy()  # torch would start threads for each image, which costs more than the copy
        labels = [0] * len(request.indices)
        skipped: list[str] = []
        for row, index in enumerate(request.indices.tolist()):
            rng = None
            if self.is_foreign or request.augment:
                rng = sample_rng(spec.seed, request.epoch, int(request.positions[row]))
            if self.is_foreign and rng is not None:  # its own random transforms, if any, use the global generators
                _seed_globals(int(rng.integers(2**32)))
            try:
                pixels, labels[row], said = self._read_or_next(index, rng if request.augment else None)
                rows[row] = pixels.detach().numpy()
                skipped += said
            except DataError as error:
                return images[:0], torch.empty(0, dtype=torch.int64), str(error)
        return images, torch.tensor(labels, dtype=torch.int64), "\n".join(skipped)

    def _read_or_next(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int, list[str]]:
        """An item, or where broken files are skipped the next one that can be read; and which were skipped."""
        skipped: list[str] = []
        if self.spec.skip_broken and not self.is_foreign:
            count = length(self.dataset)
            for _ in range(count - 1):
                try:
                    return *self._read(index, rng), skipped
                except DataError as error:
                    skipped.append(str(error).removesuffix(WHAT_TO_DO))
                    index = (index + 1) % count
        return *self._read(index, rng), skipped

    def _read(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        if self.is_foreign:
            image, label = split_item(self.dataset[index])
            try:
                pixels = prepare(as_image(image), self.spec, rng)
            except (DataError, *UNREADABLE) as error:
                raise DataError(f"item {index} of the data set: {error}") from error
        else:
            image, label = self.dataset[index]
            try:
                with image:
                    pixels = prepare(image, self.spec, rng)
            except UNREADABLE as error:
                raise unreadable(self.dataset.path(index), error) from None  # type: ignore[attr-defined]
        if self.spec.num_classes is not None and label >= self.spec.num_classes:
            raise DataError(
                f"item {index} of the data set has label {label}, but there are {self.spec.num_classes} classes: "
                f"give num_classes of at least {label + 1}"
            )
        if rng is not None and self.policy is not None:
            _seed_globals(int(rng.integers(2**32)))  # torchvision draws from torch's global generator
            pixels = self.policy(pixels)
        return pixels, label


def _empty(count: int, spec: InputSpec) -> Tensor:
    return torch.empty((count, *spec.shape), dtype=torch.float32 if spec.is_float else torch.uint8)


def _seed_globals(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the training's CUDA generators as well
    np.random.seed(seed)  # noqa: NPY002  # the one that others' transforms use
    random.seed(seed)


class _Requests(Sampler[Request]):
    """The requests of the current epoch; a new list is set before each iteration of the loader, which lives on."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches workers too, but the training decides when to end: it still finishes its step with their data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _iterate(loader: DataLoader[Chunk]) -> Iterator[Chunk]:
    """Its chunks. A worker that dies is noticed when the next chunk is waited for, within 5 seconds.

    PyTorch would raise at once, from a signal handler, in whatever the training is just doing.
    """
    before = signal.getsignal(signal.SIGCHLD)
    chunks: Iterator[Chunk] = iter(loader)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return chunks


def resolve_workers(asked: int | None) -> int:
    """`asked`, or up to 8 and one fewer than there are cores; 0 where this process may not start others."""
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = min(8, cores - 1)
    if asked and multiprocessing.current_process().daemon:
        logger.warning("a daemonic process may not start workers: images are decoded in this process")
        return 0
    return asked


class ChunkReader:
    """Decodes requests in order, in worker processes that stay from one `read` to the next.

    Args:
        dataset: map-style data set of (image, label).
        spec: how items become inputs.
        workers: processes; 0 decodes in this one, when asked.
        pin: page-locked chunks, for copies to CUDA that do not block.
    """

    def __init__(self, dataset: Dataset[Any], spec: InputSpec, workers: int, pin: bool) -> None:
        self.chunk_samples = _chunk_samples(spec.item_bytes, workers)
        self._decoder = Decoder(dataset, spec)
        self._requests = _Requests()
        self._loader: DataLoader[Chunk] | None = None
        self._workers = workers
        self._pin = pin
        self._named: set[str] = set()

    def read(
        self, order: np.ndarray, start: int, epoch: int, augment: bool, positions: np.ndarray | None = None
    ) -> Iterator[Chunk]:
        """Chunks of `order` from `start` on. Ends the reading begun by an earlier call.

        Args:
            order: (m,) int64 indices into the data set.
            start: number of the first to read.
            epoch: with the seed and the position, decides the augmentation.
            augment: whether to augment.
            positions: (m,) int64, positions in the epoch's whole order; None: `order` is whole.

        Raises (while iterated):
            DataError: an item cannot be read, or a worker process died.
        """
        places = np.arange(len(order)) if positions is None else positions
        ends = start + np.cumsum(chunk_sizes(len(order) - start, self.chunk_samples, self._workers))
        requests = [
            Request(order[at:end], places[at:end], epoch, augment) for at, end in pairwise([start, *ends.tolist()])
        ]
        return self._read_here(requests) if self._workers == 0 else self._read_there(requests)

    def _read_here(self, requests: list[Request]) -> Iterator[Chunk]:
        for request in requests:
            # others' random transforms are seeded for each sample, but the training's own state must not move
            states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
            try:
                chunk = self._decoder[request]
            finally:
                torch.set_rng_state(states[0])
                np.random.set_state(states[1])  # noqa: NPY002
                random.setstate(states[2])
            yield self._checked(chunk)

    def _read_there(self, requests: list[Request]) -> Iterator[Chunk]:
        if self._loader is None:
            self._loader = DataLoader(
                self._decoder,
                batch_size=None,
                sampler=self._requests,
                num_workers=self._workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # called with one item where batch_size is None
                pin_memory=self._pin,
                prefetch_factor=PREFETCHED_CHUNKS,
                persistent_workers=True,
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # else the loader draws its seed from the global generator
                # a fork has torch and the list of files at once; the other ways import for seconds a worker, and are
                # the default from Python 3.14 on, and in every trial of a search
                multiprocessing_context="fork" if "fork" in multiprocessing.get_all_start_methods() else None,
            )
        self._requests.requests = requests
        chunks: Iterator[Chunk] | None = None
        while True:
            try:
                chunks = chunks or _iterate(self._loader)
                chunk = next(chunks)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):
                    raise
                raise DataError(
                    f"a process that decodes images died ({error}). If the machine ran out of memory, lower num_workers"
                ) from error
            yield self._checked(chunk)

    def _checked(self, chunk: Chunk) -> Chunk:
        images, _, said = chunk
        if said and not len(images):
            raise DataError(said)
        for line in said.splitlines():
            if line not in self._named:
                self._named.add(line)
                logger.warning("skipped: %s", line)
        return chunk

    def close(self) -> None:
        """End the worker processes."""
        if self._loader is not None:
            iterator = self._loader._iterator  # torch has no public way to end persistent workers
            self._loader = None
            if iterator is not None:
                iterator._shutdown_workers()  # type: ignore[attr-defined]  # of the multi-process iterator, which this is


def chunk_sizes(count: int, largest: int, workers: int) -> list[int]:
    """How to cut `count` samples: small chunks first, which double until they are near-equal ones of at most `largest`.

    Of each size as many for each worker, so that all end at about the same time.
    """
    workers = max(1, workers)
    sizes: list[int] = []
    size, left = _FIRST_SAMPLES, count
    while size < largest and left > 2 * size * workers:
        sizes += [size] * workers
        left -= size * workers
        size *= 2
    chunks = workers * math.ceil(left / (workers * largest))
    return sizes + near_equal(left, min(chunks, left))


def _chunk_samples(item_bytes: int, workers: int) -> int:
    """CHUNK_SAMPLES, or fewer where all chunks on their way would not fit in half of the free shared memory.

    Containers often have 64 MiB of it, and a worker that finds it full is killed.
    """
    if workers == 0 or not SHARED_MEMORY.is_dir():
        return CHUNK_SAMPLES
    room = shutil.disk_usage(SHARED_MEMORY).free // 2 // (workers * (PREFETCHED_CHUNKS + 1) * item_bytes)
    return max(1, min(CHUNK_SAMPLES, room))


def decode_all(dataset: Dataset[Any], spec: InputSpec, workers: int) -> tuple[Tensor, np.ndarray]:
    """Every item, in order: images (n, *spec.shape) in host memory and (n,) int64 labels."""
    count = length(dataset)
    images = _empty(count, spec)
    targets = torch.empty(count, dtype=torch.int64)
    reader = ChunkReader(dataset, spec, workers, pin=False)
    try:
        at = 0
        for pixels, labels, _ in reader.read(np.arange(count), 0, epoch=0, augment=False):
            images[at : at + len(pixels)] = pixels
            targets[at : at + len(pixels)] = labels
            at += len(pixels)
    finally:
        reader.close()
    return images, targets.numpy()
