"""Many steps of heavy-tailed sample sizes while a neighbour comes and goes, on the card on the CPU.

    python -m benchmarks.soak --steps 10000          # a minute or two on one core; the last line is JSON

Every sample is counted: each index must be trained on exactly once an epoch, whatever ran out of memory on the way.
An error that escapes ends the program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
import torch
from torch import nn

from acmds_optimizer import BudgetedCpuMemory, CurriculumConfig, Guard, MemoryPressureController

SAMPLES, USUAL_LENGTH, LONGEST = 4096, 64, 8


def soak(steps: int, seed: int = 0, card_bytes: int = 1_500_000) -> dict[str, float]:
    """Train for `steps` optimizer steps; the figures of the run."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model.append(nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    memory = BudgetedCpuMemory(card_bytes)
    config = CurriculumConfig(
        target_headroom_gb=0.1 * card_bytes / 2**30, min_batch_size=1, max_batch_size=128, batch_policy="free",
        knee_gain_fraction=0.0, seed=seed,
    )  # fmt: skip
    controller = MemoryPressureController("cpu", config, memory=memory)
    guard = Guard(model, optimizer, controller)
    counts = np.zeros(SAMPLES, dtype=np.int64)
    order = rng.permutation(SAMPLES)
    position = epochs = recovered = kept = 0
    sizes: list[int] = []
    for _ in range(steps):
        # known before launch: the longest sample of the next batch; Pareto of shape 2, rounded up to eighths
        work = min(LONGEST, np.ceil(8 * (1 + rng.pareto(2.0))) / 8)
        decision = controller.decide(float(work))
        if rng.random() < 0.02:  # the neighbour comes or goes after the decision, so nobody has read it yet
            memory.neighbour_bytes = 0 if memory.neighbour_bytes else card_bytes // 2
        chosen = order[position : position + decision.batch]
        inputs = torch.randn(len(chosen), 1, int(USUAL_LENGTH * work))
        targets = torch.from_numpy(chosen % 2)
        memory.track([inputs, targets])

        def attempt(micro_batch: int, inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
            for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True):
                nn.functional.cross_entropy(model(x), y, reduction="sum").div(len(inputs)).backward()
            guard.optimizer_step()

        result = guard.run(attempt, min(decision.batch, len(chosen)), sample_work=float(work))
        reading = controller.observe(result.micro_batch, sample_work=float(work))
        kept += reading.budget_bytes - reading.peak_reserved_bytes >= controller.limits.headroom_bytes
        recovered += len(result.events)
        sizes.append(result.micro_batch)
        counts[chosen] += 1
        position += len(chosen)
        if position == SAMPLES:
            position, epochs, order = 0, epochs + 1, rng.permutation(SAMPLES)
            assert (counts == epochs).all(), "a sample was lost or repeated"
    return {
        "steps": steps,
        "epochs": epochs,
        "oom_escaped": 0,
        "oom_recovered": recovered,
        "headroom_kept_fraction": kept / steps,
        "batch_mean": float(np.mean(sizes)),
        "distinct_sizes": len(set(sizes)),
        "samples_lost_or_repeated": int((counts[order[position:]] != epochs).sum())
        + int((counts[order[:position]] != epochs + 1).sum()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    figures = soak(options.steps, options.seed)
    print(f"{time.perf_counter() - began:.0f} s, torch {torch.__version__}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
