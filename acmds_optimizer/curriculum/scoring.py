"""Scoring functions: from what a step computed, one number a sample, larger where the sample is harder.

A scoring function is called once a step as `score(logits, targets, losses, indices, epoch)` with logits (B, C) float32,
targets (B,) int64, unreduced losses (B,) and data set indices (B,) int64 on the device, and the number of the epoch; it
gives (B,) numbers of 0 or more, there. It must not wait for the device (no `.item()`, no `.cpu()`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acmds_optimizer.config import nearest
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.zoo.imports import load_callable

Scoring = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

FILE_TYPES = (".npy", ".csv", ".txt")


def loss(logits: Tensor, targets: Tensor, losses: Tensor, indices: Tensor, epoch: int) -> Tensor:
    """The sample's own loss."""
    return losses


def margin(logits: Tensor, targets: Tensor, losses: Tensor, indices: Tensor, epoch: int) -> Tensor:
    """(1 - (p_given - largest other p)) / 2, in [0, 1]: 0 where the model is sure of the given label, 1 of another.

    The margin of Pleiss et al., 2020 (Identifying mislabeled data using the area under the margin ranking), taken of
    probabilities instead of logits.
    """
    probabilities = logits.softmax(dim=-1)
    given = probabilities.gather(1, targets[:, None])
    others = probabilities.scatter(1, targets[:, None], -1.0).amax(dim=1)
    return (1.0 - (given[:, 0] - others)) / 2.0


def entropy(logits: Tensor, targets: Tensor, losses: Tensor, indices: Tensor, epoch: int) -> Tensor:
    """Entropy of the prediction over log C, in [0, 1]: blind to the label."""
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1) / math.log(max(2, logits.shape[1]))


def el2n(logits: Tensor, targets: Tensor, losses: Tensor, indices: Tensor, epoch: int) -> Tensor:
    """Length of the error vector, |p - onehot|, in [0, sqrt 2] (Paul et al., 2021, Deep learning on a data diet)."""
    return (logits.softmax(dim=-1) - torch.nn.functional.one_hot(targets, logits.shape[1])).norm(dim=-1)


class Forgetting:
    """How often a sample that was predicted right was predicted wrong at its next visit (Toneva et al., 2019).

    A sample that never was right counts every visit: it cannot have been forgotten more often. Keeps its counts on
    the device. What it gives is a total already, so it is taken as it is, not averaged.

    Args:
        size: samples of the data set.
        device: where the counts live.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.visits = torch.zeros(size, dtype=torch.int32, device=device)
        self.events = torch.zeros(size, dtype=torch.int32, device=device)
        self.learned = torch.zeros(size, dtype=torch.bool, device=device)
        self.right = torch.zeros(size, dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, targets: Tensor, losses: Tensor, indices: Tensor, epoch: int) -> Tensor:
        right = logits.argmax(dim=-1) == targets
        before = self.right.index_select(0, indices)
        events = self.events.index_select(0, indices) + (before & ~right).int()
        visits = self.visits.index_select(0, indices) + 1
        learned = self.learned.index_select(0, indices) | right
        for buffer, values in (
            (self.events, events), (self.visits, visits), (self.learned, learned), (self.right, right),
        ):  # fmt: skip
            buffer.index_copy_(0, indices, values)
        return torch.where(learned, events, visits).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        for name, value in vars(self).items():
            value.copy_(state[name])


SCORING: dict[str, Scoring] = {"loss": loss, "margin": margin, "entropy": entropy, "el2n": el2n}
"""Those without a memory, by name."""


def is_score_file(name: str) -> bool:
    """Whether the setting names a file of scores."""
    return name.endswith(FILE_TYPES)


def make_scoring(name: str, size: int, device: torch.device, num_classes: int | None) -> Scoring | None:
    """The scoring function called `name`; None for a file, whose scores stand.

    Args:
        name: a key of SCORING, `forgetting`, a file of FILE_TYPES, or `package.module:callable`.
        size: samples of the data set.
        device: where the training runs.
        num_classes: width of the logits in the check of a callable; None: 10.

    Raises:
        ConfigError: no such function, or one that does not do what a scoring function must.
    """
    if name in SCORING:
        return SCORING[name]
    if name == "forgetting":
        return Forgetting(size, device)
    if is_score_file(name):
        return None
    if ":" not in name:
        known = [*SCORING, "forgetting"]
        raise ConfigError(
            "scoring",
            [
                f"no scoring function is called {name!r}{nearest(name, known)}; known are {', '.join(known)}, "
                f"a file of scores ({', '.join(FILE_TYPES)}), and package.module:callable"
            ],
        )
    score: Scoring = load_callable(name, "scoring")
    check_scoring(score, name, min(size, 4), device, num_classes or 10)
    return score


def check_scoring(score: Scoring, name: str, count: int, device: torch.device, num_classes: int) -> None:
    """Call `score` on a made-up batch of the samples 0 to `count` - 1, so that a mistake is found before training.

    Raises:
        ConfigError: it raises, or gives something else than `count` finite numbers of 0 or more on the device.
    """
    logits = torch.linspace(-2.0, 2.0, count * num_classes, device=device).reshape(count, num_classes)
    targets = torch.arange(count, device=device) % num_classes
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    wanted = f"must give a tensor of shape ({count},) for a batch of {count} samples"
    try:
        result: Any = score(logits, targets, losses, torch.arange(count, device=device), 0)
    except Exception as error:
        raise ConfigError(
            "scoring", [f"{name}(logits, targets, losses, indices, epoch) raised {type(error).__name__}: {error}"]
        ) from error
    problem = None
    if not isinstance(result, Tensor):
        problem = f"{wanted}, but gave a {type(result).__name__}"
    elif tuple(result.shape) != (count,):
        problem = f"{wanted}, but gave one of shape {tuple(result.shape)}"
    elif result.device.type != device.type:
        problem = f"must leave its scores on {device.type}, but gave a tensor on {result.device.type}"
    elif not bool((torch.isfinite(result) & (result >= 0)).all()):
        problem = f"must give finite numbers of 0 or more, but gave {result.tolist()}"
    if problem:
        raise ConfigError("scoring", [f"{name} {problem}"])


def read_scores(path: str | Path, size: int) -> Tensor:
    """(size,) float32 difficulties in [0, 1], one a sample in the data set's order, from .npy or a text file.

    Raises:
        ConfigError: it cannot be read, or holds another number of values, or some outside [0, 1].
    """
    path = Path(path)
    try:
        values = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=1)
        scores = np.asarray(values, dtype=np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError("scoring", [f"{path} cannot be read as numbers: {error}"]) from None
    if scores.shape != (size,):
        raise ConfigError("scoring", [f"{path} holds {scores.shape} values, expected ({size},): one a training sample"])
    if not ((scores >= 0) & (scores <= 1)).all():
        low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
        raise ConfigError(
            "scoring", [f"{path}: difficulties must lie in [0, 1], but go from {low:g} to {high:g}; scale them"]
        )
    return torch.from_numpy(scores)
