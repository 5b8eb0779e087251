"""One training run from a configuration: what `acmds-train` and every trial of `acmds-tune` do."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from acmds_optimizer import __version__
from acmds_optimizer.config import TrainConfig, to_dict
from acmds_optimizer.engine import checkpoint
from acmds_optimizer.engine import dry_run as dry_run_engine
from acmds_optimizer.engine.distributed import Ranks
from acmds_optimizer.engine.epochs import EpochLog
from acmds_optimizer.engine.flagged import TABLE, write_flagged
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.engine.scalars import ScalarLog, open_scalar_logs
from acmds_optimizer.engine.telemetry import Outcome, Progress, Recorder, to_plain, together
from acmds_optimizer.engine.trainer import ACMDSTrainer
from acmds_optimizer.errors import (
    ACMDSError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryForGoodError,
)
from acmds_optimizer.files import write_json
from acmds_optimizer.memory.device import open_memory, prefer_expandable_segments, usable_device
from acmds_optimizer.zoo.datasets import DataBundle, build_data, class_count
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import build_model, check_name, check_shape, freeze

logger = logging.getLogger(__name__)


def run_training(
    config: TrainConfig,
    *,
    output_dir: Path | None = None,
    resume: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train a model from a configuration, and keep the records.

    Where several processes train together, all call this, with settings that differ in nothing but what is of one
    card (memory, workers). The first of them writes; the others only their steps.csv and events.csv, in folders rank1,
    rank2 and so on.

    Args:
        config: all settings; its `output_dir` is not looked at.
        output_dir: folder for steps.csv, events.csv, config.json, environment.json, outcome.json and checkpoint.pt;
            None: nothing is written.
        resume: checkpoint, or the folder that holds one, to continue from.
        on_progress: called about twice a second, and after each validation.
        should_stop: asked before each step; the run ends cleanly, with a checkpoint, once it says yes.
        ranks: the processes that train together; None: those of torch.distributed's default group, if there is one.

    Returns:
        The figures of the run: of all processes, where there are several.

    Raises:
        ACMDSError: wrong settings or data (exit code 2), or a run that failed (exit code 1). An
            OutOfMemoryForGoodError has the figures until then in `partial`.
        RuntimeError: CUDA is not available and the CPU was not asked for.
    """
    ranks = ranks or Ranks.current()
    if output_dir is not None and not _continues(resume, output_dir) and _holds_a_run(output_dir):
        raise _already_a_run(output_dir)
    ranks.agree({name: value for name, value in to_dict(config).items() if name not in _OF_ONE_CARD})
    began = time.monotonic()
    torch.manual_seed(config.seed)
    device = usable_device(config.device)
    if device.index:  # for whatever names no device; of the first card it would only start CUDA sooner
        torch.cuda.set_device(device)
    check_name(config.model, pretrained=config.pretrained)
    with contextlib.ExitStack() as starting:
        with ranks.first_goes_ahead():
            bundle = build_data(config)
            starting.enter_context(_waking(device))
            model = make_model(config, bundle)
        memory = open_memory(config.device, config.memory_limit_gb)
        if not ranks.first:
            torch.manual_seed(config.seed + ranks.rank)  # dropout is to differ
        if memory.device.type == "cuda":
            torch.cuda.manual_seed(config.seed + ranks.rank)
        optimizer = build_optimizer(model, config)
        state = _with_settings(checkpoint.load(resume), config, optimizer) if resume is not None else None
        _check_classes(state, bundle, config)
    trainer = ACMDSTrainer(
        model, bundle.train, optimizer, config,
        memory=memory, val_dataset=bundle.val, bundle=bundle, ranks=ranks,
    )  # fmt: skip
    if config.patience_epochs is not None and bundle.val is None and ranks.first:
        logger.warning("patience_epochs does nothing: no samples are held out for validation")
    if state is not None:
        trainer.load_state_dict(state)
        if trainer.finished and not trainer.unvalidated and ranks.first:
            logger.info(
                "the run had ended already, after %d steps, by %s; with a larger one it goes on",
                trainer.step, trainer.ended_by,
            )  # fmt: skip
    keeps = output_dir is not None and bool(config.checkpoint_every or config.checkpoint_every_steps)
    held = contextlib.ExitStack()
    if output_dir is not None:  # only now: what cannot start leaves no folder behind
        new = not _continues(resume, output_dir)
        _open_records(trainer, config, output_dir, trainer.step if state else None, held, new=new)
        output_dir = output_dir if ranks.first else None
    logger.debug("ready to train %.1f s after the start", time.monotonic() - began)
    try:
        trainer.on_progress = on_progress
        trainer.should_stop = should_stop or (lambda: False)
        _train(trainer, config, output_dir, describe_data(bundle), keeps=keeps)
        outcome = together(ranks.gather(_outcome(trainer)))
    except (OutOfMemoryForGoodError, DivergedError) as error:
        error.partial = _outcome(trainer)
        raise
    finally:
        trainer.shutdown()
        memory.close()
        held.close()
    if output_dir is not None:
        write_json(output_dir / "outcome.json", to_plain(outcome))
    return outcome


