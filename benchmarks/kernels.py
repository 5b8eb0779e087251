"""Where the GPU's time in a step goes: the kernels of ours against those of the plain loop. A table on stdout.

    python -m benchmarks.kernels --model resnet18 --image-size 224 --batch 256

For each kernel the microseconds and calls of one step of either, the largest differences first. `wall` is without the
profiler.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from acmds_optimizer import CurriculumConfig
from acmds_optimizer.engine.prepare import set_up_cuda
from benchmarks.throughput import Cell, System, config_of, eager, ours

_WARM_UP, _STEPS = 30, 20
_IMAGES = 25_000
_ROWS = 12


def kernels(system: System) -> tuple[Counter[str], Counter[str], float]:
    """Microseconds and calls of each kernel in a step, and the wall time of a step in microseconds."""
    system(_WARM_UP)
    torch.cuda.synchronize()
    began = time.perf_counter()
    system(_STEPS)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / _STEPS * 1e6
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        system(_STEPS)
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds[event.key] += event.self_device_time_total / _STEPS
        calls[event.key] += event.count / _STEPS
    return seconds, calls, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="of torchvision (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step (default: 256)")
    options = parser.parse_args()
    set_up_cuda(CurriculumConfig())
    cell = Cell(options.model, options.image_size, torch.device("cuda"), _IMAGES)
    plain, plain_calls, plain_wall = kernels(eager(cell, options.batch))
    system, trainer = ours(cell, config_of(options.batch))
    mine, my_calls, my_wall = kernels(system)
    trainer.shutdown()
    names = sorted(mine | plain, key=lambda name: -abs(mine[name] - plain[name]))[:_ROWS]
    rows: list[tuple[float, float, float, float, str]] = [
        (mine[name], my_calls[name], plain[name], plain_calls[name], name) for name in names
    ]
    rows.insert(0, (sum(mine.values()), my_calls.total(), sum(plain.values()), plain_calls.total(), "all kernels"))
    rows.insert(0, (my_wall, 0.0, plain_wall, 0.0, "wall"))
    print("difference   ours us  calls  plain us  calls  kernel")
    for first, calls, second, other_calls, name in rows:
        print(f"{first - second:10.1f} {first:9.1f} {calls:6.1f} {second:9.1f} {other_calls:6.1f}  {name[:80]}")


if __name__ == "__main__":
    main()
