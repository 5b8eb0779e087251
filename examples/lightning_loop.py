"""A LightningModule that an out-of-memory error cannot end, by `Guard` and `MemoryPressureController`.

    python examples/lightning_loop.py                  # on the CPU, as a card of 16 MB
    python examples/lightning_loop.py --device cuda    # on a GPU

Manual optimization, and a step that can be undone: the batch of Lightning's loader stays what it is, and runs in
micro-batches as large as memory allows. Halfway someone takes half of the memory. The last line is JSON, as in
bare_loop.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from acmds_optimizer import BudgetedCpuMemory, CurriculumConfig, Guard, MemoryPressureController
from acmds_optimizer.zoo.models import build_model

EPOCHS, SAMPLES, BATCH = 4, 512, 128


class SafeModule(pl.LightningModule):
    """Any module, with a guarded training step.

    Args:
        config: headroom, limit and bounds of the micro-batch.
    """

    def __init__(self, config: CurriculumConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model = build_model("small_cnn", num_classes=10)
        self.times_seen = [0] * SAMPLES
        self.losses: list[float] = []
        self.micro_batches: list[int] = []
        self.oom_caught = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def on_train_start(self) -> None:
        self.controller = MemoryPressureController(self.device, self.config)
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)  # one, not a list
        self.guard = Guard(self, optimizer, self.controller)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets, indices = batch

        def attempt(micro_batch: int) -> torch.Tensor:
            total = torch.zeros((), device=self.device)
            for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True):
                loss = nn.functional.cross_entropy(self.model(x), y, reduction="sum") / len(inputs)
                self.manual_backward(loss)
                total += loss.detach()
            self.guard.optimizer_step()  # last
            return total

        result = self.guard.run(attempt, min(self.controller.decide().batch, len(inputs)))
        self.controller.observe(result.micro_batch)

        self.losses.append(result.value.item())
        self.micro_batches.append(result.micro_batch)
        self.oom_caught += len(result.events)
        for index in indices.tolist():
            self.times_seen[index] += 1

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == EPOCHS // 2 - 1:  # someone takes half of the memory
            taken = self.controller.vram_total // 2
            if isinstance(self.controller.memory, BudgetedCpuMemory):
                self.controller.memory.neighbour_bytes = taken
            else:
                self.hog = torch.empty(taken, dtype=torch.uint8, device=self.device)

    def on_train_end(self) -> None:
        self.controller.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    device = parser.parse_args().device
    side, limit_gb = (12, 16 / 1024) if device == "cpu" else (64, 0.75)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    images, labels = torch.rand(SAMPLES, 3, side, side), torch.randint(0, 10, (SAMPLES,))
    loader = DataLoader(TensorDataset(images, labels, torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True)
    config = CurriculumConfig(
        memory_limit_gb=limit_gb,
        target_headroom_gb=limit_gb / 8,
        min_batch_size=16,
        max_batch_size=BATCH,
        knee_gain_fraction=0.0,  # memory alone decides; the knee would want each step timed
    )
    module = SafeModule(config)
    trainer = pl.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu"}[device], devices=1, max_epochs=EPOCHS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    figures = {
        "steps": trainer.global_step,
        "micro_batches": module.micro_batches,
        "losses": module.losses,
        "oom_caught": module.oom_caught,
        "times_seen": sorted(set(module.times_seen)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
