"""Which data stays on the device and which is loaded by workers; the one door to both."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from acmds_optimizer.config import GIB, CurriculumConfig, TrainConfig
from acmds_optimizer.engine.batches import DataSource
from acmds_optimizer.engine.decode import decode_all, resolve_workers
from acmds_optimizer.engine.decoded import decoded_once
from acmds_optimizer.engine.images import InputSpec
from acmds_optimizer.engine.resident import ResidentSource
from acmds_optimizer.engine.workers import WorkerSource
from acmds_optimizer.zoo.datasets import DataBundle, describe
from acmds_optimizer.zoo.folders import ImageFiles
from acmds_optimizer.zoo.items import in_memory, is_fixed, length

logger = logging.getLogger(__name__)

RESIDENT_LIMIT_BYTES = 2 * GIB
RESIDENT_SHARE = 0.25
"""Of what training may use of a card, which a data set that stays on it may take."""
SLOW_DECODE_S = 1.0


def make_source(
    dataset: Dataset[Any],
    bundle: DataBundle | None,
    config: CurriculumConfig,
    device: torch.device | str,
    *,
    train: bool,
    channels_last: bool = False,
    resident_limit_bytes: int = RESIDENT_LIMIT_BYTES,
) -> DataSource:
    """The source that suits `dataset`.

    Small images (at most 64 px) and float tensors that are known to be the same each time, and that fit
    `resident_limit_bytes`, stay on `device`; image files are decoded once, by workers. All else is loaded by workers
    while training: large images, data sets whose items may differ from one reading to the next, and images under
    `auto_augment`, which torchvision applies to one image at a time.

    Args:
        dataset: map-style data set of (image, label), as a rule `bundle.train` or `bundle.val`.
        bundle: how its images become inputs; None: items at their stored size, without augmentation (see `describe`).
        config: `seed`, and of a TrainConfig `augment` and `num_workers`.
        device: where batches are wanted.
        train: whether streams may augment; the configuration may still forbid it.
        channels_last: whether inputs are stored as NHWC.
        resident_limit_bytes: largest data set, in prepared bytes, that is kept on the device.

    Raises:
        DataError: the data set is empty, or holds items that are no (image, label).
    """
    device = torch.device(device)
    if bundle is None:
        bundle = describe(dataset)
    settings = config if isinstance(config, TrainConfig) else TrainConfig()
    augment = train and settings.augment
    spec = input_spec(bundle, config, train=train)
    workers = resolve_workers(settings.num_workers)
    count = length(dataset)
    if not resident_bytes(dataset, spec, resident_limit_bytes):
        return WorkerSource(dataset, spec, device, augment, workers, channels_last)
    stored = in_memory(dataset)
    if stored is not None and tuple(stored.images.shape[1:]) == spec.shape:
        return ResidentSource(stored.images, stored.targets, spec, device, augment, channels_last)
    began = time.monotonic()
    if isinstance(dataset, ImageFiles) and settings.decoded_cache:
        folder = Path(settings.decoded_cache)
        images, targets = decoded_once(dataset, spec, folder, lambda: decode_all(dataset, spec, workers))
    else:
        images, targets = decode_all(dataset, spec, workers)
    took = time.monotonic() - began
    level = logging.INFO if took >= SLOW_DECODE_S else logging.DEBUG
    logger.log(level, "decoded %d images of %s in %.1f s; they stay on %s", count, spec.shape, took, device)
    return ResidentSource(images, targets, spec, device, augment, channels_last)


def resident_limit(device: torch.device, room_bytes: float) -> int:
    """Bytes of the largest data set that is to stay on `device`, where training may use `room_bytes` of it."""
    if device.type != "cuda":  # the card on the CPU holds no images: they lie beside it
        return RESIDENT_LIMIT_BYTES
    return int(max(0.0, min(RESIDENT_LIMIT_BYTES, RESIDENT_SHARE * room_bytes)))


def input_spec(bundle: DataBundle, config: CurriculumConfig, *, train: bool) -> InputSpec:
    """How the items of `bundle` become inputs, in training or in validation."""
    settings = config if isinstance(config, TrainConfig) else TrainConfig()
    augment = train and settings.augment
    return InputSpec(
        bundle.image_shape, bundle.mean, bundle.std, bundle.flip, bundle.crop, bundle.is_float, bundle.num_classes,
        config.seed, settings.auto_augment if augment else "none", settings.cutout_fraction if augment else 0.0,
        settings.broken_images == "skip",
    )  # fmt: skip  # in the order of the fields


def resident_bytes(dataset: Dataset[Any], spec: InputSpec, limit_bytes: int = RESIDENT_LIMIT_BYTES) -> int:
    """Bytes of `dataset` on the device; 0 where workers load it."""
    total = length(dataset) * spec.item_bytes
    by_workers = spec.crop == "resized" or spec.auto_augment != "none" or not is_fixed(dataset)
    return 0 if by_workers or total > limit_bytes else total
