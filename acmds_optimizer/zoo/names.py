"""Which models and data sets there are, told without importing PyTorch, which takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Literal

from acmds_optimizer.config import nearest
from acmds_optimizer.errors import DataError

DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
"""Those that have a name of their own."""

LAYOUT = (
    "Expected train/ and val/ (or valid/, test/) with one folder of images a class in each, "
    "or the class folders themselves"
)
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@cache
def written_models() -> tuple[str, ...]:
    """Torchvision's classification models by name, as its source has them; empty where that is not understood."""
    found = importlib.util.find_spec("torchvision")
    files = Path(found.origin).parent.glob("models/*.py") if found is not None and found.origin is not None else ()
    return tuple(name for path in files for name in _REGISTERED.findall(path.read_text(encoding="utf-8")))


def check_model(name: str) -> None:
    """See that there is a model of this name; whether `package.module:callable` can be imported is not looked at.

    Raises:
        DataError: there is none, or timm is not installed.
    """
    if name.startswith("timm/"):
        if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
            raise DataError(f"model {name!r}: timm is not installed: pip install 'acmds[timm]'")
    elif ":" not in name and written_models() and name not in (known := sorted(["small_cnn", *written_models()])):
        raise unknown_model(name, known)


def unknown_model(name: str, known: list[str]) -> DataError:
    """Says which of the known names are near."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."
    return DataError(f"no model named {name!r}: {hint} One's own is given as package.module:callable")


def dataset_kind(name: str) -> Literal["named", "hf", "torchvision", "callable", "folder"]:
    """How a data set is named.

    Raises:
        DataError: there is none of this name.
    """
    if name in DATASETS:
        return "named"
    if name.startswith("hf:"):
        return "hf"
    if name.startswith("torchvision:"):
        return "torchvision"
    exists = os.path.exists(name)  # noqa: PTH110  # Path's raises where a folder may not be read
    if ":" in name and not exists:
        return "callable"
    if "/" in name or exists:
        return "folder"
    raise DataError(
        f"no data set and no folder named {name!r}{nearest(name, list(DATASETS))}. Known are {', '.join(DATASETS)}, "
        f"the path of a folder of images, torchvision:NAME, hf:NAME, and package.module:callable"
    )


def check_dataset(name: str) -> None:
    """See that there is a data set of this name, as far as a look at it tells.

    Raises:
        DataError: there is none.
    """
    if dataset_kind(name) == "folder":
        check_folder(Path(name))


def check_folder(folder: Path) -> None:
    """See that there is such a folder.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}. {LAYOUT}")