def _open_records(
    trainer: ACMDSTrainer,
    config: TrainConfig,
    folder: Path,
    resume_step: int | None,
    held: contextlib.ExitStack,
    *,
    new: bool,
) -> None:
    """Begin to write the records of a run; of several processes, of this one. `held` keeps others from the folder."""
    logs: list[ScalarLog] = []
    ranks = trainer.ranks
    if not ranks.first:
        folder = folder / f"rank{ranks.rank}"
    try:
        if ranks.first:
            logs = open_scalar_logs(config, folder, resume_step)
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            held.enter_context(_alone_in(folder))
            if new and _holds_a_run(folder):  # one that started later than this one has ended already
                raise _already_a_run(folder)
            write_json(folder / "config.json", to_dict(config))
            write_json(folder / "environment.json", environment(trainer.device) | {"processes": ranks.world_size})
    except OSError as error:
        raise ConfigError("output_dir", [f"{folder} cannot be written: {error}"]) from None
    sums = trainer.recorder.state_dict()
    trainer.recorder = Recorder(folder, config.difficulty_window, resume_step, logs)
    trainer.recorder.load_state_dict(sums)


def _train(
    trainer: ACMDSTrainer, config: TrainConfig, output_dir: Path | None, data: dict[str, Any], *, keeps: bool
) -> None:
    """Train; `output_dir` is where this process writes what is written once, `keeps` whether there are checkpoints."""
    first_epoch = saved_epoch = trainer.epoch
    files = checkpoint.CheckpointFolder(output_dir, config.keep_checkpoints) if keeps and output_dir else None
    epochs = EpochLog(output_dir, trainer.step - trainer.unvalidated)  # without the row of what is validated again

    def save(*, best: bool = False) -> None:
        if not keeps:
            return
        state = trainer.state_dict()  # of several processes all have a part in it
        if files is not None:
            files.save(state | {"data": data}, trainer.step, best=best)

    def after_step() -> None:
        if config.checkpoint_every_steps and trainer.step % config.checkpoint_every_steps == 0:
            save()

    def after_epoch(figures: dict[str, float]) -> None:
        nonlocal saved_epoch
        validated = "is_best" in figures
        if validated:  # else a resumed run will write its row
            difficulty = trainer.dataset.difficulty_scores
            ranks = epochs.write(trainer.epoch_number, trainer.step, trainer.seconds, figures, difficulty)
            figures |= ranks
            trainer.recorder.scalars(trainer.step - 1, {"difficulty": difficulty})
        is_best = bool(figures.pop("is_best", False))
        trainer.recorder.scalars(trainer.step - 1, figures)
        epoch = f"epoch {trainer.epoch_number}" + ("" if validated else ", stopped before its validation")
        logger.info("%s: %s", epoch, describe_epoch(figures, is_best=is_best))
        if trainer.epoch == first_epoch + 1 and (advice := spare_room(trainer)):
            logger.info("%s", advice)
        due = 0 < config.checkpoint_every <= trainer.epoch - saved_epoch
        if due or is_best or trainer.finished or trainer.stopping:
            save(best=is_best)
            saved_epoch = trainer.epoch

    trainer.after_step = after_step
    try:
        trainer.fit(after_epoch)
    except Exception:
        if trainer.unvalidated and not trainer.ranks.several:  # its validation failed, but the epoch is trained
            try:
                save()
            except ACMDSError as error:
                logger.warning("the epoch that was trained could not be saved: %s", error)
        raise
    finally:
        epochs.close()
    best = trainer.best
    if best.exhausted and best.value is not None:
        logger.info(
            "stopped early: no better %s than %.4f, of epoch %d, in %d epochs (patience_epochs)",
            best.metric, best.value, best.epoch, best.epochs_since,
        )  # fmt: skip
    gate = trainer.feedback.gate
    if output_dir is not None and gate is not None and gate.flagged.any():
        write_flagged(output_dir, trainer.dataset.base_dataset, gate, data["class_names"])
        logger.info("%d samples are flagged as mislabelled: see %s", gate.flagged.sum(), output_dir / TABLE)


