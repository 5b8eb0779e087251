"""What a command does when whoever read its output has gone, as `head` goes after ten lines."""

from __future__ import annotations

import functools
import io
import os
import select
import sys
from collections.abc import Callable
from typing import ParamSpec

EXIT = 141
"""What a shell reports of a program that ended since nobody reads what it writes (128 + SIGPIPE)."""

P = ParamSpec("P")


def ends_with_its_reader(main: Callable[P, int]) -> Callable[P, int]:
    """`main` of a command line; where the reader of its output has gone it ends with EXIT and without a traceback."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
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


def _has_no_reader(stream: object) -> bool:
    try:
        descriptor = stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, io.UnsupportedOperation, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
