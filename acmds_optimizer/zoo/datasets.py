"""Data sets by name, by folder, or by `package.module:callable`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo import SMALL_IMAGE_PX
from acmds_optimizer.zoo.folders import read_folder, stratified_split
from acmds_optimizer.zoo.hub import load_hub
from acmds_optimizer.zoo.imports import load_callable
from acmds_optimizer.zoo.items import TensorImages, known_targets, length, probe
from acmds_optimizer.zoo.names import dataset_kind
from acmds_optimizer.zoo.torchvision_sets import NOT_MIRRORED, load_torchvision

logger = logging.getLogger(__name__)

LARGE_SIZE_PX = 224
Channels = tuple[float, ...]
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
# of the training images, in units of full scale
CIFAR_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS_STATISTICS: tuple[Channels, Channels] = ((0.3053,), (0.3760,))


@dataclass
class DataBundle:
    """A data set, and how its images become inputs.

    Attributes:
        train: map-style data set of (image, label).
        val: the same, or None where nothing is held out.
        num_classes: outputs the model needs; from `build_data` always a number.
        class_names: by class number, where known.
        image_shape: (C, H, W) of one model input; for float data the shape of an item, whatever it is.
        mean: of each channel, in units of full scale (255 = 1); None: inputs are image / 255, or floats as they are.
        std: likewise.
        flip: whether a mirrored image is as good as the image.
        crop: random crops in training. `pad`: shifts by up to an eighth (small images); `resized`: a random part,
            resized (large images); `none`: no augmentation at all, flips included.
        is_float: items are float tensors, passed through as they are: no resizing, augmentation or normalisation.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None
    num_classes: int | None
    class_names: list[str] | None
    image_shape: tuple[int, ...]
    mean: Channels | None = None
    std: Channels | None = None
    flip: bool = True
    crop: Literal["none", "pad", "resized"] = "pad"
    is_float: bool = False


def build_data(config: TrainConfig) -> DataBundle:
    """The data that `config.dataset` names, with `num_classes` checked.

    Reads dataset, data_dir, num_classes, val_fraction and image_size. Splits do not depend on the seed.

    Raises:
        DataError: no such data set, data that cannot be used, a failed download, or fewer classes asked for than the
            labels show. The message says what is expected.
    """
    kind = dataset_kind(config.dataset)
    bundle = NAMED[config.dataset](config) if kind == "named" else _LOADERS[kind](config)
    bundle.num_classes = class_count(bundle, config.num_classes)
    channels = bundle.image_shape[0]
    if config.augment and config.auto_augment != "none" and not bundle.is_float and channels not in (1, 3):
        raise DataError(f"auto_augment {config.auto_augment}: takes images of 1 or 3 channels, not of {channels}")
    _say_balance(bundle)
    return bundle


def describe(dataset: Dataset[Any]) -> DataBundle:
    """The bundle of a data set that came without one: items at their stored size, no augmentation, uint8 / 255.

    Images of differing sizes are cropped to 224 px.

    Raises:
        DataError: the data set is empty, has no length, or gives something that is no (image, label).
    """
    kind = probe(dataset)
    shape = kind.shape if kind.is_float or kind.one_size else (kind.shape[0], LARGE_SIZE_PX, LARGE_SIZE_PX)
    targets = known_targets(dataset)
    classes = None if targets is None else int(targets.max()) + 1
    return DataBundle(dataset, None, classes, None, shape, flip=False, crop="none", is_float=kind.is_float)


def _digits(config: TrainConfig) -> DataBundle:
    """scikit-learn's 1,797 handwritten digits, 8x8, no download. Not mirrored: a mirrored 2 is no 2."""
    from sklearn.datasets import load_digits  # imported here: it takes a second, and only digits need it

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    train, val = _split(pixels, labels, config.val_fraction, [str(digit) for digit in range(10)])
    mean, std = DIGITS_STATISTICS
    return _sized(DataBundle(train, val, None, train.classes, (1, 8, 8), mean, std, flip=False), config, (8, 8))


