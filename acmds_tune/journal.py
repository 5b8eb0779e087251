"""The file that holds a study: who may write to it, and how it is mended after a kill. Knows nothing of Optuna."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acmds_optimizer.errors import ACMDSError, ConfigError

logger = logging.getLogger(__name__)

JOURNAL = "journal.log"
"""Its name in the folder of the study."""

BEGUN = b'"acmds"'
"""In the journal once it says what is searched."""


class StudyBusyError(ACMDSError):
    """Another search is writing to this study."""


def make_room(directory: Path) -> None:
    """Make the folders above that of a new study.

    Raises:
        ConfigError: the study exists, or its folder could not be made.
    """
    if directory.exists() and not is_unbegun(directory):
        raise _exists(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_made(directory, str(error)) from None
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        raise _cannot_be_made(directory, f"{directory.parent} is not writable")


def make_new(directory: Path) -> None:
    """Make the folder of a new study, or take one in which none was begun.

    Raises:
        ConfigError: it exists, perhaps since another search started a moment ago; or it cannot be made.
    """
    make_room(directory)
    try:
        directory.mkdir(exist_ok=is_unbegun(directory))
    except FileExistsError:
        raise _exists(directory) from None
    except OSError as error:
        raise _cannot_be_made(directory, str(error)) from None


def is_unbegun(directory: Path) -> bool:
    """The folder was made by a search that was killed before its journal said what it searches."""
    if not directory.is_dir() or is_held(directory):
        return False
    if any(each.name not in ("study.yaml", ".lock", JOURNAL, f"{JOURNAL}.lock") for each in directory.iterdir()):
        return False
    return (directory / ".lock").exists() and BEGUN not in _content(directory / JOURNAL)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _exists(directory: Path) -> ConfigError:
    problem = "this study exists; add --resume to go on with it, or give another one with --name"
    return ConfigError(str(directory), [problem])


def _cannot_be_made(directory: Path, why: str) -> ConfigError:
    return ConfigError(str(directory), [f"cannot be made: {why}; give another folder with --results-dir"])


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within this context a journal is read; one that is damaged before its last line is a ConfigError."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise _damaged(path, repr(error.doc[:40].strip())) from None
    except UnicodeDecodeError as error:
        raise _damaged(path, repr(error.object[max(0, error.start - 20) : error.start + 20])) from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _damaged(path: Path, where: str) -> ConfigError:
    problem = f"is damaged: a line is not what was written there ({where}); put a copy of the file in its place"
    return ConfigError(str(path), [problem])


def hold(directory: Path) -> int:
    """Hold the study for this process, as long as the returned descriptor is open."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StudyBusyError(f"{directory}: another search is running in this study; wait for it or end it") from None
    return descriptor


def is_held(directory: Path) -> bool:
    """A search is writing to the study. Leaves no file behind, so that it may be asked where one may only read."""
    try:
        descriptor = os.open(directory / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def mend(path: Path) -> None:
    """Cut off a last line that was written half when the search was killed, and a lock that it left."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        logger.warning("%s: cut off a last line that was written half", path)
        with path.open("r+b") as file:
            file.truncate(len(whole))
