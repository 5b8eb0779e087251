"""One training run from a configuration: what `acmds-train` and every trial of `acmds-tune` do."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acmds_optimizer import __version__
from acmds_optimizer.config import TrainConfig, to_dict
from acmds_optimizer.engine import checkpoint
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.engine.scalars import open_scalar_logs
from acmds_optimizer.engine.telemetry import Outcome, Recorder, to_plain
from acmds_optimizer.engine.trainer import ACMDSTrainer, Progress
from acmds_optimizer.errors import CheckpointError, ConfigError, DivergedError, OutOfMemoryForGoodError
from acmds_optimizer.memory.device import open_memory
from acmds_optimizer.zoo.datasets import build_data
from acmds_optimizer.zoo.models import build_model

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


def run_training(
    config: TrainConfig,
    *,
    output_dir: Path | None = None,
    resume: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Train a model from a configuration, and keep the records.

    Args:
        config: all settings; its `output_dir` is not looked at.
        output_dir: folder for steps.csv, events.csv, config.json, environment.json, outcome.json and checkpoint.pt;
            None: nothing is written.
        resume: checkpoint, or the folder that holds one, to continue from.
        on_progress: called about twice a second, and after each validation.
        should_stop: asked before each step; the run ends cleanly, with a checkpoint, once it says yes.

    Returns:
        The figures of the run.

    Raises:
        ACMDSError: wrong settings or data (exit code 2), or a run that failed (exit code 1). An
            OutOfMemoryForGoodError has the figures until then in `partial`.
        RuntimeError: CUDA is not available and the CPU was not asked for.
    """
    if output_dir is not None and not _continues(resume, output_dir) and _holds_a_run(output_dir):
        raise ConfigError("output_dir", [f"{output_dir} holds a run already; use --resume, or another folder"])
    began = time.monotonic()
    torch.manual_seed(config.seed)
    memory = open_memory(config.device, config.memory_limit_gb)
    bundle = build_data(config)
    assert bundle.num_classes is not None  # build_data always knows it
    size = bundle.image_shape[-1] if len(bundle.image_shape) == 3 else None
    model = build_model(config.model, bundle.num_classes, in_channels=bundle.image_shape[0], image_size=size)
    if memory.device.type == "cuda":
        torch.cuda.manual_seed(config.seed)
    optimizer = build_optimizer(model, config)
    state = _with_settings(checkpoint.load(resume), config, optimizer) if resume is not None else None
    trainer = ACMDSTrainer(
        model, bundle.train, optimizer, config,
        memory=memory, val_dataset=bundle.val, bundle=bundle,
    )  # fmt: skip
    if state is not None:
        trainer.load_state_dict(state)
    if output_dir is not None:  # only now: what cannot start leaves no folder behind
        try:
            logs = open_scalar_logs(config, output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / "config.json", to_dict(config))
        except OSError as error:
            raise ConfigError("output_dir", [f"{output_dir} cannot be written: {error}"]) from None
        write_json(output_dir / "environment.json", environment(memory.device))
        sums = trainer.recorder.state_dict()
        trainer.recorder = Recorder(output_dir, config.difficulty_window, trainer.step if state else None, logs)
        trainer.recorder.load_state_dict(sums)
    logger.debug("ready to train %.1f s after the start", time.monotonic() - began)
    try:
        trainer.on_progress = on_progress
        trainer.should_stop = should_stop or (lambda: False)
        _train(trainer, config, output_dir)
        outcome = _outcome(trainer)
    except (OutOfMemoryForGoodError, DivergedError) as error:
        error.partial = _outcome(trainer)
        raise
    finally:
        trainer.shutdown()
        memory.close()
    if output_dir is not None:
        write_json(output_dir / "outcome.json", to_plain(outcome))
    return outcome


def _train(trainer: ACMDSTrainer, config: TrainConfig, output_dir: Path | None) -> None:
    saved_epoch = trainer.epoch

    def after_epoch(figures: dict[str, float]) -> None:
        nonlocal saved_epoch
        trainer.recorder.scalars(trainer.step, figures)
        words = [f"epoch {trainer.epoch}: loss {figures['epoch_loss']:.4f}"]
        if "val_loss" in figures:
            words.append(f"validation {figures['val_loss']:.4f}, accuracy {figures['val_accuracy']:.4f}")
        words.append(f"{figures['samples_per_second']:,.0f} samples/s, batch {figures['batch_size']}")
        if figures["oom_events"]:
            words.append(f"{figures['oom_events']:.0f} OOM recovered")
        logger.info(", ".join(words))
        due = config.checkpoint_every and trainer.epoch - saved_epoch >= config.checkpoint_every
        if output_dir is not None and (due or trainer.finished or trainer.should_stop()) and config.checkpoint_every:
            trainer.save_checkpoint(output_dir / CHECKPOINT)
            saved_epoch = trainer.epoch

    trainer.fit(after_epoch)


def _outcome(trainer: ACMDSTrainer) -> Outcome:
    return trainer.recorder.outcome(
        train_loss=trainer.last_epoch_loss,
        val_loss=trainer.last_evaluation.get("val_loss"),
        val_accuracy=trainer.last_evaluation.get("val_accuracy"),
        epochs=trainer.epoch,
        seconds=trainer.seconds,
        stopped_early=not trainer.finished,
    )


def _with_settings(state: dict[str, Any], config: TrainConfig, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The checkpoint with the optimizer's settings of `config`, which otherwise would be those it was saved with.

    Raises:
        CheckpointError: it belongs to another model or optimizer.
    """
    before = state["config"]
    for name in ("model", "optimizer"):
        if before.get(name, now := getattr(config, name)) != now:
            raise CheckpointError(f"the checkpoint is of {name} {before[name]!r}, so it cannot go on as {now!r}")
    state["schedule"]["base_lrs"] = [config.lr for _ in state["schedule"]["base_lrs"]]
    for saved, asked in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=False):
        saved |= {name: asked[name] for name in ("weight_decay", "momentum", "nesterov") if name in asked}
    return state


def _continues(resume: Path | None, folder: Path) -> bool:
    return resume is not None and (resume if resume.is_dir() else resume.parent).resolve() == folder.resolve()


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CHECKPOINT, "config.json", "steps.csv"))


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: versions, hardware and the command."""
    import torchvision

    facts: dict[str, Any] = {
        "acmds": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "device": str(device),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 2),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`; a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
