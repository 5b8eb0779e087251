"""A plain PyTorch loop that an out-of-memory error cannot end, by `Guard` and `MemoryPressureController`.

    python examples/bare_loop.py                  # on the CPU, as a card of 16 MB
    python examples/bare_loop.py --device cuda    # on a GPU

The effective batch is 128 whatever happens: each step runs in micro-batches as large as memory allows. Halfway someone
takes half of the memory; the step that fails is undone, and run again in smaller pieces. The last line is JSON: the
steps, their micro-batches and losses, the errors caught, and how often each sample was trained on.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from acmds_optimizer import BudgetedCpuMemory, CurriculumConfig, Guard, MemoryPressureController
from acmds_optimizer.zoo.models import build_model

EPOCHS, SAMPLES, BATCH = 4, 512, 128

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
device = parser.parse_args().device
side, limit_gb = (12, 16 / 1024) if device == "cpu" else (64, 0.75)

# --- any model, optimizer and data
torch.manual_seed(0)
images, labels = torch.rand(SAMPLES, 3, side, side), torch.randint(0, 10, (SAMPLES,))
loader = DataLoader(TensorDataset(images, labels, torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True)
model = build_model("small_cnn", num_classes=10).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

# --- what makes it safe
config = CurriculumConfig(
    memory_limit_gb=limit_gb,
    target_headroom_gb=limit_gb / 8,
    min_batch_size=16,
    max_batch_size=BATCH,
    knee_gain_fraction=0.0,  # memory alone decides; the knee would want each step timed
)
controller = MemoryPressureController(device, config)
guard = Guard(model, optimizer, controller)

times_seen = torch.zeros(SAMPLES, dtype=torch.int64)
losses, micro_batches, caught = [], [], 0
for epoch in range(EPOCHS):
    for inputs, targets, indices in loader:
        inputs, targets = inputs.to(device), targets.to(device)

        def attempt(micro_batch: int, inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            total = torch.zeros((), device=device)
            for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True):
                loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / len(inputs)
                loss.backward()
                total += loss.detach()
            guard.optimizer_step()  # last
            return total

        result = guard.run(attempt, min(controller.decide().batch, len(inputs)))
        controller.observe(result.micro_batch)

        times_seen[indices] += 1
        losses.append(result.value.item())
        micro_batches.append(result.micro_batch)
        caught += len(result.events)
        for event in result.events:
            print(f"epoch {epoch}: {event.message} Going on with {event.next_micro_batch} samples at a time.")

    if epoch == EPOCHS // 2 - 1:  # someone takes half of the memory
        taken = int(limit_gb * 2**30) // 2
        if isinstance(controller.memory, BudgetedCpuMemory):
            controller.memory.neighbour_bytes = taken
        else:
            hog = torch.empty(taken, dtype=torch.uint8, device=device)

controller.shutdown()
figures = {
    "steps": len(losses),
    "micro_batches": micro_batches,
    "losses": losses,
    "oom_caught": caught,
    "times_seen": sorted(set(times_seen.tolist())),
}
print(json.dumps(figures))
