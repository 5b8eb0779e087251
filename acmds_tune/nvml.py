"""What NVIDIA's driver says of its GPUs, without a CUDA context in this process: it would itself hold GPU memory."""

from __future__ import annotations

import ctypes
import os
from functools import cache


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except OSError:
        return None


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    library = _library()
    count = ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(count.value)]
    devices: list[str] = []
    for name in filter(None, (part.strip() for part in named.split(","))):
        if name.lstrip("-").isdigit() and not 0 <= int(name) < count.value:
            break  # CUDA, too, sees nothing from the first invalid one on
        devices.append(name)
    return devices


def _handle(device: str) -> ctypes.c_void_p | None:
    library = _library()
    if library is None:
        return None
    handle = ctypes.c_void_p()
    if device.isdigit():
        code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(device)), ctypes.byref(handle))
    else:
        code = library.nvmlDeviceGetHandleByUUID(device.encode(), ctypes.byref(handle))
    return handle if code == 0 else None


def name(device: str) -> str | None:
    """What the card is called; None where the driver does not say."""
    library, handle = _library(), _handle(device)
    text = ctypes.create_string_buffer(96)
    if library is None or handle is None or library.nvmlDeviceGetName(handle, text, ctypes.c_uint(len(text))) != 0:
        return None
    return text.value.decode(errors="replace")


def used_bytes(device: str) -> int | None:
    """Bytes of the card that any process holds; None where the driver does not say."""
    library, handle = _library(), _handle(device)
    memory = _Memory()
    if library is None or handle is None or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.used)


def busy_fraction(device: str) -> float | None:
    """Share of the last fraction of a second in which a kernel ran, in [0, 1]; None where the driver does not say."""
    library, handle = _library(), _handle(device)
    rates = _Utilization()
    if library is None or handle is None or library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)) != 0:
        return None
    return float(rates.gpu) / 100