def spare_room(trainer: ACMDSTrainer) -> str | None:
    """What to raise where only `max_batch_size` kept micro-batches from growing within the optimizer's batch."""
    controller, ceiling = trainer.controller, trainer.config.max_batch_size
    step = trainer.config.step_samples // trainer.ranks.world_size
    twice = min(2 * ceiling, step)
    held_back = trainer.config.batch_policy == "hold" and controller.batch_size == controller.limits.buckets[-1]
    if not held_back or twice <= ceiling or not controller.keeps_headroom(twice):
        return None
    return (
        f"max_batch_size {ceiling} keeps micro-batches from growing, though {twice} would keep the headroom as well: a "
        f"higher one, up to {step}, leaves the optimizer's batch as it is and may be faster"
    )


def describe_epoch(figures: Mapping[str, float], *, is_best: bool) -> str:
    """The figures of an epoch in one line."""
    words = [f"loss {figures['epoch_loss']:.4f}"]
    if "val_loss" in figures:
        words.append(f"validation {figures['val_loss']:.4f}, accuracy {figures['val_accuracy']:.4f}")
        words[-1] += " (best)" if is_best else ""
    words.append(f"{figures['samples_per_second']:,.0f} samples/s, batch {figures['batch_size']}")
    if figures["oom_events"]:
        words.append(f"{figures['oom_events']:.0f} OOM recovered")
    return ", ".join(words)


def describe_data(bundle: DataBundle) -> dict[str, Any]:
    """What a checkpoint says of its data, as plain values: what one needs to use the weights elsewhere."""
    return {
        "num_classes": bundle.num_classes,
        "class_names": bundle.class_names,
        "image_shape": list(bundle.image_shape),
        "mean": list(bundle.mean) if bundle.mean is not None else None,
        "std": list(bundle.std) if bundle.std is not None else None,
    }


def evaluate_checkpoint(state: dict[str, Any], config: TrainConfig) -> dict[str, float]:
    """Validate the weights in a checkpoint, the averaged ones if it has them, as the run that wrote it would.

    Args:
        state: what `checkpoint.load` gives.
        config: all settings; model and data are to be those of the checkpoint.

    Returns:
        val_loss, val_accuracy and val_top5.

    Raises:
        ACMDSError: not a checkpoint of this model, or data without validation samples.
    """
    if config.device != "cpu":
        prefer_expandable_segments()
    memory = open_memory(config.device, config.memory_limit_gb)
    bundle = build_data(config)
    if bundle.val is None:
        raise DataError(f"{config.dataset}: nothing is held out for validation; give a val/ folder or --val-fraction")
    _check_classes(state, bundle, config)
    model = make_model(config, bundle)
    try:
        model.load_state_dict(checkpoint.final_weights(state))
    except RuntimeError as error:
        said = checkpoint.briefly(error)
        raise CheckpointError(f"the checkpoint does not fit {config.model} on {config.dataset}: {said}") from None
    # the validation set in the place of the training set, which would be decoded for nothing; a file of scores has none
    # of its samples
    with ACMDSTrainer(
        model, bundle.val, build_optimizer(model, config),
        dataclasses.replace(config, ema_decay=None, scoring="loss", augment=False),
        memory=memory, val_dataset=bundle.val, bundle=bundle,
    ) as trainer:  # fmt: skip
        return trainer.evaluate()


_OF_ONE_CARD = ("device", "memory_limit_gb", "target_headroom_gb", "gc_threshold_gb", "num_workers", "output_dir")
"""Settings in which the processes of a run may differ."""

_KNOWN = {
    "digits": ((1, 8, 8), 10, (1618, 179)),
    "cifar10": ((3, 32, 32), 10, (50_000, 10_000)),
    "cifar100": ((3, 32, 32), 100, (50_000, 10_000)),
}
"""Shape of an image, classes, and images for training and validation of data sets that a dry run need not download."""


