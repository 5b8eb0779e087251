"""Images that grow with the training: which size is due, and what else has to change with it."""

from __future__ import annotations

import dataclasses

from acmds_optimizer.curriculum.resolution import Stages
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.distributed import Ranks
from acmds_optimizer.engine.step import TrainStep


class GrowingImages:
    """The stage in which a training stands.

    Args:
        stages: the sizes.
        train_step: its controller says what memory allows; its graphs are of one size of image.
        ranks: the processes that train together, whose images have one size.
    """

    def __init__(self, stages: Stages, train_step: TrainStep, ranks: Ranks) -> None:
        self._stages = stages
        self._step = train_step
        self._ranks = ranks
        self.number = -1
        """Of the stage; -1 before the first step."""

    @property
    def size(self) -> tuple[int, int]:
        """Of the images, (height, width)."""
        return self._stages.sizes[self.number]

    @property
    def most_bytes(self) -> float:
        """What a copy of all images at that size may take of the card: a fifth of it, and half of what is free."""
        reading, headroom = self._step.guard.controller.reading, self._step.guard.controller.limits.headroom_bytes
        return min(0.2 * (reading.budget_bytes - headroom), 0.5 * (reading.free_bytes - headroom))

    @property
    def work(self) -> float:
        """The pixels of a sample relative to full size."""
        return self._stages.work(self.number)

    def stand_at(self, number: int) -> None:
        """Go on at this stage, in which a training was stopped; at none where there is no such stage any more."""
        self.number = number if 0 <= number < len(self._stages.sizes) else -1

    def enter(self, progress: float) -> str:
        """Go to the stage that is due at `progress`, in [0, 1], or the one that fits; what to say if it is new."""
        controller, graphs = self._step.guard.controller, self._step.graphs
        number = self._stages.number(progress)
        if (peaks := controller.state.peaks).known:
            room = peaks.work_within(controller.reading.budget_bytes - controller.limits.headroom_bytes)
            number = self._stages.affordable(number, self.number, controller.config.min_batch_size, room)
        number = min(self._ranks.gather(number))
        if number == self.number:
            return ""
        self.number = number
        if graphs is not None:
            graphs.forget()
            controller.release_cache()
        controller.forget_times()
        height, width = self.size
        return f"images have {height}x{width} px from now on"

    def sized(self, batch: Batch) -> Batch:
        """The batch, its images at the size of the stage."""
        return dataclasses.replace(batch, inputs=self._stages.resize(batch.inputs, self.number))
