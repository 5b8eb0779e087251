"""What a trainer does where several processes train together: shares, a meeting once a step, gradients added up."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.engine.distributed import Ranks
from acmds_optimizer.engine.shares import Division, Standing, deal, divide
from acmds_optimizer.engine.step import TrainStep
from acmds_optimizer.memory.guard import GuardedResult

logger = logging.getLogger(__name__)


class Team:
    """This process's part in a run of several, step by step.

    Args:
        ranks: the processes.
        train_step: its guard's controller says how much this process can do.
        parameters: those that are trained, in the same order everywhere.
        config: effective batch and batch policy.
    """

    def __init__(
        self, ranks: Ranks, train_step: TrainStep, parameters: Sequence[nn.Parameter], config: CurriculumConfig
    ) -> None:
        self.ranks = ranks
        self.train_step = train_step
        self.parameters = parameters
        self.held = config.step_samples if config.batch_policy == "hold" else None
        self.division: Division | None = None
        """The shares in force."""
        self.stop = False
        """Whether any process was asked to stop; all know it since the same step."""
        self._counts: Iterator[tuple[int, int]] = iter(())

    def begin_epoch(self, step: int, seconds: float, stop: bool) -> float:
        """Agree before the first step; see `finish` for the arguments and the result."""
        return self._agree(self.ranks.gather(self._standing(0, seconds, stop)), step)

    def deal(self, start: int, stop: int) -> NDArray[np.int64]:
        """The positions from `start` to `stop` of an epoch's order that this process feeds, by the shares in force."""
        assert self.division is not None  # since begin_epoch
        part = deal(start, stop, self.division.shares, self.ranks.rank)
        self._counts = zip(part.own, part.totals, strict=True)
        return part.positions

    def next_counts(self) -> tuple[int, int, bool]:
        """Samples of the coming step: of this process, of all, and whether it is the last and of an odd size."""
        assert self.division is not None
        own, total = next(self._counts)
        return own, total, total != sum(self.division.shares)

    def give_up(self) -> None:
        """Tell the others that forward and backward of this step failed here for good. To be followed by the error."""
        self.ranks.give_up(len(self.parameters))

    def finish(
        self,
        result: GuardedResult[Tensor],
        losses: Tensor,
        sizes: Sequence[int],
        total: int,
        step: int,
        seconds: float,
        stop: bool,
    ) -> tuple[GuardedResult[Tensor], Tensor, float]:
        """Add up the gradients of all processes and step the optimizer.

        Args:
            result: of this process's forward and backward.
            losses: (n,) of its samples.
            sizes: its micro-batches.
            total: samples of the step, of all processes.
            step: number of the step.
            seconds: training time here.
            stop: whether this process was asked to stop.

        Returns:
            The result with the errors of the optimizer, the mean loss and difficulty (1, 2) over all processes, and the
            training time that counts for all.

        Raises:
            RankFailedError: another process gave up, or is gone.
            OutOfMemoryForGoodError: the optimizer's step does not fit here.
        """
        used = [parameter.grad is not None for parameter in self.parameters]
        means = torch.stack((losses.sum(), -torch.expm1(-losses).sum())).double() / total
        standings, used = self.ranks.meet(self._standing(max(sizes, default=0), seconds, stop), used)
        self.ranks.sum_gradients(self.parameters, used, means)
        events = self.train_step.guard.finish(self.train_step.update)
        seconds = self._agree(standings, step + 1)
        return dataclasses.replace(result, events=result.events + events), means[None], seconds

    def _standing(self, micro_batch: int, seconds: float, stop: bool) -> Standing:
        controller = self.train_step.guard.controller
        limit = controller.batch_size
        return Standing(limit, *controller.state.times.line(micro_batch or limit), seconds, stop)

    def _agree(self, standings: list[Standing], step: int) -> float:
        self.stop = any(standing.stop for standing in standings)
        division = divide(standings, self.held, step, self.division)
        if division is not self.division:
            logger.debug("step %d: the processes' shares are %s", step, division.shares)
        self.division = division
        return standings[0].seconds
