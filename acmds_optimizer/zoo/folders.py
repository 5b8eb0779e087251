"""Folders of images: class folders, with train/ and val/ around them or split here."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.names import LAYOUT, check_folder

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "test", "testing")
"""Folders around the class folders, in any case; of several the first in this order."""

SPLIT_SEED = 1729
"""Of the split into training and validation samples: one for all configurations, so that trials compare."""

SAMPLED_HEADERS = 64
"""Image headers read to learn whether all images have one size."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no whole image (SyntaxError: a broken PNG)."""


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files with labels. An item is (opened but not yet decoded PIL image, label).

    Not decoding here lets the reader of the item decode a large JPEG at the scale that it needs. File names are kept in
    one array, not in a list of strings, so that worker processes share it instead of copying it.

    Args:
        root: folder that `names` are relative to.
        names: (n,) bytes, file names below `root`.
        targets: (n,) int64 class numbers.
        classes: class names.
    """

    def __init__(self, root: Path, names: np.ndarray, targets: np.ndarray, classes: list[str]) -> None:
        self.root = root
        self.names = names
        self.targets = targets
        self.classes = classes

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where item `index` lies."""
        return self.root / os.fsdecode(bytes(self.names[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.path(index)
        try:
            return Image.open(path), int(self.targets[index])
        except UNREADABLE as error:
            raise unreadable(path, error) from None

    def subset(self, indices: np.ndarray) -> ImageFiles:
        """The files at `indices`, in that order."""
        return ImageFiles(self.root, self.names[indices], self.targets[indices], self.classes)

    def sample_sizes(self) -> list[tuple[int, int]]:
        """(height, width) from the headers of up to SAMPLED_HEADERS files, evenly spaced; unreadable ones left out.

        Raises:
            DataError: none of them can be read.
        """
        picks = sorted({int(i) for i in np.linspace(0, len(self) - 1, min(len(self), SAMPLED_HEADERS))})
        sizes = []
        problem: DataError | None = None
        for index in picks:
            try:
                image, _ = self[index]
            except DataError as error:
                problem = error
                continue
            with image:
                sizes.append((image.height, image.width))
        if problem is not None and not sizes:
            raise problem
        return sizes


WHAT_TO_DO = (
    ". Repair or remove the file (acmds-train check FOLDER lists all), or go on without it: --broken-images skip"
)
"""How the message of `unreadable` ends; not said of a file that is skipped."""


def unreadable(path: Path | str, error: BaseException) -> DataError:
    """The error for a file that is no whole image."""
    said = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"{path}: cannot be read as an image: {said}{WHAT_TO_DO}")


def read_folder(folder: Path, val_fraction: float) -> tuple[ImageFiles, ImageFiles | None]:
    """Training and validation images of a folder, in either of the layouts of LAYOUT.

    Class folders without a train/ around them are split by `val_fraction`, each class alike; 0 holds nothing out.

    Raises:
        DataError: no such folder, no images, fewer than two classes, classes that only validation has, or a folder
            that may not be read.
    """
    try:
        return _parts(folder, val_fraction)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error}") from None


def _parts(folder: Path, val_fraction: float) -> tuple[ImageFiles, ImageFiles | None]:
    check_folder(folder)
    # sorted, so that of Train/ and train/ the latter is kept
    below = {name.lower(): folder / name for name in sorted(e.name for e in os.scandir(folder) if e.is_dir())}
    train_folder = next((below[name] for name in TRAINING_NAMES if name in below), None)
    validation = next((below[name] for name in VALIDATION_NAMES if name in below), None)
    if train_folder is None or (validation is None and not any(e.is_dir() for e in os.scandir(train_folder))):
        train_folder = folder  # where a class may be called train, as in CIFAR-100
    elif validation is not None:
        train = scan_classes(train_folder)
        return train, scan_classes(validation, train.classes)
    everything = scan_classes(train_folder)
    kept, held_out = stratified_split(everything.targets, val_fraction)
    return everything.subset(kept), everything.subset(held_out) if len(held_out) else None


def scan_classes(folder: Path, classes: list[str] | None = None) -> ImageFiles:
    """All images below the class folders of `folder`; class numbers follow `classes`, else the sorted names.

    Raises:
        DataError: as in `read_folder`.
        OSError: a folder cannot be read.
    """
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        loose = sum(1 for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS))
        holds = f"holds {loose} images but no class folders" if loose else "holds no class folders"
        raise DataError(f"{folder}: {holds}. {LAYOUT}")
    names: list[bytes] = []
    counts: dict[str, int] = {}
    whole = folder.resolve()
    above = {_identity(parent) for parent in (whole, *whole.parents)}
    for name in found:
        files = _images_below(folder, name, above)
        counts[name] = len(files)
        names.extend(files)
    if classes is not None and (lacking := [name for name in found if counts[name] and name not in classes]):
        raise DataError(f"{folder}: has classes that training lacks: {_some(lacking)}")
    if not names:
        raise DataError(f"{folder}: no images ({', '.join(EXTENSIONS)}) in its {len(found)} class folders. {LAYOUT}")
    if classes is None:
        classes = [name for name in found if counts[name]]
        if len(classes) < 2:
            raise DataError(f"{folder}: only one class has images ({classes[0]!r}); training needs two. {LAYOUT}")
    number = {name: index for index, name in enumerate(classes)}
    targets = np.concatenate([np.full(counts[name], number[name], np.int64) for name in found if counts[name]])
    return ImageFiles(folder, np.array(names, dtype=np.bytes_), targets, classes)


def _images_below(folder: Path, inside: str, above: set[tuple[int, int]]) -> list[bytes]:
    """Names, relative to `folder`, of the images below its folder `inside`: of each folder its own first, sorted.

    Left out are links to one of the folders `above`, which lead round in circles, and what is hidden: copies of a
    notebook, thumbnails, a Mac's `._` beside each file.
    """
    here = _identity(folder / inside)
    if here in above:
        return []
    shown = (entry for entry in os.scandir(folder / inside) if not entry.name.startswith("."))
    entries = sorted(shown, key=lambda entry: entry.name)
    below = [entry.name for entry in entries if entry.is_dir()]
    names = [entry.name for entry in entries if not entry.is_dir() and entry.name.lower().endswith(EXTENSIONS)]
    files = [os.fsencode(f"{inside}/{name}") for name in names]
    for name in below:
        files += _images_below(folder, f"{inside}/{name}", above | {here})
    return files


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stratified_split(targets: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices to hold out, each sorted.

    Of every class `val_fraction` is held out, rounded, but at least one sample, and never the last one. Depends on
    `targets` and SPLIT_SEED alone.

    Args:
        targets: (n,) int64.
        val_fraction: in [0, 1).
    """
    held_out = []
    rng = np.random.default_rng(SPLIT_SEED)
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        wanted = max(1, round(len(members) * val_fraction)) if val_fraction > 0 else 0
        held_out.append(members[: min(wanted, len(members) - 1)])
    val = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(targets)), val), val


def corrupt_images(images: ImageFiles) -> list[tuple[Path, str]]:
    """The files that cannot be decoded to their last pixel, each with what is wrong; every file is read."""

    def wrong(index: int) -> str:
        try:
            with Image.open(images.path(index)) as image:
                image.load()
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        found = list(pool.map(wrong, range(len(images))))
    return [(images.path(index), said) for index, said in enumerate(found) if said]
