"""Data sets of the Hugging Face Hub, where the package `datasets` is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from acmds_optimizer.errors import DataError

VALIDATION_SPLITS = ("validation", "valid", "val", "test")


class HubImages(Dataset[tuple[Any, int]]):
    """One split: an item is (PIL image, label).

    Args:
        table: a `datasets.Dataset`.
        image: name of the column of images.
        label: name of the column of class numbers.
    """

    def __init__(self, table: Any, image: str, label: str) -> None:
        self.table = table
        self._image = image
        self.targets = np.asarray(table[label], dtype=np.int64)
        self.classes = [str(name) for name in getattr(table.features[label], "names", [])]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.table[int(index)][self._image], int(self.targets[index])


def load_hub(name: str, data_dir: str) -> tuple[HubImages, HubImages | None]:
    """Training and validation images of a data set of the Hub; its first columns of images and of class labels.

    Args:
        name: such as `uoft-cs/cifar10`, or `owner/name:configuration`.
        data_dir: where to keep what is downloaded.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or has no such columns.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name}: datasets is not installed: pip install 'acmds[hub]'") from None
    path, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None, cache_dir=data_dir)
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are among these
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"hf:{name}: cannot be loaded: {said}") from error
    if "train" not in splits:
        raise DataError(f"hf:{name}: has no split `train`, only {', '.join(splits)}")
    features = splits["train"].features
    columns = []
    for kind in ("Image", "ClassLabel"):
        found = [column for column, feature in features.items() if type(feature).__name__ == kind]
        if not found:
            raise DataError(f"hf:{name}: has no column of kind {kind}, only {', '.join(features)}")
        columns.append(found[0])
    held_out = next((split for split in VALIDATION_SPLITS if split in splits), None)
    return HubImages(splits["train"], *columns), HubImages(splits[held_out], *columns) if held_out else None
