"""Resolution stages: smaller images early, full size at the end, as a function of progress.

Early training needs less detail than late training, and an image of half the side costs a quarter of the time and of
the memory: M = M0 + a B S^2 (Howard, 2018, fast.ai's DAWNBench entry; Tan and Le, 2021, EfficientNetV2). The controller
is told the relative size of a sample, so the micro-batch grows as S shrinks, under the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import interpolate

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.errors import ConfigError

FULL_SIZE_FROM = 0.7
"""Progress from which images have their full size: the last 30 % of the training."""
MULTIPLE_PX = 8
"""Sides are multiples of it, or the full side."""


@dataclass(frozen=True)
class Stages:
    """The sizes (height, width) in pixels through which the images grow, ascending; the last is the full one."""

    sizes: tuple[tuple[int, int], ...]

    @staticmethod
    def from_config(config: CurriculumConfig, shape: tuple[int, ...]) -> Stages | None:
        """The stages that `start_resolution` and `resolution_stages` ask for; None: full size throughout.

        Args:
            config: the two are used.
            shape: of one model input, (C, H, W).

        Raises:
            ConfigError: stages of inputs that are no images.
        """
        if config.start_resolution == 1.0 or config.resolution_stages == 1:
            return None
        if len(shape) != 3 or min(shape[1:]) <= MULTIPLE_PX:
            raise ConfigError(
                "start_resolution", [f"inputs of shape {shape} are no images that could be smaller; leave it at 1"]
            )
        last = config.resolution_stages - 1
        scales = [config.start_resolution + (1.0 - config.start_resolution) * i / last for i in range(last)]
        sizes = [(_side(scale, shape[1]), _side(scale, shape[2])) for scale in scales]
        return Stages(tuple(dict.fromkeys([*sizes, (shape[1], shape[2])])))

    def number(self, progress: float) -> int:
        """Index of the stage at `progress`, the share of the training that is done, in [0, 1].

        All but the last take equal parts of the first 70 %.
        """
        last = len(self.sizes) - 1
        return last if progress >= FULL_SIZE_FROM else int(progress / FULL_SIZE_FROM * last)

    def affordable(self, due: int, present: int, smallest: int, room: float) -> int:
        """The largest stage up to `due` at which even the smallest micro-batch fits; the last one is not put off.

        Pressure so takes from the micro-batch first, and from the size only where nothing is left to take. Growing
        again asks for a tenth of room to spare, so that it does not go back and forth.

        Args:
            due: stage that progress asks for.
            present: stage of the step before.
            smallest: samples of the smallest micro-batch that is wanted.
            room: work, in samples of full size, that fits into memory beside the headroom.
        """
        if due == len(self.sizes) - 1:
            return due
        fits = (s for s in range(due, 0, -1) if smallest * self.work(s) <= room * (1.0 if s <= present else 0.9))
        return next(fits, 0)

    def work(self, number: int) -> float:
        """Pixels of an image at that stage, relative to the full size."""
        (height, width), (full_height, full_width) = self.sizes[number], self.sizes[-1]
        return height * width / (full_height * full_width)

    def resize(self, inputs: Tensor, number: int) -> Tensor:
        """Inputs (n, C, H, W), float, at the size of that stage, averaged over the pixels that fall together."""
        size = self.sizes[number]
        return inputs if inputs.shape[2:] == size else averaged(inputs, size)


def averaged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (n, C, H, W), float, at a smaller size, averaged over the pixels that fall together."""
    return interpolate(images, size=size, mode="bilinear", antialias=True)


def _side(scale: float, full: int) -> int:
    return min(full, max(MULTIPLE_PX, round(scale * full / MULTIPLE_PX) * MULTIPLE_PX))
