"""Images from bytes to normalised floats in one pass, by Triton; PyTorch's kernels read byte by byte.

Imported where it is used, and only there: Triton is part of PyTorch for CUDA on Linux, and needs a C compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _normalise(images, result, scale, shift, count, channels: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # read by Triton
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    channel = place % channels
    value = tl.load(images + place, mask=inside, other=0).to(tl.float32)
    tl.store(result + place, value * tl.load(scale + channel) + tl.load(shift + channel), mask=inside)


def compile_normalise(scale: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of images (n, C, H, W) uint8, stored as NHWC from an address divisible by 16: images * scale + shift.

    Its result is float32, stored as NHWC, with the same bits as `torch.addcmul(shift, images, scale)`.

    Args:
        scale: (C, 1, 1) float32, on the device.
        shift: (C, 1, 1) float32, on the device.

    Raises:
        Exception: Triton cannot compile here; which one is its own affair.
    """
    channels = len(scale)
    _normalise.warmup(
        torch.uint8, torch.float32, torch.float32, torch.float32, 1, channels=channels, block=_BLOCK, grid=(1,)
    )

    def normalise(images: Tensor) -> Tensor:
        result = torch.empty_like(images, dtype=torch.float32)
        grid = (triton.cdiv(images.numel(), _BLOCK),)
        _normalise[grid](images, result, scale, shift, images.numel(), channels=channels, block=_BLOCK)
        return result

    return normalise
