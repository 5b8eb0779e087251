"""A study's journal as Optuna stores it: for the search, which writes it, and for all who read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from acmds_optimizer.errors import ConfigError
from acmds_tune.journal import JOURNAL, readable


class Journal(JournalFileBackend):
    """A journal that can wait for the disk once for many lines: for each one it takes milliseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writers = JournalFileSymlinkLock(str(path))
        self._waits = True
        super().__init__(str(path), lock_obj=self._writers)

    @contextmanager
    def one_wait(self) -> Iterator[None]:
        """Lines written within this context are for others to read at once, and on the disk at its end."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add whole lines or none: behind half a one, which a full disk leaves, no later line could be read."""
        rest = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._writers.acquire()
        try:
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    if self._waits:
                        os.fsync(file.fileno())
                except BaseException:
                    file.truncate(before)
                    raise
        finally:
            self._writers.release()


def open_study(directory: Path) -> optuna.Study:
    """The study in `directory`, to be read.

    Raises:
        ConfigError: there is none.
    """
    journal = directory / JOURNAL
    if not journal.is_file():  # Optuna would make an empty one
        raise ConfigError(str(directory), [f"is not the folder of a study: it has no {JOURNAL}"])
    with readable(journal):
        storage = _storage(directory)
        names = optuna.get_all_study_names(storage)
        if not names:
            raise ConfigError(str(journal), ["holds no study"])
        return optuna.load_study(study_name=names[0], storage=storage)


def read_about(directory: Path) -> dict[str, Any]:
    """What the study in `directory` was started with: name, objectives, yaml, space, set.

    Raises:
        ConfigError: there is none.
    """
    return about_of(open_study(directory), directory)


def about_of(study: optuna.Study, directory: Path) -> dict[str, Any]:
    """The same of a study that is open already."""
    about = study.user_attrs.get("acmds")
    if not about:
        raise ConfigError(str(directory / JOURNAL), ["holds no study of acmds-tune"])
    return dict(about)


def serve_dashboard(directory: Path, port: int) -> None:
    """Serve optuna-dashboard for the study in `directory`, on this machine only."""
    from optuna_dashboard import run_server

    run_server(_storage(directory), host="127.0.0.1", port=port)


def _storage(directory: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