def dry_run(config: TrainConfig) -> list[str]:
    """A summary of the model, and what it would need on a card, without a GPU and without training.

    Raises:
        ACMDSError: as for `run_training`.
    """
    known = _KNOWN.get(config.dataset)
    shape: tuple[int, ...]
    if known is not None and config.image_size is None:
        shape, classes, counts = known
        black = torch.zeros((), dtype=torch.uint8)
        train, val = (TensorImages(black.expand(count, *shape), np.arange(count) % classes) for count in counts)
        bundle = DataBundle(train, val, None, None, shape)
        bundle.num_classes = class_count(bundle, config.num_classes)
    else:
        bundle = build_data(config)
        shape = bundle.image_shape
    resident = dry_run_engine.resident_bytes(config, bundle)
    prediction = dry_run_engine.predict(make_model(config, bundle), shape, config, resident)
    return dry_run_engine.report(prediction, shape, config)


def make_model(config: TrainConfig, bundle: DataBundle) -> nn.Module:
    """The model that the configuration names, for this data."""
    assert bundle.num_classes is not None  # build_data always knows it
    check_shape(config.model, bundle.image_shape)
    size = (bundle.image_shape[1], bundle.image_shape[2]) if len(bundle.image_shape) == 3 else None
    model = build_model(
        config.model,
        bundle.num_classes,
        in_channels=bundle.image_shape[0],
        image_size=size,
        pretrained=config.pretrained,
    )
    freeze(model, config.freeze)
    return model


def _outcome(trainer: ACMDSTrainer) -> Outcome:
    return trainer.recorder.outcome(
        train_loss=trainer.last_epoch_loss,
        val_loss=trainer.last_evaluation.get("val_loss"),
        val_accuracy=trainer.last_evaluation.get("val_accuracy"),
        val_top5=trainer.last_evaluation.get("val_top5"),
        best_epoch=trainer.best.epoch,
        epochs=trainer.epoch,
        seconds=trainer.seconds,
        stopped_early=not trainer.finished,
    )


def _check_classes(state: dict[str, Any] | None, bundle: DataBundle, config: TrainConfig) -> None:
    """Refuse data whose class numbers mean something else than in the checkpoint, where both have names for them.

    Raises:
        CheckpointError: they do.
    """
    before, now = (state or {}).get("data", {}).get("class_names"), bundle.class_names
    if before is None or now is None:
        return
    for number, (was, is_now) in enumerate(zip_longest(before, now)):
        if was != is_now:
            raise CheckpointError(f"{config.dataset}: class {number} is {is_now!r}, but {was!r} in the checkpoint")


def _with_settings(state: dict[str, Any], config: TrainConfig, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The checkpoint with the optimizer's settings of `config`, which otherwise would be those it was saved with.

    Raises:
        CheckpointError: it belongs to another model or optimizer.
    """
    try:
        before = state["config"]
        for name in ("model", "optimizer"):
            if before.get(name, now := getattr(config, name)) != now:
                raise CheckpointError(f"the checkpoint is of {name} {before[name]!r}, so it cannot go on as {now!r}")
        state["schedule"]["base_lrs"] = [config.lr for _ in state["schedule"]["base_lrs"]]
        for saved, asked in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=False):
            saved |= {name: asked[name] for name in ("weight_decay", "momentum", "nesterov") if name in asked}
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint is not whole: {error!r}") from None
    return state


@contextlib.contextmanager
def _waking(device: torch.device) -> Iterator[None]:
    """Start CUDA and load cuDNN meanwhile: half a second, in which the host has the model to build."""

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # whoever needs the card will say better what is wrong with it
            images = torch.zeros(1, 8, 8, 8, device=device)
            torch.nn.functional.conv2d(images, images)

    if device.type != "cuda":
        yield
        return
    prefer_expandable_segments()  # the process is ours
    thread = threading.Thread(target=wake, name="acmds-wake", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # also after an error: a process must not end while its CUDA begins


def _continues(resume: Path | None, folder: Path) -> bool:
    return resume is not None and (resume if resume.is_dir() else resume.parent).resolve() == folder.resolve()


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (checkpoint.NEWEST, "config.json", "steps.csv"))


def _already_a_run(folder: Path) -> ConfigError:
    return ConfigError("output_dir", [f"{folder} holds a run already; use --resume, or another folder"])


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within this context no other process can write a run into the folder; it is free when the process dies."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers inherit that, and may outlive us
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                "output_dir", [f"another process is writing a run into {folder}; wait for it, or give another folder"]
            ) from None
        except OSError as error:
            logger.debug("no lock in %s: %s", folder, error)  # a file system without locks
        yield


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
