"""Step and epoch figures for TensorBoard and Weights & Biases, under the same names as in steps.csv."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from acmds_optimizer.config import TrainConfig, to_dict
from acmds_optimizer.errors import ConfigError

STEP_SCALARS = (
    "loss", "lr", "micro_batch", "effective_batch", "headroom_gb", "budget_gb", "peak_allocated_gb", "oom_events",
    "seconds", "difficulty_mean",
)  # fmt: skip
"""Columns of steps.csv that are worth a curve."""


class ScalarLog(Protocol):
    """Where scalars go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardLog:
    """Scalars in `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """Scalars of a Weights & Biases run; WANDB_MODE=offline keeps them in `folder`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)  # else wandb warns, and puts its files elsewhere
        self._run = wandb.init(project="acmds", dir=str(folder), name=folder.name, config=to_dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_scalar_logs(config: TrainConfig, folder: Path) -> list[ScalarLog]:
    """The logs that the configuration asks for.

    Raises:
        ConfigError: a package is missing; says what to install.
    """
    wanted: dict[str, Any] = {
        "tensorboard": (config.tensorboard, lambda: TensorBoardLog(folder / "tensorboard")),
        "wandb": (config.wandb, lambda: WandbLog(folder, config)),
    }
    missing = [name for name, (asked, _) in wanted.items() if asked and find_spec(name) is None]
    if missing:
        raise ConfigError(
            "logging", [f"{n} is not installed: pip install 'acmds[{n}]', or leave it out" for n in missing]
        )
    return [make() for asked, make in wanted.values() if asked]