def _split(
    images: torch.Tensor, labels: np.ndarray, val_fraction: float, classes: list[str]
) -> tuple[TensorImages, TensorImages | None]:
    kept, held_out = stratified_split(labels, val_fraction)
    val = TensorImages(images[held_out], labels[held_out], classes) if len(held_out) else None
    return TensorImages(images[kept], labels[kept], classes), val


def _cifar(config: TrainConfig) -> DataBundle:
    """CIFAR-10 or -100 through torchvision; the test images are the validation set."""
    from torchvision.datasets import CIFAR10, CIFAR100

    stored_set: Any = CIFAR10 if config.dataset == "cifar10" else CIFAR100

    class Source(stored_set):
        """Torchvision's, which sums up all files twice for the training images and twice for the others."""

        whole = False

        def _check_integrity(self) -> bool:
            Source.whole = Source.whole or super()._check_integrity()
            return Source.whole

    parts = []
    for train in (True, False):
        try:
            stored = Source(config.data_dir, train=train, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise DataError(
                f"{config.dataset} could not be downloaded into {Path(config.data_dir).resolve()}: {error}. Check the "
                f"network and that the folder can be written, or put {Source.filename} there yourself"
            ) from error
        pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
        parts.append(TensorImages(pixels, stored.targets, list(stored.classes)))
    mean, std = CIFAR_STATISTICS[config.dataset]
    return _sized(DataBundle(parts[0], parts[1], None, parts[0].classes, (3, 32, 32), mean, std), config, (32, 32))


def _imagenet(config: TrainConfig) -> DataBundle:
    root = Path(config.data_dir)
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"imagenet: {root.resolve()} (data_dir) has no {' and no '.join(missing)}/. Expected train/ and val/ with "
            f"one folder of images a class in each"
        )
    return _folder(root, config)


def _folder(root: Path, config: TrainConfig) -> DataBundle:
    train, val = read_folder(root, config.val_fraction)
    kind = probe(train)
    stored = (kind.shape[1], kind.shape[2]) if kind.one_size else None
    bundle = DataBundle(train, val, None, train.classes, (3, 0, 0), IMAGENET_MEAN, IMAGENET_STD)
    _, height, width = _sized(bundle, config, stored).image_shape
    kept = f"{stored[1]}x{stored[0]} px" if stored else "of differing sizes"
    logger.info(
        "%s: %d images to train on, %d for validation, %d classes, %s",
        root, len(train), len(val or ()), len(train.classes),
        kept if stored == (height, width) else f"{kept}, fed as {width}x{height} px",
    )  # fmt: skip  # the arguments in the order of the text
    return bundle


def _foreign(config: TrainConfig) -> DataBundle:
    """What `package.module:callable` returns, called without arguments."""
    name = config.dataset
    build = load_callable(name, "dataset")
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise DataError(f"dataset {name!r}: must be callable without arguments: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    pair = build()
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"dataset {name!r}: must return (train, val), but returned a {type(pair).__name__}")
    train, val = pair
    return _bundle_of(name, train, val, config)


def _torchvision(config: TrainConfig) -> DataBundle:
    """A data set of torchvision; without validation images of its own, nothing is held out."""
    name = config.dataset.removeprefix("torchvision:")
    bundle = _bundle_of(config.dataset, *load_torchvision(name, config.data_dir), config)
    bundle.flip = bundle.flip and name not in NOT_MIRRORED
    return bundle


def _hub(config: TrainConfig) -> DataBundle:
    """A data set of the Hugging Face Hub; without a validation split of its own, a share of its training images."""
    train, val = load_hub(config.dataset.removeprefix("hf:"), config.data_dir)
    if val is not None or not config.val_fraction:
        return _bundle_of(config.dataset, train, val, config)
    kept, held_out = stratified_split(train.targets, config.val_fraction)
    parts = [Subset(train, indices.tolist()) for indices in (kept, held_out)]
    bundle = _bundle_of(config.dataset, parts[0], parts[1], config)
    bundle.class_names = train.classes or None
    return bundle


