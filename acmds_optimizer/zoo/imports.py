"""`package.module:callable` to the callable, with an error that says which part of it is wrong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acmds_optimizer.config import nearest
from acmds_optimizer.errors import DataError


def load_callable(spec: str, what: str) -> Callable[..., Any]:
    """The callable that `spec` names. The current directory is importable, as under `python -m`.

    Args:
        spec: `package.module:callable`; the part after the colon may be dotted.
        what: what it is for ("model", "dataset"), for messages.

    Raises:
        DataError: the module cannot be imported, has no such attribute, or the attribute is not callable.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise DataError(f"{what} {spec!r}: expected package.module:callable")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise DataError(
            f"{what} {spec!r}: module {module_name!r} cannot be imported: {error}. "
            f"Modules are looked for in the current directory ({here}) and among the installed packages"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            raise DataError(f"{what} {spec!r}: {module_name} has no {attribute!r}{nearest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{what} {spec!r}: {attribute} is a {type(found).__name__}, not a function or class")
    return found
