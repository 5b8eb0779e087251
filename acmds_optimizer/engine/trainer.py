"""The training loop: order, batch, guarded step, observation, decision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from acmds_optimizer.config import GIB, CurriculumConfig, TrainConfig
from acmds_optimizer.curriculum.dataset import DifficultyAwareDataset
from acmds_optimizer.curriculum.feedback import Feedback
from acmds_optimizer.curriculum.resolution import Stages
from acmds_optimizer.curriculum.sampler import AdaptiveCurriculumSampler
from acmds_optimizer.engine import checkpoint, probe, snapshot
from acmds_optimizer.engine.average import WeightAverage
from acmds_optimizer.engine.batches import Batch, DataSource, EpochStream
from acmds_optimizer.engine.data import make_source, resident_limit
from acmds_optimizer.engine.distributed import Ranks
from acmds_optimizer.engine.evaluate import Best, evaluate
from acmds_optimizer.engine.graphs import wanted_graphs
from acmds_optimizer.engine.growth import GrowingImages
from acmds_optimizer.engine.loss import LossFunction, Mixing, make_loss, relabelled
from acmds_optimizer.engine.prepare import (
    check_optimizer,
    checkpoint_activations,
    modes_of,
    put_into,
    set_up_cuda,
    training_modes,
)
from acmds_optimizer.engine.rehearsal import check_size, rehearse
from acmds_optimizer.engine.schedule import LearningRate
from acmds_optimizer.engine.scores import PendingScores
from acmds_optimizer.engine.step import StepClock, TrainStep, parts
from acmds_optimizer.engine.team import Team
from acmds_optimizer.engine.telemetry import Progress, Recorder, memory_columns
from acmds_optimizer.errors import OutOfMemoryForGoodError, first_line
from acmds_optimizer.memory.controller import MemoryPressureController
from acmds_optimizer.memory.device import MemoryDevice, MemoryReading, made_current
from acmds_optimizer.memory.guard import Guard, GuardedResult
from acmds_optimizer.memory.law import Decision
from acmds_optimizer.memory.out_of_memory import is_out_of_memory
from acmds_optimizer.zoo.datasets import DataBundle, describe

logger = logging.getLogger(__name__)

_NEIGHBOUR_SHARE = 0.03


Method = TypeVar("Method", bound=Callable[..., Any])


def _on_its_device(method: Method) -> Method:
    """With the trainer's device as PyTorch's current one, on whose streams events are recorded and graphs captured."""

    @functools.wraps(method)
    def run(self: ACMDSTrainer, *args: Any, **kwargs: Any) -> Any:
        with made_current(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class ACMDSTrainer:
    """Trains a classifier with a held memory headroom and a curriculum.

    Args:
        model: maps inputs (B, ...) to logits (B, C). Moved to the device. Parts of it in evaluation mode, such as
            frozen normalisations, stay so; where the whole model is in it, all of it is to train.
        dataset: map-style, of (image, label); a DifficultyAwareDataset keeps its scores.
        optimizer: over the model's parameters. Between epochs groups may be added, parameters frozen or no longer, and
            rates set unless `config` is a TrainConfig, whose schedule sets them.
        config: CurriculumConfig, or a TrainConfig for its epochs and schedules.
        device_id: CUDA device number, `"cuda:N"`, or `"cpu"` for a card on the CPU with a budget.
        val_dataset: for `evaluate`; None: none.
        bundle: how images become inputs; None: they are taken at their stored size.
        memory: an open device to use in place of `device_id`.
        recorder: where step and event rows go; None: only figures are kept.
        loss_fn: (logits, targets) -> losses (B,), unreduced; None: cross-entropy.
        ranks: the processes that train together; None: those of torch.distributed's default group, if there is one.

    Raises:
        DataError: the optimizer cannot train this model.
        RuntimeError: CUDA is not available and the CPU was not asked for.

    Example:
        >>> with ACMDSTrainer(model, dataset, optimizer, CurriculumConfig(target_headroom_gb=2)) as trainer:
        ...     for _ in range(10):
        ...         print(trainer.train_epoch()["epoch_loss"])
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        optimizer: torch.optim.Optimizer,
        config: CurriculumConfig | None = None,
        device_id: int | str | torch.device = 0,
        *,
        val_dataset: Dataset[Any] | None = None,
        bundle: DataBundle | None = None,
        memory: MemoryDevice | None = None,
        recorder: Recorder | None = None,
        loss_fn: LossFunction | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config or CurriculumConfig()
        self.ranks = ranks or Ranks.current()
        self.controller = MemoryPressureController(device_id, self.config, memory=memory)
        self.device = self.controller.device
        self.recorder = recorder or Recorder(None, self.config.difficulty_window)
        base = dataset.base_dataset if isinstance(dataset, DifficultyAwareDataset) else dataset
        inputs = bundle or describe(base)
        stages = Stages.from_config(self.config, inputs.image_shape)
        with made_current(self.device), self._advising():
            self._set_up_model(model, optimizer, loss_fn, inputs.image_shape)
            self.growth = GrowingImages(stages, self.train_step, self.ranks) if stages is not None else None
            self._set_up_data(dataset, val_dataset, bundle, inputs)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        """Training time so far, without validation and checkpoints."""
        self.last_epoch_loss: float | None = None
        self.last_evaluation: dict[str, float] = {}
        self.unvalidated = False
        """Whether an epoch has ended that is not validated yet."""
        self.best = Best()
        if isinstance(self.config, TrainConfig):
            self.best = Best(self.config.best_metric, self.config.patience_epochs)
        self.should_stop: Callable[[], bool] = lambda: False
        self.on_progress: Callable[[Progress], None] | None = None
        self.after_step: Callable[[], None] = lambda: None
        self._last_progress = 0.0
        self._clock = StepClock(self.device)
        self._unagreed_seconds = 0.0

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Say what to change where the card has no room for what a training begins with."""
        try:
            yield
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = first_line(error)
        budget = self.controller.memory.read().budget_bytes / GIB
        raise OutOfMemoryForGoodError(
            f"out of memory before the first step: the model, the optimizer's state and the data that stay on "
            f"{self.device} do not fit (budget {budget:.3g} GB). Try a smaller model, a larger --memory-limit-gb, or "
            f"free memory held by other processes. The error was: {said}"
        )

    def _set_up_model(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None,
        shape: tuple[int, ...],
    ) -> None:
        check_optimizer(model, optimizer)
        self.model = model.to(self.device)
        self._modes = training_modes(self.model)
        if self.device.type == "cuda":
            set_up_cuda(self.config)
        dtype, channels_last = self.ranks.of_first(probe.choose(self.model, self.config, self.device, shape))
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        train_config = self.config if isinstance(self.config, TrainConfig) else None
        self.average: WeightAverage | None = None
        if train_config is not None and train_config.ema_decay is not None:
            self.average = WeightAverage(self.model, train_config.ema_decay)
            self.controller.memory.track(list(self.average.state_dict().values()))
        if self.config.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.optimizer = optimizer
        _move_optimizer_state(optimizer, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.schedule = LearningRate(optimizer, self.config)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.controller.memory.track(self.ranks.prepare(self._trained, self.model))
        self.guard = Guard(self.model, optimizer, self.controller, scaler)
        self.train_step = TrainStep(
            self.model, self.guard, make_loss(self.config, loss_fn), dtype, channels_last,
            cuda_graphs=wanted_graphs(self.config, self.device), compiled=self.config.compile_model,
        )  # fmt: skip
        self.team = Team(self.ranks, self.train_step, self._trained, self.config) if self.ranks.several else None

    def _set_up_data(
        self, dataset: Dataset[Any], val: Dataset[Any] | None, bundle: DataBundle | None, inputs: DataBundle
    ) -> None:
        if isinstance(dataset, DifficultyAwareDataset):
            self.dataset = dataset
        else:
            self.dataset = DifficultyAwareDataset(dataset, alpha=self.config.curriculum_alpha)
        num_classes = inputs.num_classes
        self.feedback = Feedback(self.dataset.scores, self.config, self.device, num_classes)
        self.train_step.keep_logits = self.feedback.needs_logits
        self.train_step.num_classes = num_classes
        self.scores = PendingScores(self.feedback, self.ranks, num_classes)
        self.mixing = Mixing(self.config, num_classes, bundle.image_shape if bundle is not None else None)
        room = self.controller.reading.budget_bytes - self.controller.limits.headroom_bytes
        source = partial(
            make_source, config=self.config, device=self.device, channels_last=self.train_step.channels_last,
            resident_limit_bytes=resident_limit(self.device, room),
        )  # fmt: skip
        self.source = source(self.dataset.base_dataset, inputs, train=True)
        self.val_source: DataSource | None = None
        if val is self.dataset.base_dataset and isinstance(self.config, TrainConfig) and not self.config.augment:
            self.val_source = self.source  # decoded, and kept on the device, once
        elif val is not None:
            self.val_source = source(val, bundle, train=False)
        self.total_epochs = self.config.epochs if isinstance(self.config, TrainConfig) else 10
        self.sampler = AdaptiveCurriculumSampler(
            self.dataset, self.controller, self.config, total_epochs=self.total_epochs
        )

    # --- progress

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]: of the samples, or of max_steps or max_seconds if nearer."""
        share = (self.epoch + self.sampler.position / max(1, self.sampler.num_samples)) / self.total_epochs
        if isinstance(self.config, TrainConfig):
            if self.config.max_steps:
                share = max(share, self.step / self.config.max_steps)
            if self.config.max_seconds:
                share = max(share, self.seconds / self.config.max_seconds)
        return min(1.0, share)

    @property
    def epoch_number(self) -> int:
        """Number, from 1, of the epoch that ended last, or of the one in whose middle the training stands."""
        return self.epoch + (0 < self.sampler.position < self.sampler.num_samples)

    @property
    def finished(self) -> bool:
        return bool(self.ended_by)

    @property
    def ended_by(self) -> str:
        """The setting that has ended the training, or would where it is resumed; empty while there is none."""
        config = self.config
        if self.best.exhausted:
            return f"patience_epochs {self.best.patience}"
        if isinstance(config, TrainConfig) and config.max_steps and self.step >= config.max_steps:
            return f"max_steps {config.max_steps}"
        if isinstance(config, TrainConfig) and config.max_seconds and self.seconds >= config.max_seconds:
            return f"max_seconds {config.max_seconds:g}"
        return f"epochs {self.total_epochs}" if self.epoch >= self.total_epochs or self.progress >= 1.0 else ""

    @property
    def stopping(self) -> bool:
        """Whether the training is to end after the present step; of several processes, whether all know it."""
        return self.team.stop if self.team is not None else self.should_stop()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as far as can be told now."""
        position = self.epoch + self.sampler.position / max(1, self.sampler.num_samples)
        expected = round(self.step / position * self.total_epochs) if position > 0 and self.step else 0
        limit = self.config.max_steps if isinstance(self.config, TrainConfig) else None
        return min(expected, limit) if limit and expected else (limit or expected)

    # --- training

    @_on_its_device
    def train_epoch(self) -> dict[str, float]:
        """Train on the rest of the present epoch.

        Returns:
            epoch_loss (mean unweighted loss of the samples trained on), samples, steps, samples_per_second, batch_size
            (the present micro-batch) and oom_events, all of the run so far but epoch_loss.

        Raises:
            OutOfMemoryForGoodError: a step does not fit at any size.
            DivergedError: the loss is not finite.
        """
        if self.sampler.position == 0:
            self.sampler.set_epoch(self.epoch, self.progress)
        if self.model.training:  # what was put into evaluation mode since the last epoch stays so
            self._modes = modes_of(self.model)
        put_into(self._modes)
        self._enter_trained()
        if self.train_step.graphs is not None:
            self.train_step.graphs.begin_epoch()
        self.controller.begin_step()
        clock = time.perf_counter()
        if any(self.ranks.gather(not self.controller.state.peaks.known)):
            self._rehearse()
        if self.team is not None:
            self.seconds = self.team.begin_epoch(self.step, self._own_seconds(), self.should_stop())
        while self._goes_on():
            division = self.team and self.team.division
            with self._open_stream() as stream:
                while self._goes_on() and (self.team and self.team.division) is division:
                    self._one_step(stream, clock)
                    clock = self._count_time(clock)
                    if not self._at_an_end:
                        self.after_step()
                        clock = time.perf_counter()
                    self._report()
        ended = self._at_an_end
        self.scores.enter(self.epoch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.sampler.position >= self.sampler.num_samples:
            self.epoch, self.sampler.position = self.epoch + 1, 0
            self._judge_noise()
            self.sampler.set_epoch(self.epoch, min(1.0, self.epoch / self.total_epochs))
            self.unvalidated = True
        self.recorder.waited(self._count_time(clock) - clock)
        self.unvalidated |= self.progress >= 1.0
        if self.unvalidated:
            self._share_statistics()
        self.recorder.flush()
        self.last_epoch_loss = self.recorder.end_epoch() if self.unvalidated else self.recorder.epoch_loss
        if ended:  # only now, so that a run that goes on from here knows that a validation is due
            self.after_step()
        return self._figures()

    def _count_time(self, since: float) -> float:
        """Count the time since then as training; now."""
        now = time.perf_counter()
        if self.team is None:
            self.seconds += now - since
        else:
            self._unagreed_seconds += now - since
        return now

    def _figures(self) -> dict[str, float]:
        figures, loss = self.recorder.figures, self.last_epoch_loss
        return {
            "epoch_loss": loss if loss is not None else float("nan"),
            "samples": figures["samples"],
            "steps": figures["steps"],
            "samples_per_second": self.recorder.samples_per_second or 0.0,
            "batch_size": self.controller.batch_size,
            "oom_events": figures["oom_events"],
        }

    def _enter_trained(self) -> None:
        """Where other parameters are trained than before, take up what is made for them, and learn memory anew."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        same = len(trained) == len(self._trained) and all(a is b for a, b in zip(trained, self._trained, strict=True))
        if all(self.ranks.gather(same)):
            return
        self.ranks.agree({"trained": [name for name, p in self.model.named_parameters() if p.requires_grad]})
        self._trained = trained
        self.guard.create_optimizer_state()
        if self.train_step.graphs is not None:
            self.train_step.graphs.set_parameters(trained)
        if self.team is not None:
            self.team.parameters = trained
            self.controller.memory.track(self.ranks.prepare(trained, self.model))
        self.controller.forget()

    def _rehearse(self) -> None:
        plan, work = self.sampler.plan, self._enter_stage()
        with self.source.stream(plan.order, plan.weights, epoch=self.epoch, augment=True) as stream:
            batch = self._take(stream, self.controller.limits.buckets[-1])
        self.controller.memory.track([batch.inputs, batch.targets])
        if self.growth is not None:
            check_size(self.train_step, batch)
        rehearse(
            self.train_step, self._clock, batch, work,
            lambda event: self.recorder.out_of_memory(event, self._where(), recovered=True),
        )  # fmt: skip

    @property
    def _at_an_end(self) -> bool:
        """Whether the epoch's samples, or the training, have come to their end; without a TrainConfig it has none."""
        over = self.progress >= 1.0 and isinstance(self.config, TrainConfig)
        return over or self.sampler.position >= self.sampler.num_samples

    def _goes_on(self) -> bool:
        return not self._at_an_end and not self.stopping

    def _open_stream(self) -> EpochStream:
        """What is left of the epoch; of several processes, this one's part of it."""
        plan, start, positions = self.sampler.plan, self.sampler.position, None
        if self.team is not None:
            start, positions = 0, self.team.deal(start, self.sampler.num_samples)
        return self.source.stream(
            plan.order, plan.weights, epoch=self.epoch, start=start, augment=True, positions=positions
        )

    def _next_counts(self, decision: Decision) -> tuple[int, int, bool]:
        """Samples of the coming step: of this process, of all, and whether it is the last and of an odd size."""
        if self.team is not None:
            return self.team.next_counts()
        count = self.config.step_samples if self.config.batch_policy == "hold" else decision.batch
        left = self.sampler.num_samples - self.sampler.position
        if left == count + 1:
            count += 1  # a batch of one sample has no variance, and BatchNorm refuses it
        return min(count, left), min(count, left), left < count

    def _one_step(self, stream: EpochStream, began: float) -> None:
        before = self.controller.reading
        work = self._enter_stage()
        decision = self.controller.decide(work)
        count, total, odd = self._next_counts(decision)
        lr = self.schedule.set(self.progress, total / self.ranks.world_size)
        try:
            batch = self._take(stream, count)
            result, sizes = self._forward_backward(batch, total, decision, work, odd=odd)
        except Exception:
            if self.team is not None:
                self.team.give_up()
            raise
        losses = self.feedback.losses(result.value) if sizes else result.value
        if self.team is not None:
            with self._recording_errors():
                result, losses, self.seconds = self.team.finish(
                    result, losses, sizes, total, self.step, self._own_seconds(), self.should_stop()
                )
        if self.average is not None:  # after the step has gone through, so that there is nothing to undo
            self.average.update_parameters(self.model, total / self.config.step_samples)
        self.scores.add(batch, result.value, total, self.epoch)
        self.guard.zero_grad()  # what lies between steps is then the model and its optimizer
        self.sampler.position += total
        result = dataclasses.replace(result, value=losses)
        self._observe(decision, total, result, sizes, work, before, lr, began)
        self.step += 1

    def _forward_backward(
        self, batch: Batch, total: int, decision: Decision, work: float, *, odd: bool
    ) -> tuple[GuardedResult[torch.Tensor], list[int]]:
        """The guarded part of a step: all of it, or of several processes all but the optimizer.

        Returns:
            Its result, and the sizes of its micro-batches.
        """
        if not len(batch):  # the last step of an epoch may be too small for all
            return GuardedResult(torch.empty(0, device=self.device), 0, ()), []
        self.controller.memory.track([batch.inputs, batch.targets])
        first = parts(len(batch), min(decision.batch, len(batch)))[0]  # of which graphs are captured
        graphs, captures = self.train_step.graphs, 0
        self.train_step.compiles = not odd
        if graphs is not None:
            captures = graphs.captures
            first = graphs.make_room(decision, first, work, odd=odd)
        self._clock.start()

        def attempt(micro_batch: int) -> torch.Tensor:
            if graphs is not None and micro_batch < first:
                graphs.drop_above(micro_batch)
            if self.team is not None:
                return self.train_step.accumulate(batch, micro_batch, total)
            return self.train_step(batch, micro_batch)

        with self._recording_errors():
            result = self.guard.run(attempt, first, sample_work=work)
        sizes = parts(len(batch), result.micro_batch)
        steady = not result.events and (graphs is None or graphs.captures == captures)
        self._clock.stop(sizes[0], len(sizes), steady=steady, replayed=graphs is not None and graphs.replayed)
        return result, sizes

    def _share_statistics(self) -> None:
        self.ranks.average_statistics(self.model)
        if self.average is not None:
            self.ranks.average_statistics(self.average.module)

    def _take(self, stream: EpochStream, count: int) -> Batch:
        """The next samples, prepared; where they do not fit beside what is cached, after the cache was released.

        Raises:
            OutOfMemoryForGoodError: they do not fit at all.
        """
        batch = None
        for last_try in (False, True):
            try:
                batch = stream.take(count) if batch is None else batch
                return self._prepared(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error)
            if not last_try:
                stream.read_less_ahead()
                if self.train_step.graphs is not None:
                    self.train_step.graphs.drop_above(0)
                self.controller.release_cache()
        raise OutOfMemoryForGoodError(
            f"out of memory: the {count} samples of a step do not fit on {self.device}. Try a smaller "
            f"--effective-batch-size, or free memory held by other processes. The error was: {message}"
        )

    def _judge_noise(self) -> None:
        if self.feedback.end_epoch(self.progress):
            assert self.feedback.flagged is not None
            count = int(self.feedback.flagged.sum())
            what = "count nothing" if self.feedback.guesses is None else "learn the predicted class"
            message = f"the noise gate is on: {count} of {len(self.dataset)} samples {what} for now"
            logger.info("epoch %d: %s", self.epoch, message)
            self._event("noise_gate", message)
            if self.train_step.graphs is not None and self.feedback.guesses is not None:
                self.train_step.graphs.drop_above(0)  # they have no soft targets
        self.sampler.flagged = self.feedback.ignored

    def _enter_stage(self) -> float:
        """The pixels of a sample relative to full size, at the resolution that is due now."""
        if self.growth is None:
            return 1.0
        if message := self.growth.enter(self.progress):
            self.resize_images()
            logger.info("step %d: %s", self.step, message)
            self._event("resolution", message)
        return self.growth.work

    def resize_images(self) -> None:
        """Have images that lie on the device at the size of the stage, where there is room."""
        if self.growth is not None:
            with contextlib.suppress(torch.OutOfMemoryError):  # they are then made smaller batch by batch
                self.source.resize(self.growth.size, self.growth.most_bytes)
            self.controller.read_base()

    def _prepared(self, batch: Batch) -> Batch:
        """With the labels that are to be learned, mixed, and at the size that is due."""
        if self.feedback.guesses is not None and self.feedback.gate is not None:
            batch = relabelled(batch, self.feedback.guesses, self.feedback.gate.classes)
        batch = self.mixing(batch, self.epoch, self.sampler.position)
        return batch if self.growth is None else self.growth.sized(batch)

    def _observe(
        self,
        decision: Decision,
        total: int,
        result: GuardedResult[torch.Tensor],
        sizes: list[int],
        work: float,
        before: MemoryReading,
        lr: float,
        began: float,
    ) -> None:
        for event in result.events:
            self.recorder.out_of_memory(event, self._where(), recovered=True)
        if not sizes:
            sizes = [0]
        graphs, releases = self.train_step.graphs, self.controller.releases
        reading = before
        if sizes[0]:
            untold = graphs.untold(sizes[0]) if graphs is not None else {}
            reading = self.controller.observe(sizes[0], sample_work=work, **untold)
        if graphs is not None:
            graphs.end_step(reading.allocated_bytes)
        for timing in self._clock.timings():
            self.controller.time(timing.micro_batch, timing.seconds)
            if graphs is not None:
                graphs.timed(timing)
        if abs(reading.budget_bytes - before.budget_bytes) > _NEIGHBOUR_SHARE * self.controller.vram_total:
            change = (reading.budget_bytes - before.budget_bytes) / GIB
            self._event("neighbour_change", f"the budget changed by {change:+.3g} GB")
        if self.controller.releases > releases:
            self._event("emergency_gc", "cached blocks were released")
        row = {
            "step": self.step,
            "epoch": self.epoch,
            "samples_seen": int(self.recorder.figures["samples"]) + total,
            "effective_batch": total,
            "micro_batch": sizes[0],
            "micro_batches": len(sizes),
            **memory_columns(decision, reading, self.config.target_headroom_gb),
            "oom_events": len(result.events),
            "alloc_retries": reading.alloc_retries - before.alloc_retries,
            "seconds": time.perf_counter() - began,
            "lr": lr,
        }
        self.recorder.step(
            row,
            result.value,
            reserved_bytes=reading.peak_reserved_bytes,
            budget_bytes=reading.budget_bytes,
            headroom_bytes=self.controller.limits.headroom_bytes,
        )

    @contextlib.contextmanager
    def _recording_errors(self) -> Iterator[None]:
        try:
            yield
        except OutOfMemoryForGoodError as error:
            for event in error.events:
                self.recorder.out_of_memory(event, self._where(), recovered=False)
            raise

    def _own_seconds(self) -> float:
        """Training time by this process's clock, of which `seconds` is what all have agreed upon."""
        seconds, self._unagreed_seconds = self.seconds + self._unagreed_seconds, 0.0
        return seconds

    def _where(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, "seconds": self.seconds}

    def _event(self, kind: str, message: str) -> None:
        self.recorder.note(self._where(), kind, message, self.controller.reading, self.controller.batch_size)

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.on_progress is None or (now - self._last_progress < 0.5 and not force):
            return
        self._last_progress = now
        self.recorder.flush(wait=False)
        reading = self.controller.reading
        self.on_progress(
            Progress(
                step=self.step,
                total_steps=self.total_steps,
                epoch=self.epoch,
                samples_per_second=self.recorder.samples_per_second,
                batch_size=self.controller.batch_size,
                free_gb=(reading.budget_bytes - reading.peak_reserved_bytes) / GIB,
                target_headroom_gb=self.config.target_headroom_gb,
                loss=self.recorder.last_loss,
                val_loss=self.last_evaluation.get("val_loss"),
                val_accuracy=self.last_evaluation.get("val_accuracy"),
                oom_events=int(self.recorder.figures["oom_events"]),
                seconds=self.seconds,
            )
        )

    @property
    def final_model(self) -> nn.Module:
        """What is validated and exported: the running average of the weights under `ema_decay`, else the model."""
        return self.average.module if self.average is not None else self.model

    @_on_its_device
    def evaluate(self) -> dict[str, float]:
        """val_loss, val_accuracy and val_top5 of `final_model`, see `engine.evaluate`; empty without validation."""
        if self.val_source is None:
            return {}
        step = self.train_step
        self.last_evaluation = evaluate(
            self.final_model, lambda model, inputs: step.logits(inputs, model), step.loss.own, self.val_source,
            self.controller, self.ranks,
        )  # fmt: skip
        if step.graphs is not None:
            step.graphs.clear_surroundings()
        self.controller.begin_step()
        self._report(force=True)
        return self.last_evaluation

    def fit(self, on_epoch: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train and validate until the configured end or `should_stop`, of any process where there are several.

        `on_epoch` is called after each epoch, and after one that `should_stop` cut off: `unvalidated` then, or in the
        middle of it.
        """
        while not self.stopping and (self.unvalidated or not self.finished):
            figures = self._figures() if self.unvalidated else self.train_epoch()
            if self.unvalidated and not self.stopping:
                # who asked to stop wants the checkpoint, not to wait for a validation: a resumed run begins with it
                figures |= self.evaluate()
                self.unvalidated = False
                self.schedule.end_epoch(figures.get("val_loss", figures["epoch_loss"]))
                figures["is_best"] = self.best.update(figures, self.epoch_number)
            if on_epoch is not None:
                on_epoch(figures)

    # --- checkpoints

    @_on_its_device
    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to continue, as tensors and plain values. To be called by all processes at once.

        As in PyTorch's own, the tensors of model and optimizer are the live ones: to keep a state in memory while
        training goes on, take `copy.deepcopy` of it.
        """
        self.recorder.flush()
        self.scores.enter(self.epoch)
        self._share_statistics()
        return snapshot.take(self)

    @_on_its_device
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: it belongs to another model, optimizer or data set.
        """
        if self.train_step.graphs is not None:
            self.train_step.graphs.release()
        snapshot.restore(self, state)

    def save_checkpoint(self, path: str | Path) -> None:
        """Write a checkpoint; a reader sees the old file or the whole new one."""
        checkpoint.save(path, self.state_dict())

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: the file is missing, truncated, foreign, or does not fit.
        """
        self.load_state_dict(checkpoint.load(path))

    def shutdown(self) -> None:
        """Stop the monitor and the workers, write what is pending, give the device back. Idempotent."""
        if self.train_step.graphs is not None:
            self.train_step.graphs.release()
        self.controller.shutdown()
        self.source.close()
        if self.val_source is not None:
            self.val_source.close()
        self.recorder.close()

    def __enter__(self) -> ACMDSTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


RTX3090ACMDSTrainer = ACMDSTrainer


def _move_optimizer_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """A model moved after its optimizer has stepped leaves the optimizer's state behind."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[name] = value.to(device)
