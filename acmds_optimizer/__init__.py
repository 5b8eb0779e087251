"""ACMDS: a PyTorch trainer that holds a memory headroom and feeds samples in a curriculum.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ACMDSError": "errors",
    "ACMDSTrainer": "engine.trainer",
    "AdaptiveCurriculumSampler": "curriculum.sampler",
    "BudgetedCpuMemory": "memory.device",
    "CurriculumConfig": "config",
    "DifficultyAwareDataset": "curriculum.dataset",
    "Guard": "memory.guard",
    "MemoryPressureController": "memory.controller",
    "MemoryPressureLevel": "memory.controller",
    "RTX3090ACMDSTrainer": "engine.trainer",
    "TrainConfig": "config",
    "run_training": "engine.run",
}

if TYPE_CHECKING:
    from acmds_optimizer.config import CurriculumConfig, TrainConfig
    from acmds_optimizer.curriculum.dataset import DifficultyAwareDataset
    from acmds_optimizer.curriculum.sampler import AdaptiveCurriculumSampler
    from acmds_optimizer.engine.run import run_training
    from acmds_optimizer.engine.trainer import ACMDSTrainer, RTX3090ACMDSTrainer
    from acmds_optimizer.errors import ACMDSError
    from acmds_optimizer.memory.controller import MemoryPressureController, MemoryPressureLevel
    from acmds_optimizer.memory.device import BudgetedCpuMemory
    from acmds_optimizer.memory.guard import Guard

__all__ = [
    "ACMDSError",
    "ACMDSTrainer",
    "AdaptiveCurriculumSampler",
    "BudgetedCpuMemory",
    "CurriculumConfig",
    "DifficultyAwareDataset",
    "Guard",
    "MemoryPressureController",
    "MemoryPressureLevel",
    "RTX3090ACMDSTrainer",
    "TrainConfig",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
