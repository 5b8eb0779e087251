"""Images without meaning, for searches that measure speed: `dataset: benchmarks.synthetic_images:float224`."""

from __future__ import annotations

import torch

from acmds_optimizer.memory.device import prefer_expandable_segments
from acmds_optimizer.zoo.items import TensorImages

COUNT = 2048
CLASSES = 1000


def float224() -> tuple[TensorImages, None]:
    """2,048 float images of 3 x 224 x 224, which are on the GPU from the start (1.15 GiB), and none for validation."""
    generator = torch.Generator().manual_seed(0)
    prefer_expandable_segments()  # as the trial would, before CUDA starts
    some = torch.rand((16, 224, 224, 3), generator=generator).to("cuda" if torch.cuda.is_available() else "cpu")
    targets = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    targets[-1] = CLASSES - 1
    return TensorImages(some.repeat(COUNT // 16, 1, 1, 1).permute(0, 3, 1, 2), targets), None