def _bundle_of(name: str, train: Dataset[Any], val: Dataset[Any] | None, config: TrainConfig) -> DataBundle:
    """The bundle of data sets whose items are images or float tensors, as a probe shows."""
    try:
        kind = probe(train)
        if val is not None:
            length(val)
    except DataError as error:
        raise DataError(f"dataset {name!r}: {error}") from error
    names = [str(each) for each in classes] if (classes := getattr(train, "classes", None)) else None
    if kind.is_float:
        if config.image_size is not None and kind.shape[-2:] != (config.image_size, config.image_size):
            raise DataError(
                f"dataset {name!r}: gives float tensors of shape {kind.shape}, which are passed through as they are, "
                f"so image_size {config.image_size} cannot be applied. Leave it out, or give uint8 or PIL images"
            )
        return DataBundle(train, val, None, names, kind.shape, flip=False, crop="none", is_float=True)
    channels = kind.shape[0]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    stored = (kind.shape[1], kind.shape[2]) if kind.one_size else None
    return _sized(DataBundle(train, val, None, names, (channels, 0, 0), mean, std), config, stored)


def _sized(bundle: DataBundle, config: TrainConfig, stored: tuple[int, int] | None) -> DataBundle:
    """Set the input's height and width, and the kind of crop that suits it. `stored` is None where sizes differ."""
    if config.image_size is not None:
        size = (config.image_size, config.image_size)
    else:
        size = stored if stored and max(stored) <= SMALL_IMAGE_PX else (LARGE_SIZE_PX, LARGE_SIZE_PX)
    bundle.image_shape = (bundle.image_shape[0], *size)
    bundle.crop = "pad" if max(size) <= SMALL_IMAGE_PX else "resized"
    return bundle


def _say_balance(bundle: DataBundle) -> None:
    """One line where classes differ in size by a factor of 2; a warning from 10 on, or where one has no samples."""
    targets = known_targets(bundle.train)
    if targets is None or not len(targets):
        return
    counts = np.bincount(targets, minlength=bundle.num_classes or 0)
    names = bundle.class_names or []

    def named(label: int) -> str:
        return f"{names[label]!r}" if label < len(names) else f"class {label}"

    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] >= 2 * counts[least]:
        logger.log(
            logging.WARNING if counts[most] >= 10 * counts[least] else logging.INFO,
            "class imbalance: %s has %d training samples, %s has %d; the median is %d",
            named(least), counts[least], named(most), counts[most], int(np.median(counts)),
        )  # fmt: skip


def class_count(bundle: DataBundle, asked: int | None) -> int:
    """`asked` if it covers all labels; None: what the data shows.

    Raises:
        DataError: fewer are asked for than the labels show, or nothing is asked for and nothing shows.
    """
    labels = [known_targets(part) for part in (bundle.train, bundle.val) if part is not None]
    present = max((int(part.max()) + 1 for part in labels if part is not None), default=0)
    named = len(bundle.class_names or ())
    found = max(present, named)
    if asked is None:
        if not found:
            raise DataError(
                "the number of classes cannot be read from this data set (it has no `targets`, `labels` or `classes`): "
                "give num_classes"
            )
        return found
    if asked < present:
        raise DataError(f"num_classes is {asked}, but the labels go up to {present - 1}: it must be at least {present}")
    if found and asked > found:
        logger.warning("num_classes is %d, but the data has %d classes; the other outputs stay unused", asked, found)
    return asked


NAMED: dict[str, Callable[[TrainConfig], DataBundle]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagenet": _imagenet,
}
_LOADERS: dict[str, Callable[[TrainConfig], DataBundle]] = {
    "hf": _hub,
    "torchvision": _torchvision,
    "callable": _foreign,
    "folder": lambda config: _folder(Path(config.dataset), config),
}
