"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acmds_optimizer.errors import ACMDSError, CheckpointError, ConfigError
from acmds_optimizer.files import replacing

FORMAT = "acmds-checkpoint"
VERSION = 3
NEWEST = "checkpoint.pt"
BEST = "best.pt"


def save(path: str | Path, state: dict[str, Any], *, also: Sequence[Path] = ()) -> None:
    """Write `state` (tensors and plain values) to `path`; a reader sees the old file or the whole new one.

    Args:
        path: the file.
        state: what to keep.
        also: further names for the same content, each put in place before `path` is.

    Raises:
        ACMDSError: the disk is full, or the folder cannot be written; an old file is still there.
    """
    path = Path(path)
    try:
        _write(path, state, also)
    except (OSError, RuntimeError) as error:
        # torch's writer covers an OSError with a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise ACMDSError(f"{path}: the checkpoint cannot be written: {cause}") from error


def _write(path: Path, state: dict[str, Any], also: Sequence[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        for other in also:
            _second_name(temporary, other)


def _second_name(path: Path, other: Path) -> None:
    beside = other.with_name(f".{other.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, beside)
    beside.replace(other)


class CheckpointFolder:
    """The checkpoints of one run: checkpoint.pt is the newest, best.pt the best; older ones are named by their step.

    Args:
        folder: of the run; what a killed run left half-written there is removed.
        keep: how many of the newest to keep, checkpoint.pt included.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep
        for name in (NEWEST, BEST):
            for left in folder.glob(f".{name}.*"):
                left.unlink(missing_ok=True)

    def save(self, state: dict[str, Any], step: int, *, best: bool) -> None:
        """Write `state` after `step` optimizer steps, and drop what is too old.

        Raises:
            ACMDSError: as for `save`.
        """
        also = [self.folder / f"checkpoint_{step:08}.pt"] if self.keep > 1 else []
        also += [self.folder / BEST] if best else []
        save(self.folder / NEWEST, state, also=also)
        # not by their steps: those of a run that goes on from an earlier one begin again
        kept = sorted(self.folder.glob("checkpoint_[0-9]*.pt"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[: -self.keep] if self.keep > 1 else ():
            old.unlink()


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, tensors onto the CPU.

    Raises:
        CheckpointError: no such file, a truncated one, or one that is not ours; nothing has been changed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NEWEST
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it has written
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    except Exception as error:  # noqa: BLE001  # what PyTorch's unpickler raises over a foreign file can be anything
        raise CheckpointError(f"{path}: not a whole checkpoint of this program ({_first_sentence(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a file of another program, not an ACMDS checkpoint")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: written by another version (format {state.get('version')}, this one reads {VERSION})"
        )
    return state


def _first_sentence(error: Exception) -> str:
    """Without PyTorch's advice to load the file all the same, which would run what is in it, nor its bold letters."""
    return re.split(r"\.\s|[\x00-\x1f\x7f-\x9f]", str(error).strip(), maxsplit=1)[0] or type(error).__name__


def briefly(error: Exception) -> str:
    """What PyTorch says of a state that does not fit, in one line: it lists every tensor."""
    said = repr(error) if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(said, 300, placeholder=" ...")


def final_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that were validated: the running average where the run kept one."""
    if not state.get("average"):
        return state["model"]
    prefix = "module."
    return {name.removeprefix(prefix): v for name, v in state["average"].items() if name.startswith(prefix)}


def export_weights(source: Path, target: Path) -> dict[str, str]:
    """Write the weights of a checkpoint as safetensors, which any program can read without running code.

    Args:
        source: a checkpoint, or the folder of a run.
        target: the file to write; must not exist.

    Returns:
        The metadata of the file: model, number and names of classes, input shape, normalisation; text, as JSON.

    Raises:
        CheckpointError: `source` is not a whole checkpoint.
        ConfigError: `target` exists, or safetensors is not installed.
    """
    if target.exists():
        raise ConfigError("export", [f"{target} exists already; give another name"])
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ConfigError("export", ["safetensors is not installed: pip install 'acmds[export]'"]) from None
    state = load(source)
    about = {"format": "pt", "model": state["config"].get("model", "")}
    about |= {name: json.dumps(value) for name, value in state.get("data", {}).items()}
    # cloned: tied weights are stored twice, since the format holds no two names for one tensor
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in final_weights(state).items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            save_file(tensors, beside, metadata=about)
    except (OSError, SafetensorError) as error:
        raise ACMDSError(f"{target}: cannot be written: {error}") from None
    return about
