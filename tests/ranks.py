"""Scenarios for tests/test_distributed.py, which the processes of a run play together; importable, to be spawned."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from acmds_optimizer import ACMDSError, ACMDSTrainer, BudgetedCpuMemory, TrainConfig, run_training
from acmds_optimizer.errors import ConfigError

PLENTY = 2**30
A_THIRD = 150_000
"""Bytes of a card on which micro-batches of the two-layer network have to be small."""


def data(count: int = 500, noise: float = 0.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 20, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    flipped = torch.rand(count, generator=generator) < noise
    return TensorDataset(inputs, torch.where(flipped, 1 - labels, labels))


class Double(nn.Module):
    """The rest of the model computes in float64, so that only the order of sums can differ."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double()


class Sometimes(nn.Module):
    """A layer that is used only where the first input of a micro-batch is positive, as layer dropping does."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(20, 20).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.extra(inputs) if float(inputs.detach()[0, 0]) > 0 else inputs


def make(
    limit: int = PLENTY, count: int = 500, noise: float = 0.0, layers: Any = (), frozen: str = "none", **settings: Any
) -> ACMDSTrainer:
    torch.manual_seed(2)
    model = nn.Sequential(Double(), *layers, nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = {
        "target_headroom_gb": 0.000001, "max_batch_size": 64, "enable_amp": False, "epochs": 2, "seed": 3,
        "knee_gain_fraction": 0.0,
    } | settings  # fmt: skip
    return ACMDSTrainer(
        model, data(count, noise), optimizer, TrainConfig(**config),
        memory=BudgetedCpuMemory(limit), val_dataset=data(101),
    )  # fmt: skip


def facts(trainer: ACMDSTrainer) -> dict[str, Any]:
    """What tests compare."""
    return {
        "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
        "average": trainer.average and torch.cat([p.flatten() for p in trainer.average.module.parameters()]),
        "statistics": [b.clone() for b in trainer.model.buffers() if b.is_floating_point()],
        "scores": trainer.dataset.scores.average.clone(),
        "counts": trainer.dataset.scores.count.clone(),
        "flagged": trainer.feedback.flagged,
        "loss": trainer.last_epoch_loss,
        "evaluation": trainer.last_evaluation,
        "step": trainer.step,
        "micro_batch": trainer.controller.batch_size,
        "figures": dict(trainer.recorder.figures),
        "shares": trainer.team.division.shares if trainer.team and trainer.team.division else None,
    }


def fitted(**settings: Any) -> dict[str, Any]:
    """A whole run."""
    trainer = make(**settings)
    trainer.fit()
    return facts(trainer)


# --- what the processes play: each takes the rank, and gives what this process saw


def equal(rank: int) -> dict[str, Any]:
    return fitted(limit=A_THIRD if rank == 1 else PLENTY, ema_decay=0.9)


SMALL_STEPS: dict[str, Any] = {"max_batch_size": 32, "epochs": 8}
"""So that even in pieces of one sample a step has fewer operations than there are between two errors."""


def struck(rank: int) -> dict[str, Any]:
    """Errors at every 1501st operation on one of the processes, forward, backward and optimizer alike."""
    trainer = make(**SMALL_STEPS)
    operations = itertools.count(1)

    def strike(operation: Any) -> None:
        if trainer.model.training and next(operations) % 1501 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        trainer.controller.memory.on_operation = strike  # type: ignore[attr-defined]
    trainer.fit()
    return facts(trainer)


def struck_optimizer(rank: int) -> dict[str, Any]:
    """An error in the third step's optimizer, in its middle, on one of the processes."""
    trainer = make()
    steps = itertools.count(1)
    update = trainer.train_step.update

    def update_struck() -> None:
        if next(steps) == 3:
            operations = itertools.count(1)

            def strike(operation: Any) -> None:
                if next(operations) == 40:
                    trainer.controller.memory.on_operation = None  # type: ignore[attr-defined]
                    raise torch.OutOfMemoryError("CUDA out of memory")

            trainer.controller.memory.on_operation = strike  # type: ignore[attr-defined]
        update()

    if rank == 1:
        trainer.train_step.update = update_struck  # type: ignore[method-assign]
    trainer.fit()
    return facts(trainer)


def free(rank: int) -> dict[str, Any]:
    return fitted(limit=2 * A_THIRD if rank == 1 else PLENTY, batch_policy="free", count=3000)


def noisy(rank: int) -> dict[str, Any]:
    return fitted(noise=0.2, noise_rate=0.2, scoring="margin", epochs=8)


def sometimes(rank: int) -> dict[str, Any]:
    trainer = make(layers=[Sometimes()])
    trainer.train_epoch()
    return facts(trainer)


