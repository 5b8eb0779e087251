"""The noise gate: which samples are probably mislabelled, from what the model makes of them while it still generalises.

A network learns what its samples share before it learns single ones by heart, so early in a training the losses of
mislabelled samples stay high while those of the others fall (Arpit et al., 2017, A closer look at memorization;
Arazo et al., 2019, Unsupervised label noise modeling, split the losses with a mixture model where this uses Otsu's
threshold).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acmds_optimizer.curriculum.difficulty import ScoreStore

BINS = 64
WARM_UP_FRACTION = 0.05
"""With 0.1 fewer wrong labels are found on digits in 20 epochs: 0.91 of them in place of 0.93, 0.78 of 0.82 with rare
classes (16 seeds)."""
CLEAR_EPOCHS = 2
"""Epochs in a row with a clear split before the gate fires."""
LOWEST_UPPER_MODE = 0.55
"""Of the upper class. Guessing is at 0.63; a wrong label in a share e of the samples at about 1 - (e / C)^(1 / ln C),
which is 0.8 for a fifth of ten classes."""
LOWEST_DISTANCE = 0.3
"""Between the two modes."""
HIGHEST_VALLEY = 0.8
"""Clean data has none (1.0 after all epochs of CIFAR-10 that were looked at), a fifth of wrong labels 0.6 to 0.2."""
LOWEST_SHARE = 0.02
"""Fewer wrong labels than this are not worth a gate, and are what a few odd samples look like."""
LOWEST_RETENTION = 0.5
"""Of the samples suspected after one epoch, those that must be after the next: hard samples are learned meanwhile."""
ALPHA = 0.3
"""Share of the new loss in the gate's averages, which thus look back about three epochs."""


@dataclass(frozen=True)
class Split:
    """Two classes of numbers in [0, 1], and how clear the split is."""

    threshold: float
    """The bottom of the valley between the two modes; what is above it is the upper class."""
    lower_mode: float
    upper_mode: float
    valley: float
    """Lowest density between the two modes, as a share of the lower one of them; 1 where there are not two."""

    @property
    def clear(self) -> bool:
        """Whether there are two classes, of which the upper one is what the model contradicts."""
        return (
            self.upper_mode >= LOWEST_UPPER_MODE
            and self.upper_mode - self.lower_mode >= LOWEST_DISTANCE
            and self.valley <= HIGHEST_VALLEY
        )


