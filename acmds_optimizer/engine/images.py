"""From a stored image to a model input: which part is cut out, random shifts and flips, normalisation."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from acmds_optimizer.engine.augment import Cutouts, scaled
from acmds_optimizer.errors import DataError, first_line

logger = logging.getLogger(__name__)

VALIDATION_RATIO = 224 / 256
"""Share of the shorter side that validation keeps of large images: resize to 256, cut out 224."""

MIN_AREA, MAX_AREA, MAX_ASPECT = 0.08, 1.0, 4 / 3
"""RandomResizedCrop's share of the area and largest ratio of the sides, as in torchvision."""

_LARGE = 2**22
"""Values of a batch from which on the compiled kernel gains more than its launch costs the host."""
_WORTH_COMPILING = 100
"""Large batches before it is compiled, which takes a second of a CPU core where it is not in Triton's cache."""

Box = tuple[float, float, float, float]
"""left, top, width, height in pixels of the stored image."""


@dataclass(frozen=True)
class InputSpec:
    """How items become inputs. The fields mean what they mean in `DataBundle`; `num_classes` may be unknown."""

    shape: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    flip: bool
    crop: Literal["none", "pad", "resized"]
    is_float: bool
    num_classes: int | None
    seed: int
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    cutout_fraction: float = 0.0
    skip_broken: bool = False
    """Whether the next image of a folder that can be read takes the place of one that cannot."""

    @property
    def padding(self) -> tuple[int, int]:
        """Largest shift (rows, columns) of a `pad` crop: an eighth of the size."""
        return self.shape[1] // 8, self.shape[2] // 8

    @property
    def item_bytes(self) -> int:
        """Bytes of one prepared item."""
        return math.prod(self.shape) * (4 if self.is_float else 1)