def thawed(limit: int = PLENTY) -> dict[str, Any]:
    """A layer is trained from the second epoch on only, and another no longer in the third."""
    trainer = make(limit, frozen="1.", epochs=3)
    first, last = (trainer.model.get_submodule(name) for name in "13")
    trainer.train_epoch()
    first.requires_grad_(True)
    trainer.optimizer.add_param_group({"params": list(first.parameters()), "lr": 0.02})
    trainer.train_epoch()
    last.requires_grad_(False)
    kept = last.get_parameter("weight").clone()
    trainer.train_epoch()
    return facts(trainer) | {"kept": torch.equal(kept, last.get_parameter("weight"))}


def unfrozen(rank: int) -> dict[str, Any]:
    return thawed(limit=A_THIRD if rank == 1 else PLENTY)


class Sliced(nn.Linear):
    """Its weight is a part of a larger one, as of a first layer that is cut to fewer channels."""

    def __init__(self) -> None:
        super().__init__(20, 20, bias=False, dtype=torch.float64)
        self.weight = nn.Parameter((torch.eye(20, 60, dtype=torch.float64) + 0.1)[:, ::3])


def sliced(rank: int) -> dict[str, Any]:
    layer = Sliced()
    with torch.no_grad():
        layer.weight += rank  # until all begin with the first one's
    return fitted(layers=[layer])


def normalised(rank: int) -> dict[str, Any]:
    return fitted(layers=[nn.BatchNorm1d(20)], ema_decay=0.5)


def own_start(rank: int) -> dict[str, Any]:
    """Each process has drawn weights of its own, some of which are frozen, and has other statistics."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 2))
    model[0].requires_grad_(False)
    model.get_buffer("1.running_mean").fill_(rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = TrainConfig(target_headroom_gb=0.000001, enable_amp=False)
    with ACMDSTrainer(model, data(), torch.optim.SGD(trained, lr=0.1), config, memory=BudgetedCpuMemory(PLENTY)):
        return {name: value.clone() for name, value in model.state_dict().items()}


def cut_off(rank: int) -> dict[str, Any]:
    """A run that ends in the middle of its first epoch, and is validated there."""
    trainer = make(layers=[nn.BatchNorm1d(20)], max_steps=5)
    trainer.fit()
    found = facts(trainer)
    trainer.state_dict()  # what is saved is what was validated
    return found | {"saved": trainer.evaluate()}


def few(rank: int) -> dict[str, Any]:
    """An epoch of 131 samples, whose last step would be too small for all; one of a single sample."""
    return {str(count): fitted(count=count) for count in (131, 1)}


def stopped(rank: int) -> dict[str, Any]:
    """One of the processes is asked to stop, in the middle of an epoch; the state goes on in a new trainer."""
    trainer = make()
    if rank == 1:
        trainer.should_stop = lambda: trainer.step >= 2
    trainer.fit()
    state = trainer.state_dict()
    goes_on = make()
    goes_on.load_state_dict(copy.deepcopy(state))
    goes_on.fit()
    return {"stopped_at": trainer.step, "state": state} | facts(goes_on)


def hopeless(rank: int) -> dict[str, Any]:
    """One of the processes has no memory left from the third step on."""
    trainer = make()

    def neighbour() -> None:
        if rank == 1 and trainer.step == 3:
            trainer.controller.memory.neighbour_bytes = PLENTY  # type: ignore[attr-defined]

    trainer.after_step = neighbour
    try:
        trainer.fit()
    except ACMDSError as error:
        return {"error": f"{type(error).__name__}: {error}", "step": trainer.step}
    return {"error": ""}


def differ(rank: int) -> dict[str, Any]:
    """The processes are started with settings of their own, before anything is read or written."""
    config = TrainConfig(model="small_cnn", dataset="no such data", device="cpu", lr=rank + 0.5)
    try:
        run_training(config, output_dir=Path("no such folder"))
    except ConfigError as error:
        return {"error": str(error), "made": Path("no such folder").exists()}
    return {"error": ""}


SCENARIOS: list[Callable[[int], dict[str, Any]]] = [
    differ, equal, struck, struck_optimizer, free, noisy, sometimes, unfrozen, sliced, normalised, own_start, cut_off,
    few, stopped, hopeless,
]  # fmt: skip


def _play(rank: int, world: int, folder: str, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        if scenario.__name__ in names:
            try:
                results[scenario.__name__] = scenario(rank)
            except Exception:  # noqa: BLE001  # told to the test
                torch.save({scenario.__name__: {"failed": traceback.format_exc()}}, Path(folder) / f"{rank}.pt")
                return  # the other is told by the end of the connection
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def play(world: int, names: list[str], timeout_s: float = 120.0) -> list[dict[str, Any]]:
    """Play scenarios on `world` processes; what each saw, by scenario."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["acmds_optimizer.engine.run"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_play, args=(rank, world, folder, names)) for rank in range(world)]
        for process in processes:
            process.start()
        until = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, "the processes wait for one another"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
