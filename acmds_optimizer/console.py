"""The one rich console on stderr, so that log lines and a live display do not overwrite each other."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def console() -> Console:
    """Shared by the log handler and the progress display."""
    return Console(stderr=True)
