"""What the noise gate flagged, for a human to look at: a table, and a sheet of the worst images."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, Subset

from acmds_optimizer.curriculum.gate import NoiseGate
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.folders import UNREADABLE, ImageFiles
from acmds_optimizer.zoo.items import as_image, split_item

logger = logging.getLogger(__name__)

TABLE = "flagged.csv"
SHEET = "flagged.png"
COLUMNS = {
    "index": "number of the sample in the training data",
    "path": "file of the image; empty where the data is no folder of images",
    "label": "class that the data gives it",
    "prediction": "class that the model gave it at its last visit",
    "confidence": "probability of that prediction",
    "difficulty": "1 - exp(-its averaged loss / ln of the number of classes), in [0, 1]; 0.63 is guessing",
}
"""Columns of flagged.csv, the worst first, and what they mean."""

_TILES = 8
_TILE_PX = 112
_TEXT_PX = 26
_LETTERS = 20


def write_flagged(folder: Path, dataset: Dataset[Any], gate: NoiseGate, classes: list[str] | None) -> None:
    """Write flagged.csv, and flagged.png with the 64 worst of them, into `folder`.

    Args:
        folder: there already.
        dataset: the training data, of (image, label).
        gate: what it flags now is written.
        classes: names by class number; None: the numbers.
    """
    flagged = np.flatnonzero(gate.flagged)
    difficulty = gate.difficulty()
    labels, predictions, confidences = (
        tensor.cpu().numpy() for tensor in (gate.labels, gate.predictions, gate.confidences)
    )
    order = flagged[np.lexsort((-confidences[flagged], -difficulty[flagged]))]

    def name(number: int) -> str:
        return classes[number] if classes is not None and 0 <= number < len(classes) else str(number)

    # a file's name need not be text
    with (folder / TABLE).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in order.tolist():
            where = path_of(dataset, i) or ""
            row = [i, where, name(labels[i]), name(predictions[i])]
            writer.writerow([*row, f"{confidences[i]:.4f}", f"{difficulty[i]:.4f}"])
    tiles = []
    for i in order[: _TILES * _TILES].tolist():
        try:
            image = _picture(dataset, i)
        except (DataError, *UNREADABLE):  # the next one has trained in its place
            continue
        if image is None:
            return
        tiles.append(
            (image, f"{name(labels[i])[:_LETTERS]}\n> {name(predictions[i])[: _LETTERS - 7]} {confidences[i]:.0%}")
        )
    if tiles:
        contact_sheet(tiles).save(folder / SHEET)


def path_of(dataset: Dataset[Any], index: int) -> Path | None:
    """The image file behind a sample, through subsets; None where there is none."""
    if isinstance(dataset, Subset):
        return path_of(dataset.dataset, int(dataset.indices[index]))
    return dataset.path(index) if isinstance(dataset, ImageFiles) else None


def contact_sheet(tiles: list[tuple[Image.Image, str]]) -> Image.Image:
    """Images with a text below each, eight a row."""
    rows = -(-len(tiles) // _TILES)
    sheet = Image.new("RGB", (_TILES * _TILE_PX, rows * (_TILE_PX + _TEXT_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(tiles):
        left, top = number % _TILES * _TILE_PX, number // _TILES * (_TILE_PX + _TEXT_PX)
        scale = (_TILE_PX - 4) / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
        sheet.paste(image.resize(size, how), (left + 2, top + 2))
        draw.multiline_text((left + 2, top + _TILE_PX), text, fill="black", spacing=1)
    return sheet


def _picture(dataset: Dataset[Any], index: int) -> Image.Image | None:
    """The sample as an RGB image; None where it is something else."""
    item = as_image(split_item(dataset[index])[0])
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8 or item.shape[0] not in (1, 3):
            return None
        item = Image.fromarray(item.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
    return item.convert("RGB")
