"""What a command does when nobody reads its output: a reader has gone, as `head` does, or there never was one."""

from __future__ import annotations

import functools
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

EXIT = 141
"""What a shell reports of a program that ended since nobody reads what it writes (128 + SIGPIPE)."""

P = ParamSpec("P")


def ends_with_its_reader(main: Callable[P, int]) -> Callable[P, int]:
    """`main` of a command line; where the reader of its output has gone it ends with EXIT and without a traceback.

    A command that was started with its output closed (`>&-`) runs as with `>/dev/null`.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        _open_what_is_closed()
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # else the interpreter does it, too late for us
        except BrokenPipeError:
            closed = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
            if not closed:
                raise  # another pipe, such as one to a process of ours
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in closed:  # what is left in the buffers is written as the interpreter ends
                os.dup2(nowhere, descriptor)
            return EXIT

    return run


def _open_what_is_closed() -> None:
    """Python has None for a stream that is closed, and print(file=None) would write to the other one.

    Opened first of all, the null device also takes the stream's number, which a file of the run would get otherwise.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  # to the end
            setattr(sys, name, nowhere)


def _has_no_reader(stream: object) -> bool:
    try:
        descriptor = stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, io.UnsupportedOperation, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
