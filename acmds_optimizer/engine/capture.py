"""One CUDA graph captured by hand, and what a capture that fails leaves in PyTorch mended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import torch

from acmds_optimizer.errors import first_line
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

Result = TypeVar("Result")
Pool = Any
"""What `torch.cuda.graph_pool_handle` gives."""

_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: the allocator of pinned memory goes on asking them whether it is theirs."""


class CaptureError(Exception):
    """What was launched cannot be captured, for the reason that is its message.

    Attributes:
        closed: whether the capture ended in order, so that nothing of it is left.
    """

    def __init__(self, reason: str, *, closed: bool) -> None:
        super().__init__(reason)
        self.closed = closed


def capture(run: Callable[[], Result], pool: Pool, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """What `run` launches, as a graph with its memory in `pool`, and what it returns.

    Raises:
        CaptureError: it cannot be captured.
        torch.OutOfMemoryError: there is no memory for it; RuntimeErrors that say so, too.
    """
    graph = torch.cuda.CUDAGraph()
    closed = False
    try:
        # by hand: `torch.cuda.graph` empties the cache, which the next steps would have to fill again
        torch.cuda.synchronize()
        with torch.cuda.stream(_capture_stream(device)):
            # the threads that pin batches and that NCCL has call CUDA meanwhile: minding all of it would end here
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
                closed = True
    except Exception as error:
        if not closed:
            _abandon(graph, pool, device)
        if is_out_of_memory(error):
            raise
        # a capture that was ended by an error cannot be closed without another
        cause = error if closed else error.__context__ or error
        reason = f"{type(cause).__name__}: {first_line(cause)}"
    else:
        return graph, result
    # only now, so that no exception keeps the graph, and with it what it holds in the pool
    del graph
    raise CaptureError(reason, closed=closed)


def give_up_pool(pool: Pool, device: torch.device) -> bool:
    """Let go of the pool of a capture that was not closed, once all its other graphs are gone; whether it held any."""
    if not torch.cuda.memory_snapshot(pool):
        return False
    with suppress(RuntimeError):  # up to 2.13 or so the graph that failed is counted for good (190348)
        torch._C._cuda_releasePool(device.index, pool)
    return True


def _abandon(graph: torch.cuda.CUDAGraph, pool: Pool, device: torch.device) -> None:
    """Make PyTorch notice that a capture has ended by an error, which up to 2.11 it does not (pytorch 180395).

    Its allocator would no longer give cached memory back in time of need, and its random numbers for the device would
    raise an error for good: their state learns of the end from a capture that succeeds.
    """
    graph.reset()
    _abandoned.append(graph)
    with suppress(RuntimeError):  # the allocator knows already
        torch._C._cuda_endAllocateToPool(device.index, pool)
    another, nothing = torch.cuda.CUDAGraph(), torch.zeros(1, device=device)
    with torch.cuda.stream(_capture_stream(device)):
        another.capture_begin(capture_error_mode="thread_local")
        nothing.zero_()
        another.capture_end()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream that it has worked on."""
    return torch.cuda.Stream(device)
