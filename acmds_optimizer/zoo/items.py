"""What a data set hands out: the kinds of image we accept, and what can be learnt of a data set without decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset

from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.folders import ImageFiles
from acmds_optimizer.zoo.hub import HubImages

PROBED_ITEMS = 8
"""Items of a foreign data set that are read to learn their kind and size."""


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images of one size held in memory.

    Args:
        images: (n, C, H, W) uint8, or float32 (n, ...), which is then passed through as it is.
        targets: (n,) class numbers.
        classes: their names, if known.
    """

    def __init__(self, images: Tensor, targets: Any, classes: list[str] | None = None) -> None:
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


@dataclass(frozen=True)
class ItemKind:
    """What one item, or every probed item, of a data set is.

    shape is (C, H, W) of the first item, C the largest of all (any shape for floats); is_float says that it is a float
    tensor; one_size that all probed items have that height and width (that shape for floats).
    """

    shape: tuple[int, ...]
    is_float: bool
    one_size: bool = True


def as_image(item: Any) -> Image.Image | Tensor:
    """A PIL image as it is; a uint8 (C, H, W) tensor; or a float32 tensor of any shape.

    Numpy uint8 arrays are read as (H, W) or (H, W, C), as image libraries give them; float arrays keep their layout.

    Raises:
        DataError: `item` is none of these.
    """
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(item))
        item = array.permute(2, 0, 1) if array.dtype == torch.uint8 and array.ndim == 3 else array
    if isinstance(item, Tensor):
        if item.is_floating_point():
            return item.to(torch.float32)
        if item.dtype == torch.uint8 and item.ndim in (2, 3):
            return item if item.ndim == 3 else item.unsqueeze(0)
        raise DataError(
            f"an image must be uint8 or float, but the data set gives {item.dtype} of shape {tuple(item.shape)}"
        )
    raise DataError(
        f"an item must be (image, label) with a PIL image, a uint8 or float tensor or a numpy array, "
        f"but the image is a {type(item).__name__}"
    )


def split_item(item: Any) -> tuple[Any, int]:
    """(image, label) of one item, the label as a class number.

    Raises:
        DataError: the item is not a pair, or the label is not a whole number from 0.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"an item must be (image, label), but the data set gives a {type(item).__name__}")
    image, label = item
    if isinstance(label, Tensor | np.ndarray | np.generic):
        values = np.asarray(label)
        if values.size != 1 or values.dtype.kind not in "iu":
            raise DataError(f"a label must be one class number, but it is {values.dtype} of shape {values.shape}")
        label = int(values.reshape(()))
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(f"a label must be a class number from 0, but it is {label!r}")
    return image, label


def channels_of(image: Image.Image) -> int:
    """1 for grey images, 3 for all others (they are converted to RGB)."""
    return 1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else 3


def kind_of(image: Image.Image | Tensor) -> ItemKind:
    """The kind of one image that `as_image` returned."""
    if isinstance(image, Image.Image):
        return ItemKind((channels_of(image), image.height, image.width), False)
    return ItemKind(tuple(image.shape), image.is_floating_point())


def probe(dataset: Dataset[Any]) -> ItemKind:
    """The kind and size of the items, from headers or a few items; never decodes a whole data set.

    Raises:
        DataError: the data set is empty, has no length, or gives something that is no image.
    """
    count = length(dataset)
    stored = in_memory(dataset)
    if stored is not None:
        return ItemKind(tuple(stored.images.shape[1:]), stored.images.is_floating_point())
    if isinstance(dataset, ImageFiles):
        sizes = dataset.sample_sizes()
        return ItemKind((3, *sizes[0]), False, one_size=len(set(sizes)) == 1)
    picks = sorted({int(i) for i in np.linspace(0, count - 1, min(count, PROBED_ITEMS))})
    kinds = [kind_of(as_image(split_item(dataset[i])[0])) for i in picks]
    if len({kind.is_float for kind in kinds}) > 1:
        raise DataError("the data set mixes float tensors and images")
    if kinds[0].is_float:
        return ItemKind(kinds[0].shape, True, one_size=len(set(kinds)) == 1)
    channels = max(kind.shape[0] for kind in kinds)  # a grey image becomes a coloured one without loss
    return ItemKind((channels, *kinds[0].shape[1:]), False, one_size=len({kind.shape[1:] for kind in kinds}) == 1)


def length(dataset: Dataset[Any]) -> int:
    """Number of items.

    Raises:
        DataError: there are none, or the data set has no length or no items by number.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise a length
    except TypeError:
        raise DataError(
            f"{type(dataset).__name__} has no length: a data set must have __len__ and __getitem__ (map style)"
        ) from None
    if not hasattr(dataset, "__getitem__"):
        kept = "; give its .dataset, since batches are cut here" if isinstance(dataset, DataLoader) else ""
        raise DataError(f"{type(dataset).__name__} has no __getitem__: a data set must have it (map style){kept}")
    if count == 0:
        raise DataError(f"the data set ({type(dataset).__name__}) is empty")
    return count


def in_memory(dataset: Dataset[Any]) -> TensorImages | None:
    """The data set as one tensor if it already is one: TensorImages, a (inputs, labels) TensorDataset, or a Subset."""
    if isinstance(dataset, TensorImages):
        return dataset
    if isinstance(dataset, Subset):
        base = in_memory(dataset.dataset)
        picked = torch.as_tensor(dataset.indices, dtype=torch.int64)
        return base and TensorImages(base.images[picked], base.targets[picked.numpy()], base.classes)
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:  # a subclass may transform its items
        inputs, labels = dataset.tensors
        targets = _class_numbers(labels, len(inputs))
        if targets is not None and (inputs.is_floating_point() or (inputs.dtype == torch.uint8 and inputs.ndim == 4)):
            images = inputs.detach().cpu()
            return TensorImages(images.float() if inputs.is_floating_point() else images, targets)
    return None


def is_fixed(dataset: Dataset[Any]) -> bool:
    """Whether an item is known to be the same each time, so that it may be decoded once and kept."""
    if isinstance(dataset, Subset):
        return is_fixed(dataset.dataset)
    if isinstance(dataset, VisionDataset):
        return dataset.transforms is None
    return isinstance(dataset, (ImageFiles, HubImages)) or in_memory(dataset) is not None


def known_targets(dataset: Dataset[Any]) -> np.ndarray | None:
    """(n,) int64 labels where they can be had without reading the images, else None."""
    if isinstance(dataset, Subset):
        base = known_targets(dataset.dataset)
        return None if base is None else base[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [known_targets(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, TensorDataset):
        return _class_numbers(dataset.tensors[1], len(dataset)) if len(dataset.tensors) == 2 else None
    for name in ("targets", "labels", "_labels"):  # the last is what several of torchvision have
        if hasattr(dataset, name):
            return _class_numbers(getattr(dataset, name), len(dataset))  # type: ignore[arg-type]
    return None


def _class_numbers(values: Any, count: int) -> np.ndarray | None:
    """(count,) int64, or None if `values` is not one whole number from 0 an item."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        return None
    if array.shape != (count,) or array.dtype.kind not in "iu" or (count and array.min() < 0):
        return None
    return array.astype(np.int64)
