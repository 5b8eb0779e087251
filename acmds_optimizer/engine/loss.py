"""What is minimised, beside what is logged and scored; and the mixing of images with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from acmds_optimizer.config import CurriculumConfig, TrainConfig
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.errors import ConfigError, DataError

LossFunction = Callable[[Tensor, Tensor], Tensor]


class TrainingLoss:
    """Two losses of each sample: the one that is minimised, and its own, unsmoothed and for its own label.

    Args:
        own: (logits (B, C), targets (B,)) -> losses (B,), unreduced; None: cross-entropy.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
    """

    def __init__(self, own: LossFunction | None = None, label_smoothing: float = 0.0) -> None:
        self.own = own or nn.CrossEntropyLoss(reduction="none")
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor, soft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses (B,) to minimise, and losses (B,), detached, to log and to score by.

        Args:
            logits: (B, C) float32.
            targets: (B,) int64, each sample's own label.
            soft: (B, at most C) float32 targets of mixed samples; None: nothing is mixed.

        Raises:
            DataError: `own` gives something else than one loss a sample.
        """
        if soft is None and not self.label_smoothing:
            losses = self.own(logits, targets)
            given = tuple(losses.shape) if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            if given != (len(logits),):
                raise DataError(
                    f"loss_fn must give a loss for each sample, of shape ({len(logits)},), but gave {given}: use "
                    'reduction="none", and where a sample has several losses their mean(dim=1)'
                )
            return losses, losses.detach()
        if soft is not None and soft.shape[1] < logits.shape[1]:  # a model may have outputs that no label uses
            soft = nn.functional.pad(soft, (0, logits.shape[1] - soft.shape[1]))
        minimised = nn.functional.cross_entropy(
            logits, targets if soft is None else soft, reduction="none", label_smoothing=self.label_smoothing
        )
        with torch.no_grad():
            return minimised, self.own(logits, targets)


def make_loss(config: CurriculumConfig, own: LossFunction | None) -> TrainingLoss:
    """The loss that the configuration asks for, around `own`, or around cross-entropy.

    Raises:
        ConfigError: smoothing, mixing or new labels, the targets of cross-entropy, with a loss of one's own.
    """
    names = ("label_smoothing", "mixup_alpha", "cutmix_alpha")
    asked = [name for name in names if getattr(config, name, 0.0)]
    asked += ["noise_action"] if config.noise_action == "relabel" else []
    if own is not None and asked:
        raise ConfigError("loss_fn", [f"{name}: needs cross-entropy, not a loss of one's own" for name in asked])
    return TrainingLoss(own, getattr(config, "label_smoothing", 0.0))


def relabelled(batch: Batch, guesses: Tensor, num_classes: int) -> Batch:
    """`batch` with soft targets: the class in `guesses` (one for each sample of the data set), where that is not -1."""
    guessed = guesses[batch.indices]
    learned = torch.where(guessed < 0, batch.targets, guessed)
    return replace(batch, soft=nn.functional.one_hot(learned, num_classes).float())


@dataclass(frozen=True, kw_only=True)
class MixedBatch(Batch):
    """A batch whose slices are mixed when they are cut, so that the memory it takes is that of a micro-batch.

    Each sample is mixed with the one before it in the whole batch, so the cuts do not change what is learned. One after
    a sample of weight 0 stays as it is: a label that is not to be learned would be learned with it.
    """

    transform: v2.Transform
    seed: int

    def slice(self, start: int, stop: int) -> Batch:
        """Samples start to stop, mixed, with their soft targets."""
        before = (start - 1) % len(self)
        learned = self.targets if self.soft is None else self.soft.argmax(dim=1)
        whole = (self.inputs, learned, self.weights)
        if start:
            inputs, targets, weights = (part[before:stop] for part in whole)
        else:  # the sample before the first is the last
            inputs, targets, weights = (torch.cat((part[before:], part[:stop])) for part in whole)
        with torch.random.fork_rng(devices=[]):  # torchvision draws the shares from the CPU's global generator
            torch.default_generator.manual_seed(self.seed)
            mixed, soft = self.transform(inputs, targets)
        alone = (weights[:-1] == 0.0)[:, None]
        soft = torch.where(alone, nn.functional.one_hot(targets[1:], soft.shape[1]).to(soft.dtype), soft[1:])
        mixed = torch.where(alone[..., None, None], inputs[1:], mixed[1:])
        return Batch(mixed, self.targets[start:stop], self.indices[start:stop], self.weights[start:stop], soft)


class Mixing:
    """mixup and cutmix of whole batches: one share a step, and one of the two at random where both are on.

    Args:
        config: its `mixup_alpha`, `cutmix_alpha` and `augment` are read.
        num_classes: of the data; None: not known.
        input_shape: of one input.

    Raises:
        ConfigError: it is asked for with data that cannot be mixed.
    """

    def __init__(self, config: CurriculumConfig, num_classes: int | None, input_shape: tuple[int, ...] | None) -> None:
        self.transform: v2.Transform | None = None
        self.seed = config.seed
        if not isinstance(config, TrainConfig) or not config.augment:
            return
        kinds: dict[str, type[v2.Transform]] = {"mixup_alpha": v2.MixUp, "cutmix_alpha": v2.CutMix}
        asked = [name for name in kinds if getattr(config, name)]
        if not asked:
            return
        if num_classes is None or input_shape is None or len(input_shape) != 3:
            raise ConfigError(
                "mixing", [f"{name}: needs images (C, H, W) and a known number of classes" for name in asked]
            )
        transforms = [kinds[name](alpha=getattr(config, name), num_classes=num_classes) for name in asked]
        self.transform = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)

    def __call__(self, batch: Batch, epoch: int, position: int) -> Batch:
        """`batch`, to be mixed as it is cut; the same for the same (seed, epoch, position of its first sample)."""
        if self.transform is None:
            return batch
        seed = int(np.random.default_rng((self.seed, epoch, position, 2)).integers(2**63))
        return MixedBatch(
            batch.inputs, batch.targets, batch.indices, batch.weights, batch.soft, transform=self.transform, seed=seed
        )
