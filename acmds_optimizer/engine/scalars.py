"""Figures for TensorBoard and Weights & Biases, under the names and steps of steps.csv and epochs.csv."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from acmds_optimizer.config import TrainConfig, to_dict
from acmds_optimizer.errors import ConfigError

STEP_SCALARS = (
    "loss", "lr", "micro_batch", "effective_batch", "headroom_gb", "budget_gb", "peak_allocated_gb", "oom_events",
    "seconds", "difficulty_mean",
)  # fmt: skip
"""Columns of steps.csv that are worth a curve."""


HISTOGRAM_EDGES = np.linspace(0.0, 1.0, 51)
"""Edges of a histogram's bins; what is drawn as one lies in [0, 1]."""


class ScalarLog(Protocol):
    """Where figures go: a number becomes a point of a curve, a tensor (n,) in [0, 1] a histogram."""

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None: ...
    def close(self) -> None: ...


class TensorBoardLog:
    """Figures in `folder`, for `tensorboard --logdir`; a resumed run hides what is there from its first step on."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._writer.add_histogram(name, value.float().cpu().numpy(), step, bins=HISTOGRAM_EDGES)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """Figures of a Weights & Biases run, which a resume goes on with; WANDB_MODE=offline keeps them in `folder`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)  # else wandb warns, and puts its files elsewhere
        known = folder / "wandb_run_id.txt"
        run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
        try:
            self._run = wandb.init(
                project="acmds", dir=str(folder), name=folder.name, config=to_dict(config), id=run_id,
                resume="allow" if run_id else None,
            )  # fmt: skip
        except wandb.Error as error:
            with suppress(OSError):
                folder.rmdir()  # where it is new, nothing is left behind
            advice = "log in with `wandb login`, keep the run here with WANDB_MODE=offline, or leave --wandb out"
            raise ConfigError("logging", [f"wandb cannot start: {str(error).rstrip('.')}: {advice}"]) from None
        known.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        import wandb

        def drawn(value: float | Tensor) -> Any:
            if not isinstance(value, Tensor):
                return value
            return wandb.Histogram(np_histogram=np.histogram(value.float().cpu().numpy(), HISTOGRAM_EDGES))

        self._run.log({name: drawn(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_scalar_logs(config: TrainConfig, folder: Path, resume_step: int | None = None) -> list[ScalarLog]:
    """The logs that the configuration asks for; resume_step: the first step of a resumed run, from 0.

    Raises:
        ConfigError: a package is missing, or wandb cannot start; says what to do.
    """
    wanted: dict[str, Any] = {
        "tensorboard": (config.tensorboard, lambda: TensorBoardLog(folder / "tensorboard", resume_step)),
        "wandb": (config.wandb, lambda: WandbLog(folder, config)),
    }
    missing = [name for name, (asked, _) in wanted.items() if asked and find_spec(name) is None]
    if missing:
        raise ConfigError(
            "logging", [f"{n} is not installed: pip install 'acmds[{n}]', or leave it out" for n in missing]
        )
    return [make() for asked, make in wanted.values() if asked]
