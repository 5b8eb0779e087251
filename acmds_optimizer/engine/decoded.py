"""Decoded images kept in a file, so that the next run over the same folder maps them instead of decoding them again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acmds_optimizer.engine.images import InputSpec
from acmds_optimizer.files import replacing
from acmds_optimizer.zoo.folders import ImageFiles

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised whenever decoding gives other pixels than before."""


def decoded_once(
    files: ImageFiles, spec: InputSpec, folder: Path, decode: Callable[[], tuple[Tensor, np.ndarray]]
) -> tuple[Tensor, np.ndarray]:
    """What `decode` returns, images (n, C, H, W) uint8 and targets (n,), from `folder` where they are there already.

    The file of images is mapped, so that runs at the same time share its pages. Its name comes from the size, name and
    time of change of every image, so a changed folder is decoded anew. The targets have a file too, since the image in
    the place of a broken one came with its own. A folder that cannot be written costs a warning.
    """
    key = _key(files, spec)
    path, labels = folder / f"{key}.npy", folder / f"{key}_targets.npy"
    try:
        # copy-on-write, because PyTorch warns of arrays that cannot be written
        return torch.from_numpy(np.load(path, mmap_mode="c")), np.load(labels)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, so the images are decoded again: %s", path, error)
    images, targets = decode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in ((labels, targets), (path, images.numpy())):
            with replacing(name) as temporary, temporary.open("wb") as file:
                np.save(file, array)
    except OSError as error:
        logger.warning("the decoded images cannot be kept in %s: %s", folder, error)
    return images, targets


def _key(files: ImageFiles, spec: InputSpec) -> str:
    about = (_FORMAT, spec.shape, spec.crop, spec.skip_broken, str(files.root.resolve()), len(files))
    digest = hashlib.sha256(repr(about).encode())
    digest.update(files.names.tobytes())
    digest.update(files.targets.tobytes())
    stamps = np.empty((len(files), 2), np.int64)
    for index in range(len(files)):
        try:
            state = files.path(index).stat()
        except OSError:  # a link to nowhere: decoding will say so, or skip it
            stamps[index] = -1, 0
        else:
            stamps[index] = state.st_size, state.st_mtime_ns
    digest.update(stamps.tobytes())
    return digest.hexdigest()[:32]
