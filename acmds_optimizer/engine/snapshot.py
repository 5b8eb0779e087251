"""What of a trainer is in a checkpoint, and how it is put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from acmds_optimizer.config import to_dict
from acmds_optimizer.engine.checkpoint import briefly
from acmds_optimizer.errors import CheckpointError

if TYPE_CHECKING:
    from acmds_optimizer.engine.trainer import ACMDSTrainer

_PARTS = ("model", "optimizer", "schedule", "controller", "feedback", "sampler", "recorder")
_OF_EACH_RANK = ("controller", "recorder", "rng")
_OWN = ("epoch", "step", "seconds", "last_evaluation", "unvalidated", "last_epoch_loss")


def take(trainer: ACMDSTrainer) -> dict[str, Any]:
    """All that a run needs to continue, as tensors and plain values."""
    scaler, average, device = trainer.guard.scaler, trainer.average, trainer.device
    state = {
        **{name: getattr(trainer, name).state_dict() for name in _PARTS},
        "average": average.state_dict() if average is not None else {},
        "scaler": scaler.state_dict() if scaler is not None else {},
        "trainer": {**{name: getattr(trainer, name) for name in _OWN}, "best": trainer.best.state_dict()},
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
        "stage": trainer.growth.number if trainer.growth is not None else -1,
        "config": to_dict(trainer.config),
    }
    if trainer.ranks.several:
        state["ranks"] = trainer.ranks.gather({name: state[name] for name in _OF_EACH_RANK})
    return state


def restore(trainer: ACMDSTrainer, state: dict[str, Any]) -> None:
    """Continue from what `take` gave, be it with another number of processes.

    Raises:
        CheckpointError: it belongs to another model, optimizer or data set.
    """
    try:
        if len(of_ranks := state.get("ranks", ())) == trainer.ranks.world_size > 1:
            state = {**state, **of_ranks[trainer.ranks.rank]}
        for name in _PARTS:
            part = state[name]
            if name == "optimizer":  # goes on in the tensors that it is given where they need not be moved
                part = tree_map(lambda leaf: _own(leaf, trainer.device), part)
            if name == "feedback":
                same = state["config"].get("scoring", "loss") == trainer.config.scoring
                trainer.feedback.load_state_dict(part, with_scores=same)
                trainer.sampler.flagged = trainer.feedback.ignored  # by which the sampler, the next part, plans
            else:
                getattr(trainer, name).load_state_dict(part)
        trainer.scores.drop()
        # the optimizer has put tensors of its own in place of those that the guard has made
        trainer.controller.memory.track([list(values.values()) for values in trainer.optimizer.state.values()])
        if trainer.average is not None and state["average"]:
            trainer.average.load_state_dict(state["average"])
        elif trainer.average is not None:  # asked for only now, so it begins here
            trainer.average.module.load_state_dict(state["model"])
        if trainer.guard.scaler is not None and state["scaler"]:
            trainer.guard.scaler.load_state_dict(state["scaler"])
        for name in _OWN:
            setattr(trainer, name, state["trainer"][name])
        trainer.best.load_state_dict(state["trainer"]["best"])
        if trainer.growth is not None:
            trainer.growth.stand_at(state.get("stage", -1))
            trainer.resize_images()
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if trainer.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), trainer.device)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this model, optimizer or data set: {briefly(error)}"
        ) from None


def _own(leaf: Any, device: torch.device) -> Any:
    """A copy of a tensor on `device` or of a count, so that what it was loaded from can be loaded again."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and (leaf.device == device or leaf.dim() == 0) else leaf
