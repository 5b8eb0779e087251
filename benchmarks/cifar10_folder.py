"""Unpacks a parquet file of JPEG images (columns split, class_name, jpeg) into a folder of images.

usage: python benchmarks/cifar10_folder.py cifar10_jpeg.parquet FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd


def main(parquet: str, folder: str) -> None:
    """Write FOLDER/<split>/<class_name>/<number>.jpg."""
    table = pd.read_parquet(parquet)
    for (split, name), group in table.groupby(["split", "class_name"]):
        target = Path(folder) / split / name
        target.mkdir(parents=True, exist_ok=True)
        for number, jpeg in zip(group.index, group["jpeg"], strict=True):
            (target / f"{number}.jpg").write_bytes(jpeg)
    print(f"{len(table)} images in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
