"""Data sets of torchvision by their class names: torchvision:FashionMNIST."""

from __future__ import annotations

import inspect
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from acmds_optimizer.config import nearest
from acmds_optimizer.errors import DataError

NOT_MIRRORED = ("MNIST", "EMNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "GTSRB")
"""Where a mirrored image may be another class, or none: digits, letters, traffic signs."""


def load_torchvision(name: str, data_dir: str) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training and validation images of `torchvision.datasets.NAME`, downloaded into `data_dir` where it can do so.

    Validation is its split val, valid or test, in this order; test where training is a split trainval.

    Raises:
        DataError: no such data set, one without training and validation images, or a failed download.
    """
    from torchvision import datasets

    known: dict[str, Any] = {
        each: kind
        for each in datasets.__all__
        if inspect.isclass(kind := getattr(datasets, each)) and _parameters(kind) & {"train", "split"}
    }
    if name not in known:
        raise DataError(
            f"torchvision:{name}: torchvision has no data set of this name with training and validation images"
            f"{nearest(name, list(known))}"
        )
    source = known[name]
    options: dict[str, Any] = {"download": True} if "download" in _parameters(source) else {}
    try:
        if "train" in _parameters(source):
            return source(data_dir, train=True, **options), source(data_dir, train=False, **options)
        usual = inspect.signature(source).parameters["split"].default
        whole = usual == "trainval"
        train = source(data_dir, split="trainval" if whole else "train", **options)
        for split in ("test",) if whole else ("val", "valid", "test"):
            try:
                return train, source(data_dir, split=split, **options)
            except ValueError:  # torchvision's word for a split that there is not
                continue
        return train, None
    except ImportError as error:
        raise DataError(f"torchvision:{name}: needs a package that is not installed: {error}") from error
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(
            f"torchvision:{name}: cannot be had in {Path(data_dir).resolve()}: {error}. Check the network and that the "
            f"folder can be written, or put the files there yourself"
        ) from error


def _parameters(source: Any) -> set[str]:
    return set(inspect.signature(source).parameters)