def otsu_cut(density: NDArray[np.floating[Any]]) -> int:
    """The last bin of the lower of two classes, between which the variance is largest.

    Otsu, 1979 (A threshold selection method from gray-level histograms). In an empty gap, its middle.
    """
    centres = np.arange(len(density)) + 0.5
    below = np.cumsum(density)
    moment = np.cumsum(density * centres)
    inside = (below > 1e-12) & (below < 1.0 - 1e-12)
    between = np.zeros(len(density))
    between[inside] = (moment[-1] * below[inside] - moment[inside]) ** 2 / (below[inside] * (1.0 - below[inside]))
    best = np.flatnonzero(between >= between.max() * (1.0 - 1e-9))
    return min(int(best[len(best) // 2]), len(density) - 2)


def find_split(values: NDArray[np.floating[Any]]) -> Split:
    """Split numbers (n,) in [0, 1] into two classes.

    Otsu's cut of a histogram of 64 bins says on which sides to look for the two modes; the split is at the bottom of
    the valley between them, since the classes are of unlike width, which draws Otsu's cut into the wide one: on
    CIFAR-10 with a fifth of wrong labels, half of what is above it has the right one. Modes and valley are read off
    the histogram smoothed over five bins.
    """
    counts, edges = np.histogram(values, BINS, (0.0, 1.0))
    density = counts / max(1, counts.sum())
    centres = (edges[:-1] + edges[1:]) / 2
    cut = otsu_cut(density)
    smooth = np.convolve(np.pad(density, 2, mode="edge"), np.full(5, 0.2), "valid")
    low, high = int(smooth[: cut + 1].argmax()), cut + 1 + int(smooth[cut + 1 :].argmax())
    peak = min(smooth[low], smooth[high])
    valley = smooth[low : high + 1]
    bottom = np.flatnonzero(valley <= valley.min() + 1e-12)
    return Split(
        threshold=float(edges[low + bottom[len(bottom) // 2] + 1]),
        lower_mode=float(centres[low]),
        upper_mode=float(centres[high]),
        valley=float(valley.min() / peak) if peak > 0 else 1.0,
    )


def flag(
    difficulty: NDArray[np.floating[Any]], suspected: NDArray[np.bool_], labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The suspected samples, but of each class at most half of its samples, the most difficult first.

    Args:
        difficulty: (n,).
        suspected: (n,).
        labels: (n,) given class numbers.

    Returns:
        (n,) bool.
    """
    flagged = suspected.copy()
    for label in np.unique(labels[suspected]):
        members = np.flatnonzero(labels == label)
        mine = members[suspected[members]]
        if len(mine) > len(members) // 2:
            keep = mine[np.argsort(-difficulty[mine], kind="stable")][len(members) // 2 :]
            flagged[keep] = False
    return flagged


class NoiseGate:
    """Watches each sample's loss and prediction on the device, and decides once an epoch which samples are flagged.

    Judged is d = 1 - exp(-loss / ln C) of the averaged loss, C being the number of classes, which is 0.63 for a model
    that guesses. Losses of the warm-up (a twentieth of the training, at least one epoch) are dropped. Suspected is what
    lies in the upper class and is predicted as another class than its label. `auto` waits for two epochs in a row in
    which the classes are clearly apart and most of the suspected samples stay the same; from then on the gate stays
    on, and flags after each epoch what is suspected then. A fixed rate flags that share, the highest losses, from the
    same time on. Never more than half of a class.

    Args:
        size: samples of the data set, n.
        noise_rate: `auto`, or the share of the samples to flag, in (0, 0.5].
        device: where the buffers live.
    """

    def __init__(self, size: int, noise_rate: Literal["auto"] | float, device: torch.device | str = "cpu") -> None:
        self.noise_rate = noise_rate
        self.losses = ScoreStore(size, ALPHA, device)
        self.labels = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.predictions = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.confidences = torch.zeros(size, dtype=torch.float32, device=device)
        self.flagged: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        """(n,), on the host."""
        self.guesses = torch.full((size,), -1, dtype=torch.int64, device=device)
        """(n,) what flagged samples were predicted as when they were flagged; -1 for the others."""
        self._suspected: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        self.classes = 2
        self.warm = False
        self.clear_epochs = 0
        self.fired = False
        self.threshold = 1.0
        """Difficulty above which samples are suspected: that of the last clear split."""
        self.split: Split | None = None
        """The last epoch's, where there was one."""

    def update(self, indices: Tensor, targets: Tensor, logits: Tensor, losses: Tensor) -> None:
        """Enter one step: indices and targets (B,) int64, logits (B, C), unreduced losses (B,). No host sync."""
        self.classes = logits.shape[1]
        self.losses.update(indices, losses)
        confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
        self.labels.index_copy_(0, indices, targets)
        self.predictions.index_copy_(0, indices, prediction)
        self.confidences.index_copy_(0, indices, confidence.float())

    def difficulty(self) -> NDArray[np.float32]:
        """The difficulties d (n,) in [0, 1] that are judged, on the host."""
        return (1.0 - torch.exp(-self.losses.average / math.log(max(2, self.classes)))).cpu().numpy()

    def end_epoch(self, progress: float) -> bool:
        """Judge after an epoch; `progress` is the share of the training that is done, in [0, 1].

        Returns:
            Whether the gate fired just now.
        """
        if not self.warm:
            self.warm = progress >= WARM_UP_FRACTION
            self.losses.count.zero_()  # the next loss of each sample replaces its average
            return False
        difficulty = self.difficulty()
        labels = self.labels.cpu().numpy()
        seen = self.losses.count.cpu().numpy() > 0
        before = self.fired
        if self.noise_rate == "auto":
            self.split = find_split(difficulty[seen])
            if self.split.clear or not self.fired:
                self.threshold = self.split.threshold
            suspected = seen & (difficulty > self.threshold) & (self.predictions.cpu().numpy() != labels)
            clear = self.split.clear and suspected.mean() >= LOWEST_SHARE
            if self.clear_epochs:
                clear = clear and (suspected & self._suspected).sum() >= LOWEST_RETENTION * self._suspected.sum()
            self.clear_epochs = self.clear_epochs + 1 if clear else 0
            self.fired = self.fired or self.clear_epochs >= CLEAR_EPOCHS
            self._suspected = suspected
        else:
            self.clear_epochs += 1
            self.fired = self.clear_epochs >= CLEAR_EPOCHS
            suspected = np.zeros(len(difficulty), dtype=np.bool_)
            count = math.floor(self.noise_rate * len(difficulty))
            suspected[np.argsort(-np.where(seen, difficulty, -1.0), kind="stable")[:count]] = True
            suspected &= seen
        if self.fired:
            self.flagged = flag(difficulty, suspected, labels)
            flagged = torch.from_numpy(self.flagged).to(self.predictions.device)
            self.guesses = torch.where(flagged, self.predictions, -1)
        return self.fired and not before

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses.state_dict(),
            "labels": self.labels.clone(),
            "predictions": self.predictions.clone(),
            "confidences": self.confidences.clone(),
            "flagged": torch.from_numpy(self.flagged.copy()),
            "guesses": self.guesses.clone(),
            "suspected": torch.from_numpy(self._suspected.copy()),
            "classes": self.classes,
            "threshold": self.threshold,
            "warm": self.warm,
            "clear_epochs": self.clear_epochs,
            "fired": self.fired,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: it belongs to a data set of another size.
        """
        self.losses.load_state_dict(state["losses"])
        for name in ("labels", "predictions", "confidences"):
            getattr(self, name).copy_(state[name])
        self.guesses.copy_(state.get("guesses", self.guesses))
        self.flagged = state["flagged"].cpu().numpy().copy()
        self._suspected = state["suspected"].cpu().numpy().copy()
        for name in ("classes", "threshold", "warm", "clear_epochs", "fired"):
            setattr(self, name, state[name])
