"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from acmds_optimizer.errors import ACMDSError, CheckpointError

FORMAT = "acmds-checkpoint"
VERSION = 2


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`; a reader sees the old file or the whole new one.

    Raises:
        ACMDSError: the disk is full, or the folder cannot be written; an old file is still there.
    """
    path = Path(path)
    try:
        _write(path, state)
    except (OSError, RuntimeError) as error:
        # torch's writer covers an OSError with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise ACMDSError(f"{path}: the checkpoint cannot be written: {cause}") from error


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, tensors onto `device`.

    Raises:
        CheckpointError: no such file, a truncated one, or one that is not ours; nothing has been changed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a whole checkpoint of this program ({first_line})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a file of another program, not an ACMDS checkpoint")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: written by another version (format {state.get('version')}, this one reads {VERSION})"
        )
    return state
