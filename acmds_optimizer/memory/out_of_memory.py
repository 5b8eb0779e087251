"""What an out-of-memory error is, and what it says was missing."""

from __future__ import annotations

import re

import torch

_MESSAGES = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    "unable to find an engine to execute this computation",  # cuDNN with no room for any workspace
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cudaerrormemoryallocation",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the CPU's allocator, had no memory left.

    Recognised are `torch.OutOfMemoryError`, and the RuntimeError and `torch.AcceleratorError` variants of CUDA, the
    driver, cuDNN, cuBLAS and the CPU allocator, by their messages.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(message in text for message in _MESSAGES)


def shortage_bytes(message: str) -> int:
    """What was missing by the words of an out-of-memory error: asked for less free; 0 where they do not say."""
    asked = re.search(r"allocate ([\d.]+) (bytes|[KMGT]iB)", message)
    if not asked:
        return 0
    size = float(asked[1]) * _UNITS[asked[2]]
    free = re.search(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", message)
    room = float(free[1]) * _UNITS[free[2]] if free else 0.0
    # under a cap the card may have plenty free: "23.20 GiB allowed; Of the allocated memory 23.03 GiB is allocated"
    cap = re.search(r"([\d.]+) (bytes|[KMGT]iB) allowed; .*?memory ([\d.]+) (bytes|[KMGT]iB) is allocated", message)
    if cap:
        room = min(room, float(cap[1]) * _UNITS[cap[2]] - float(cap[3]) * _UNITS[cap[4]])
    held = re.search(r"budget of ([\d.]+) MiB of which ([\d.]+) MiB are allocated", message)
    if held:
        room = (float(held[1]) - float(held[2])) * 2**20
    return max(0, int(size - room))
