"""Growing micro-batches on one batch, before the first step, and undone: so that the first real step fits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.prepare import evaluating
from acmds_optimizer.engine.step import StepClock, TrainStep
from acmds_optimizer.errors import ConfigError
from acmds_optimizer.memory.guard import OutOfMemoryEvent
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

_REHEARSALS = 12
_LAST_LEAP = 4
_TIGHT = 1.05
"""Reserved by allocated, up to which blocks are kept: what is left of a search for kernels would count in each step."""


def rehearse(
    train_step: TrainStep,
    clock: StepClock,
    batch: Batch,
    sample_work: float,
    on_error: Callable[[OutOfMemoryEvent], None],
) -> None:
    """Learn the memory and time of growing micro-batches, forward and backward only, and undo it all.

    So the first real step is taken at a size that is known to fit, and accumulation does not crawl until then.

    Args:
        train_step: its guard's controller chooses the sizes, and learns.
        clock: of the training's steps.
        batch: as many samples as the largest micro-batch, where there are so many.
        sample_work: size of its largest sample relative to the usual one.
        on_error: told of each out-of-memory error on the way.

    Raises:
        OutOfMemoryForGoodError: not one sample fits.
    """
    guard, controller = train_step.guard, train_step.guard.controller
    failed, last, fitted = 0, 0, False
    for _ in range(_REHEARSALS):
        size = min(controller.decide(sample_work, rehearsal=True).batch, len(batch))
        if size == last:
            break
        # two sizes tell enough for a last leap
        leap = controller.state.peaks.sizes >= 2 and size <= _LAST_LEAP * last
        # the first that fits is timed too; the first real steps will tell the time of the others
        repeats = 1 if fitted else 1 + controller.state.times.needed
        last = size
        for repeat in range(repeats + 1):
            # the first use of a size may search for kernels, which takes memory: one that seems too large goes again
            if repeat == repeats and controller.keeps_headroom(size, sample_work):
                break
            clock.start()
            event = guard.rehearse(
                lambda micro: train_step.rehearse(batch, micro), size, failed, sample_work=sample_work
            )
            if event is not None:
                failed += 1
                on_error(event)
                break
            fitted = True
            clock.stop(size, 1, steady=repeat > 0)
            controller.observe(size, sample_work=sample_work)
        if controller.device.type == "cuda":
            torch.cuda.synchronize(controller.device)
        for timing in clock.timings():
            controller.time(timing.micro_batch, timing.seconds)
        if leap:
            break
    guard.optimizer.zero_grad(set_to_none=True)
    reading = controller.reading
    loose = reading.peak_reserved_bytes > _TIGHT * reading.peak_allocated_bytes
    if loose or controller.decide(sample_work).batch != last:  # else the blocks are those that the first step needs
        controller.release_cache(collect=False)


def check_size(train_step: TrainStep, batch: Batch) -> None:
    """Run one sample forward, whose images are smaller than was asked for, to see that the model can take them.

    Args:
        train_step: its model is run in evaluation mode.
        batch: its first sample is used.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with evaluating(train_step.model), torch.no_grad():
            train_step.logits(batch.inputs[:1])
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        size = "x".join(str(side) for side in batch.inputs.shape[2:])
        message = f"the model cannot take images of {size} px ({error}); leave start_resolution at 1"
        raise ConfigError("start_resolution", [message]) from error