class Normaliser:
    """uint8 (n, C, H, W) to float32 (image / 255 - mean) / std, on the device. Floats are passed through.

    On CUDA a faster kernel with the same result is compiled in the background once many large batches were normalised.

    Args:
        spec: how images become inputs.
        device: where.
        channels_last: whether the result is stored as NHWC; while it is bytes that takes a quarter of the time.
    """

    def __init__(self, spec: InputSpec, device: torch.device, channels_last: bool = False) -> None:
        self._identity = spec.is_float
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._large_batches = 0
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if spec.is_float:
            return
        if spec.mean is None or spec.std is None:
            mean, std = torch.zeros(spec.shape[0]), torch.ones(spec.shape[0])
        else:
            mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self._scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self._shift = (-mean / std).view(-1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        if self._identity:
            return images
        if images.device.type == "cpu":  # where one pass over mixed types is slower
            return images.to(torch.float32).mul_(self._scale).add_(self._shift)
        images = images.contiguous(memory_format=self._layout)
        if self._layout is torch.channels_last and images.numel() >= _LARGE and images.data_ptr() % 16 == 0:
            if self._compiled is not None:
                with torch.cuda.device(images.device):  # Triton launches on the current one
                    return self._compiled(images)
            self._large_batches += 1
            if self._large_batches == _WORTH_COMPILING:
                threading.Thread(target=self._compile, daemon=True).start()
        return torch.addcmul(self._shift, images, self._scale)

    def _compile(self) -> None:
        try:
            from acmds_optimizer.engine.kernels import compile_normalise

            with torch.cuda.device(self._scale.device):
                self._compiled = compile_normalise(self._scale, self._shift)
        except Exception as error:  # noqa: BLE001  # without Triton or a C compiler PyTorch's kernel is as good
            logger.debug("images are normalised by PyTorch's own kernel (%s)", first_line(error))


@dataclass(frozen=True)
class Shifts:
    """The random shifts and flips of `pad` crops for a whole epoch, by position in its order.

    rows, columns: (m,) int16 on the device, how many pixels down and to the right; flips: (m,) bool; size: (height,
    width) of the images that they are meant for.
    """

    rows: Tensor
    columns: Tensor
    flips: Tensor
    size: tuple[int, int]

    @classmethod
    def draw(
        cls, count: int, epoch: int, spec: InputSpec, device: torch.device, positions: np.ndarray | None = None
    ) -> Shifts:
        """Of `count` samples those at `positions` (None: all); the same for the same (count, epoch, seed)."""
        generator = torch.Generator().manual_seed(_mix(spec.seed, epoch))
        pad_rows, pad_columns = spec.padding
        rows = torch.randint(0, 2 * pad_rows + 1, (count,), generator=generator, dtype=torch.int16) - pad_rows
        columns = torch.randint(0, 2 * pad_columns + 1, (count,), generator=generator, dtype=torch.int16) - pad_columns
        flips = torch.rand(count, generator=generator) < (0.5 if spec.flip else 0.0)
        if positions is not None:
            rows, columns, flips = (drawn[torch.from_numpy(positions)] for drawn in (rows, columns, flips))
        return cls(rows.to(device), columns.to(device), flips.to(device), (spec.shape[1], spec.shape[2]))

    def cut(self, images: Tensor, chosen: Tensor, start: int, stop: int) -> Tensor:
        """Shifted and flipped `images[chosen]`, as the samples at positions start to stop.

        Equal to padding with black, a cut at (row, column), then a horizontal flip. Lines are picked whole, with
        the images; only columns are gathered byte by byte, along one dimension: indices of several are written out.

        Args:
            images: (n, C, H, W) uint8, contiguous as NCHW or NHWC; the result is so too. Smaller ones are shifted less.
            chosen: (stop - start,) int64, which images.
            start: position of the first.
            stop: position after the last.
        """
        _, channels, height, width = images.shape
        device = images.device
        nhwc = not images.is_contiguous()
        planes, values = (1, channels) if nhwc else (channels, 1)
        row = torch.arange(height, device=device) + scaled(self.rows[start:stop, None], height, self.size[0])
        column = torch.arange(width, device=device)
        column = torch.where(self.flips[start:stop, None], width - 1 - column, column)
        column = column + scaled(self.columns[start:stop, None], width, self.size[1])
        inside = ((row >= 0) & (row < height))[:, None, :, None, None]
        inside = inside & ((column >= 0) & (column < width))[:, None, None, :, None]
        plane = chosen[:, None] * planes + torch.arange(planes, device=device)
        line = plane[:, :, None] * height + row.clamp_(0, height - 1)[:, None, :]
        stored = images.permute(0, 2, 3, 1) if nhwc else images
        picked = stored.reshape(-1, width * values).index_select(0, line.flatten())
        picked = picked.view(len(chosen), planes, height, width, values)
        picked = picked.gather(3, column.clamp_(0, width - 1)[:, None, None, :, None].expand(picked.shape))
        picked = picked.mul_(inside).view(len(chosen), *stored.shape[1:])
        return picked.permute(0, 3, 1, 2) if nhwc else picked


def pick(images: Tensor, chosen: Tensor) -> Tensor:
    """`images[chosen]` of images (n, ...) that are contiguous, perhaps as NHWC; the result is so too."""
    if images.is_contiguous():
        return images.index_select(0, chosen)
    return images.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)


