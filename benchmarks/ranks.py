"""Two GPUs against one: the same work for each, and cards with unequal memory. CSV on stdout, progress on stderr.

    python -m benchmarks.ranks                                           # two GPUs, ResNet-50, 2 minutes
    python -m benchmarks.ranks --device cpu --model small_cnn --image-size 32 --batch 32 --limits-gb 0.3,0.02

In each round both cards train alone, at the same time but as two runs, and then as one run; `ratio` compares the sum.

    even      both cards are capped alike, and each takes micro-batches of --batch samples: with one card alone as 1,
              two make `speed_up`
    unequal   they are capped to --limits-gb, and a micro-batch is what fits; alone each takes steps of --batch samples,
              together they share steps of twice as many by what each can do
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from acmds_optimizer import ACMDSTrainer, TrainConfig
from acmds_optimizer.engine.distributed import Ranks
from acmds_optimizer.memory.device import open_memory, prefer_expandable_segments
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import build_model

COLUMNS = (
    "scenario", "round", "alone_0", "alone_1", "together", "ratio", "speed_up", "shares", "micro_batches", "peak_gb_0",
    "peak_gb_1", "oom_events",
)  # fmt: skip
_CLASSES = 100
_IMAGES, _TIMES = 1024, 8
"""So many images, each so many times: an epoch of thousands, as real ones are."""


def measure(
    options: argparse.Namespace, limit_gb: float, sizes: tuple[int, int], total: int, ranks: Ranks
) -> dict[str, Any]:
    """Images a second of one run, of all its processes, after as long a warm-up; and how the run stood."""
    torch.manual_seed(0)
    side = options.image_size
    images = torch.randint(0, 256, (_IMAGES, 3, side, side), dtype=torch.uint8).repeat(_TIMES, 1, 1, 1)
    model = build_model(options.model, _CLASSES, in_channels=3, image_size=side)
    config = TrainConfig(
        target_headroom_gb=options.headroom_gb, min_batch_size=sizes[0], max_batch_size=sizes[1],
        effective_batch_size=total, knee_gain_fraction=0.0, epochs=10**6, channels_last=options.device != "cpu",
        enable_cuda_graphs=False, enable_amp=options.device != "cpu", amp_dtype="bf16", lr_schedule="constant",
    )  # fmt: skip
    memory = open_memory(options.device, limit_gb)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    dataset = TensorImages(images, torch.arange(len(images)) % _CLASSES)
    marks: list[tuple[float, float]] = []

    with ACMDSTrainer(model, dataset, optimizer, config, memory=memory, ranks=ranks) as trainer:
        began = time.perf_counter()

        def after_step() -> None:
            if len(marks) < 2 and time.perf_counter() - began >= options.seconds * (1 + len(marks)):
                if memory.device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append((time.perf_counter(), trainer.recorder.figures["samples"]))

        trainer.after_step = after_step
        trainer.should_stop = lambda: ranks.first and len(marks) == 2  # the clocks of two differ by a step
        trainer.fit()
        outcome = trainer.recorder.outcome(epochs=0, seconds=0.0)
        division = trainer.team.division if trainer.team is not None else None
    memory.close()
    return {
        "rate": (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0]) if len(marks) == 2 else 0.0,
        "shares": division.shares if division else (total,),
        "micro_batch": trainer.controller.batch_size,
        "peak_gb": outcome.peak_reserved_gb,
        "oom_events": outcome.oom_events,
    }


def play(rank: int, options: argparse.Namespace, store: str) -> None:
    """What each of the two processes does; the first one prints."""
    if options.device == "cuda":
        torch.cuda.set_device(rank)
        prefer_expandable_segments()
    backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks.current()
    limits = {"even": (options.limits_gb[0],) * 2, "unequal": options.limits_gb}
    table = csv.DictWriter(sys.stdout, COLUMNS)
    if ranks.first:
        table.writeheader()
    rows = []
    for number in range(options.rounds):
        for scenario in ("even", "unequal"):
            limit = limits[scenario][rank]
            sizes = (options.batch, options.batch) if scenario == "even" else (4, 2 * options.batch)
            alone = ranks.gather(measure(options, limit, sizes, options.batch, Ranks()))
            both = ranks.gather(measure(options, limit, sizes, 2 * options.batch, ranks))
            rates = [seen["rate"] for seen in alone]
            row = {
                "scenario": scenario,
                "round": number,
                "alone_0": round(rates[0], 1),
                "alone_1": round(rates[1], 1),
                "together": round(both[0]["rate"], 1),
                "ratio": round(both[0]["rate"] / sum(rates), 4),
                "speed_up": round(both[0]["rate"] / statistics.mean(rates), 3) if scenario == "even" else "",
                "shares": " ".join(str(share) for share in both[0]["shares"]),
                "micro_batches": " ".join(str(seen["micro_batch"]) for seen in both),
                "peak_gb_0": round(both[0]["peak_gb"], 3),
                "peak_gb_1": round(both[1]["peak_gb"], 3),
                "oom_events": sum(seen["oom_events"] for seen in (*alone, *both)),
            }
            rows.append(row)
            if ranks.first:
                table.writerow(row)
                sys.stdout.flush()
                print(f"{scenario}: together {row['ratio']} of both alone", file=sys.stderr)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256, help="samples of a step of one card alone")
    parser.add_argument("--limits-gb", default="23.2,12", help="caps of the two cards")
    parser.add_argument("--headroom-gb", type=float, default=None, help="default: a twentieth of the smaller cap")
    parser.add_argument("--seconds", type=float, default=6.0, help="of warm-up, and of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.limits_gb = tuple(float(limit) for limit in options.limits_gb.split(","))
    if len(options.limits_gb) != 2:
        parser.error("--limits-gb: two numbers, as in 23.2,12")
    if options.headroom_gb is None:
        options.headroom_gb = min(options.limits_gb) / 20
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, and here are {torch.cuda.device_count()}; --device cpu tries it without")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(play, (options, f"{folder}/store"), nprocs=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
