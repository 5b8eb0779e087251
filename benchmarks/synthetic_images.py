"""Images without meaning, for searches that measure speed: `dataset: benchmarks.synthetic_images:float224`."""

from __future__ import annotations

import torch

from acmds_optimizer.zoo.items import TensorImages

COUNT = 2048
CLASSES = 1000


def float224() -> tuple[TensorImages, None]:
    """2,048 float images of 3 x 224 x 224, which stay on the GPU (1.15 GiB), and none for validation."""
    generator = torch.Generator().manual_seed(0)
    some = torch.rand((16, 3, 224, 224), generator=generator)
    targets = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    targets[-1] = CLASSES - 1
    return TensorImages(some.repeat(COUNT // 16, 1, 1, 1), targets), None