def draw_cutouts(
    spec: InputSpec, count: int, epoch: int, device: torch.device, positions: np.ndarray | None = None
) -> Cutouts | None:
    """The squares of an epoch's samples, of those at `positions` if given; None where none are asked for."""
    if not spec.cutout_fraction:
        return None
    return Cutouts.draw(count, spec.shape, spec.cutout_fraction, _mix(spec.seed, epoch, 1), device, positions)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Random numbers of one sample of one epoch."""
    return np.random.default_rng((seed, epoch, position))


def centre_box(width: int, height: int, shape: tuple[int, ...], ratio: float) -> Box:
    """The largest centred part with the sides' proportion of `shape` (C, H, W), times `ratio`."""
    scale = min(width / shape[2], height / shape[1]) * ratio
    wide, high = shape[2] * scale, shape[1] * scale
    return (width - wide) / 2, (height - high) / 2, wide, high


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random part as torchvision's RandomResizedCrop draws it: 8 to 100 % of the area, sides 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(MIN_AREA, MAX_AREA)
        aspect = math.exp(rng.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1)), wide, high
    wide, high = min(width, round(height * MAX_ASPECT)), min(height, round(width * MAX_ASPECT))
    return (width - wide) // 2, (height - high) // 2, wide, high


def prepare(image: Image.Image | Tensor, spec: InputSpec, rng: np.random.Generator | None) -> Tensor:
    """One item at its final size: (C, H, W) uint8, or the float tensor as it is.

    Large images are cut at random if `rng` is given, else in the centre. Small ones are cut in the centre only if their
    size is not the input's; their random shifts happen on the device.

    Raises:
        DataError: the item's shape or channels do not fit the data set's.
    """
    if spec.is_float:
        if isinstance(image, Tensor) and image.is_floating_point() and tuple(image.shape) == spec.shape:
            return image
        raise DataError(f"expected a float tensor of shape {spec.shape}, but got {_say(image)}")
    if isinstance(image, Tensor) and image.is_floating_point():
        raise DataError(f"expected a uint8 or PIL image, but got {_say(image)}")
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])
    random = rng is not None and spec.crop == "resized"
    if (height, width) == spec.shape[1:] and spec.crop != "resized":
        box: Box = (0, 0, width, height)
    elif random:
        assert rng is not None
        box = random_box(width, height, rng)
    else:
        box = centre_box(width, height, spec.shape, VALIDATION_RATIO if spec.crop == "resized" else 1.0)
    flip = random and spec.flip and rng is not None and rng.random() < 0.5
    cut = _cut_pil if isinstance(image, Image.Image) else _cut_tensor
    return cut(image, box, spec.shape, flip)  # type: ignore[arg-type]  # mypy joins the two functions' arguments


def _cut_pil(image: Image.Image, box: Box, shape: tuple[int, ...], flip: bool) -> Tensor:
    channels, height, width = shape
    left, top, wide, high = box
    before = image.size
    shrink = min(wide / width, high / height)
    if image.format == "JPEG" and shrink >= 2:  # decode at 1/2, 1/4 or 1/8 where that still exceeds the input's size
        image.draft(None, (math.ceil(before[0] / shrink), math.ceil(before[1] / shrink)))
    across, down = image.size[0] / before[0], image.size[1] / before[1]
    edges = (
        max(left * across, 0),
        max(top * down, 0),
        min((left + wide) * across, image.size[0]),  # Pillow refuses an edge that rounding put outside
        min((top + high) * down, image.size[1]),
    )
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height) or edges != (0, 0, width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=edges)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _cut_tensor(image: Tensor, box: Box, shape: tuple[int, ...], flip: bool) -> Tensor:
    if image.shape[0] != shape[0]:
        if image.shape[0] != 1:
            raise DataError(f"expected an image of {shape[0]} channels, but got {_say(image)}")
        image = image.expand(shape[0], -1, -1)
    left, top, wide, high = (round(edge) for edge in box)  # torchvision cuts whole pixels only
    if tuple(image.shape) != shape or (top, left, high, wide) != (0, 0, *shape[1:]):
        image = functional.resized_crop(image, top, left, max(high, 1), max(wide, 1), list(shape[1:]), antialias=True)
    return image.flip(-1) if flip else image


def _say(image: Image.Image | Tensor) -> str:
    if isinstance(image, Tensor):
        return f"a {image.dtype} tensor of shape {tuple(image.shape)}"
    return f"a {image.width}x{image.height} {image.mode} image"
