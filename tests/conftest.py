"""What all tests share: the `gpu` marker, one thread a process, no log of another test, little garbage to scan,
a fork server where it is asked for."""

from __future__ import annotations

import gc
import logging
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only here: a run of tests without torch starts at once

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> Iterator[None]:
    """Each out-of-memory error collects garbage: half a second among all that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # else what is frozen at the end of the process is reported as leaked


@pytest.fixture(scope="module")
def own_fork_server() -> Iterator[None]:
    """A fork server that imports what this module asks for: there is one a process, and it keeps what it had first."""
    server: Any = multiprocessing.forkserver._forkserver  # private: there is no other way
    server._stop()
    yield
    server._stop()


@pytest.fixture(autouse=True)
def _log_of_this_test_only() -> Iterator[None]:
    """Drop the handlers that a command set up within the test: they write to its captured, soon closed streams."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.root.removeHandler(handler)
            handler.close()
