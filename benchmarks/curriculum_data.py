"""What the curriculum is measured on: digits and CIFAR-10 with labels made wrong on purpose, and scenes of 128 px."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.engine.decode import decode_all, resolve_workers
from acmds_optimizer.engine.images import InputSpec
from acmds_optimizer.zoo.datasets import CIFAR_STATISTICS, DIGITS_STATISTICS, DataBundle, build_data
from acmds_optimizer.zoo.items import TensorImages

CLASSES = 10


@dataclass(frozen=True)
class Images:
    """A data set in memory: uint8 images (n, C, H, W) and int64 labels (n,), to train on and to validate with."""

    train: Tensor
    train_labels: np.ndarray
    val: Tensor
    val_labels: np.ndarray
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def bundle(self, images: Tensor, labels: np.ndarray, *, augment: bool) -> DataBundle:
        """The bundle to train on `images` with `labels`, validated on the untouched validation set."""
        return DataBundle(
            TensorImages(images, labels), TensorImages(self.val, self.val_labels), CLASSES, None,
            tuple(images.shape[1:]), self.mean, self.std, flip=self.flip, crop="pad" if augment else "none",
        )  # fmt: skip  # in the order of the fields


def digits() -> Images:
    """scikit-learn's 1,797 digits, a fifth of each class held out."""
    bundle = build_data(TrainConfig(dataset="digits", val_fraction=0.2))
    assert isinstance(bundle.train, TensorImages)
    assert isinstance(bundle.val, TensorImages)
    return Images(
        bundle.train.images, bundle.train.targets, bundle.val.images, bundle.val.targets, False, *DIGITS_STATISTICS
    )


def cifar10(folder: Path) -> Images:
    """The folder that benchmarks/cifar10_folder.py writes, decoded."""
    bundle = build_data(TrainConfig(dataset=str(folder)))
    spec = InputSpec((3, 32, 32), None, None, False, "none", False, CLASSES, 0)
    assert bundle.val is not None
    train, train_labels = decode_all(bundle.train, spec, resolve_workers(None))
    val, val_labels = decode_all(bundle.val, spec, resolve_workers(None))
    return Images(train, train_labels, val, val_labels, True, *CIFAR_STATISTICS["cifar10"])


def photos(folder: Path) -> Images:
    """10,000 of CIFAR-10's images to train on and 4,000 to validate with, at 16 px: for a CPU."""

    def small(images: Tensor, labels: np.ndarray, count: int) -> tuple[Tensor, np.ndarray]:
        chosen = np.random.default_rng(16).permutation(len(labels))[:count]
        return avg_pool2d(images[chosen].float(), 2).round().to(torch.uint8), labels[chosen]

    whole = cifar10(folder)
    train = small(whole.train, whole.train_labels, 10_000)
    return Images(*train, *small(whole.val, whole.val_labels, 4_000), whole.flip, whole.mean, whole.std)


def wrong_labels(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) of which `share` name another class, each of the nine alike; and which those are, (n,) bool."""
    rng = np.random.default_rng((seed, 99))
    wrong = rng.permutation(len(labels)) < round(share * len(labels))
    moved = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
    return np.where(wrong, moved, labels), wrong


def imbalanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices that keep five classes, picked by the seed, and a tenth of the samples of the other five."""
    rng = np.random.default_rng((seed, 7))
    rare = rng.permutation(CLASSES)[: CLASSES // 2]
    kept = [
        members if label not in rare else rng.permutation(members)[: round(len(members) / 10)]
        for label in range(CLASSES)
        for members in [np.flatnonzero(labels == label)]
    ]
    return np.sort(np.concatenate(kept))


SCENE_PX = 128
_TILE_PX = 16


def scenes(objects: Tensor, seed: int, device: torch.device, chunk: int = 500) -> Tensor:
    """Images of 128 px, each with one of the `objects`, 32 to 96 px large, anywhere on clutter.

    The clutter is an 8 x 8 mosaic of pieces of 16 px, each from a place and an image of its own.

    Args:
        objects: (n, 3, 32, 32) uint8, on any device.
        seed: of places, sizes and clutter.
        device: where to compose and leave them.
        chunk: scenes composed at once.

    Returns:
        (n, 3, 128, 128) uint8.
    """
    objects = objects.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    result = torch.empty((len(objects), 3, SCENE_PX, SCENE_PX), dtype=torch.uint8, device=device)
    for start in range(0, len(objects), chunk):
        count = min(chunk, len(objects) - start)
        clutter = _clutter(objects, count, generator)
        side = torch.rand(count, 1, generator=generator, device=device) * 64 + 32
        corner = torch.rand(count, 2, generator=generator, device=device) * (SCENE_PX - side)
        pixels = torch.arange(SCENE_PX, device=device) + 0.5
        across, down = (
            (pixels - corner[:, axis, None]) / side * 2 - 1 for axis in (0, 1)
        )  # (count, 128), object in [-1, 1]
        grid = torch.stack(
            (across[:, None, :].expand(-1, SCENE_PX, -1), down[:, :, None].expand(-1, -1, SCENE_PX)), dim=-1
        )
        placed = grid_sample(
            objects[start : start + count].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        inside = (grid.abs() <= 1).all(dim=-1)[:, None]
        result[start : start + count] = torch.where(inside, placed, clutter).round().byte()
    return result


def _clutter(objects: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 128, 128) float32: pieces of 16 px of the objects."""
    device, tiles, size = objects.device, SCENE_PX // _TILE_PX, objects.shape[-1]
    shape = (count, 1, tiles, 1, tiles, 1)
    image = torch.randint(len(objects), shape, generator=generator, device=device)
    top, left = (torch.randint(size - _TILE_PX + 1, shape, generator=generator, device=device) for _ in range(2))
    within = torch.arange(_TILE_PX, device=device)
    rows, columns = top + within.view(1, 1, 1, -1, 1, 1), left + within.view(1, 1, 1, 1, 1, -1)
    channel = torch.arange(3, device=device).view(1, 3, 1, 1, 1, 1)
    return objects[image, channel, rows, columns].reshape(count, 3, SCENE_PX, SCENE_PX).float()


def mlp(width: int = 512) -> nn.Module:
    """A network that learns 1,437 digits by heart, wrong labels included, within 20 epochs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip
