"""Resolution stages against full resolution under one memory budget, on scenes of 128 px composed on the device.

usage: python -m benchmarks.resolution --data /tmp/cifar --out resolution.csv --deadline 170
       python -m benchmarks.resolution --data /tmp/cifar --out resolution_cpu.csv --device cpu --images cifar \
           --model small_cnn --samples 5000 --batch 128 --lr 0.1 --memory-gb 0.15 --epochs 10

For each seed runs with the same settings: full size throughout; stages, one run a plan; and full size again with its
schedule fitted to the wall time that the first plan's stages took (`full in that time`). A plan is
START:STAGES:EPOCHS, as in 0.5:3:17: three sizes, the first of half the side, and 17 epochs, since epochs of small
images are short. Each visible GPU runs seeds of its own. Wall time is that of training, captures of graphs and
rehearsals included, without validation.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.engine.telemetry import Recorder
from acmds_optimizer.engine.trainer import ACMDSTrainer
from acmds_optimizer.memory.device import open_memory
from acmds_optimizer.zoo.datasets import CIFAR_STATISTICS, DataBundle
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import build_model
from benchmarks import curriculum_data
from benchmarks.curriculum import read_rows, say
from benchmarks.curriculum_table import at_time, mean_se

COLUMNS = (
    "arm", "seed", "epochs", "accuracy", "samples", "seconds", "micro_batches", "headroom_breach_fraction",
    "oom_events", "device", "torch", "curve",
)  # fmt: skip
FULL, FITTED = "full", "full in that time"
FULL_EPOCHS = 10_000
"""More than fit into any wall time: `max_seconds` then sets the schedule."""


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs share."""
    return {
        "amp_dtype": "bf16", "channels_last": True, "enable_cuda_graphs": "auto" if arguments.on_cpu else True,
        "enable_amp": not arguments.on_cpu, "max_batch_size": arguments.batch, "min_batch_size": arguments.batch // 8,
        "optimizer": "sgd", "lr": arguments.lr, "weight_decay": 5e-4, "warmup_fraction": 0.2, "model": arguments.model,
        "memory_limit_gb": arguments.memory_gb, "target_headroom_gb": 0.15 * arguments.memory_gb, "num_workers": 0,
    }  # fmt: skip


def run(
    arm: str, seed: int, bundle: DataBundle, device: str, common: dict[str, Any], record: Path | None, **more: Any
) -> dict[str, Any]:
    """Train once; a row of the table. `record`: folder for the decisions of every step."""
    config = TrainConfig(**common, device=device, seed=seed, **more)
    torch.manual_seed(seed)
    model = build_model(config.model, curriculum_data.CLASSES, image_size=bundle.image_shape[-1])
    memory = open_memory(device, config.memory_limit_gb)
    curve: list[tuple[float, int, float]] = []
    batches: list[int] = []
    seconds = 0.0
    optimizer = build_optimizer(model, config)
    with ACMDSTrainer(
        model, bundle.train, optimizer, config, memory=memory, val_dataset=bundle.val, bundle=bundle
    ) as trainer:
        if record is not None:
            folder = record / f"{arm} seed {seed}".replace(" ", "_").replace(":", "-")
            folder.mkdir(parents=True, exist_ok=True)
            trainer.recorder = Recorder(folder, config.difficulty_window, None)
        while not trainer.finished:
            began = time.perf_counter()
            figures = trainer.train_epoch()
            seconds += time.perf_counter() - began
            batches.append(int(figures["batch_size"]))
            curve.append((round(seconds, 3), int(figures["samples"]), trainer.evaluate()["val_accuracy"]))
        outcome = trainer.recorder.outcome(epochs=trainer.epoch, seconds=seconds)
    memory.close()
    return {
        "arm": arm, "seed": seed, "epochs": trainer.epoch, "accuracy": curve[-1][2], "samples": curve[-1][1],
        "seconds": seconds, "micro_batches": " ".join(str(size) for size in dict.fromkeys(batches)),
        "headroom_breach_fraction": outcome.headroom_breach_fraction, "oom_events": outcome.oom_events,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__, "curve": json.dumps(curve),
    }  # fmt: skip


def work(data: str, device: str, seeds: list[int], arguments: argparse.Namespace, began: float, rows: Any) -> None:
    """A process: all runs of some seeds on one device."""
    if arguments.on_cpu:
        torch.set_num_threads(1)
    images: curriculum_data.Images = pickle.loads(Path(data).read_bytes())
    kept = np.random.default_rng(0).permutation(len(images.train))[: arguments.samples]
    where = torch.device(device)
    picked = np.random.default_rng(1).permutation(len(images.val))[: arguments.samples // 4]
    parts = [images.train[kept], images.val[picked]]
    if arguments.images == "scenes":
        parts = [curriculum_data.scenes(objects, seed, where) for seed, objects in enumerate(parts, 1)]
    train, val = TensorImages(parts[0], images.train_labels[kept]), TensorImages(parts[1], images.val_labels[picked])
    shape = tuple(train.images.shape[1:])
    bundle = DataBundle(train, val, curriculum_data.CLASSES, None, shape, *CIFAR_STATISTICS["cifar10"], crop="pad")
    common = settings(arguments)
    arms: dict[str, dict[str, Any]] = {FULL: {"epochs": arguments.epochs}}
    for plan in arguments.plans:
        start_resolution, stages, epochs = plan.split(":")
        arms[named(plan)] = {
            "start_resolution": float(start_resolution), "resolution_stages": int(stages), "epochs": int(epochs),
        }  # fmt: skip
    longest = 0.0
    for seed in seeds:
        taken = {}
        for arm in (*arms, FITTED):
            if arguments.deadline and time.time() - began + longest > arguments.deadline:
                rows.put(f"seed {seed}, {arm}: left out, the deadline")
                continue
            more = arms.get(arm) or {"epochs": FULL_EPOCHS, "max_seconds": taken[named(arguments.plans[0])]}
            start = time.perf_counter()
            row = run(arm, seed, bundle, device, common, arguments.record, **more)
            longest = max(longest, time.perf_counter() - start)
            taken[arm] = row["seconds"]
            rows.put(row)
    rows.put(None)


def named(plan: str) -> str:
    return f"stages {plan}"


def print_table(rows: list[dict[str, Any]]) -> None:
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        curve = json.loads(row["curve"])
        numbers = {name: float(row[name]) for name in ("accuracy", "seconds", "samples")}
        by_seed.setdefault(int(row["seed"]), {})[row["arm"]] = {**row, **numbers, "curve": curve}
    print("| arm | n | accuracy % | less full, points | wall time s | of full | samples | micro-batches | not kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    arms_seen = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms_seen:
        mine = [(arms[arm], arms[FULL]) for arms in by_seed.values() if arm in arms and FULL in arms]
        if not mine:
            continue
        cells = [
            arm,
            str(len(mine)),
            mean_se([100 * row["accuracy"] for row, _ in mine]),
            mean_se([100 * (row["accuracy"] - full["accuracy"]) for row, full in mine], sign=True),
            mean_se([row["seconds"] for row, _ in mine]),
            mean_se([row["seconds"] / full["seconds"] for row, full in mine]),
            f"{np.mean([row['samples'] for row, _ in mine]):,.0f}",
            mine[0][0]["micro_batches"],
            mean_se([float(row["headroom_breach_fraction"]) for row, _ in mine]),
        ]
        print("| " + " | ".join(cells) + " |")
    for arm in arms_seen:
        pairs = [(arms[FULL], arms[arm]) for arms in by_seed.values() if FULL in arms and arm in arms]
        if pairs and arm not in (FULL, FITTED):
            read_off = [100 * at_time(full, staged["seconds"]) for full, staged in pairs]
            print(f"\nThe full run, read off its own curve at the wall time of {arm}: {mean_se(read_off)} %.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that benchmarks/cifar10_folder.py writes")
    parser.add_argument("--out", default="resolution.csv")
    parser.add_argument("--device", nargs="+", help="default: every visible GPU")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument(
        "--samples", type=int, default=40_000, help="scenes to train on; a quarter to validate, if there"
    )
    parser.add_argument("--images", choices=("scenes", "cifar"), default="scenes")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=512, help="effective batch, and largest micro-batch")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--memory-gb", type=float, default=7.0)
    parser.add_argument("--plans", nargs="+", default=["0.5:3:16"], metavar="START:STAGES:EPOCHS")
    parser.add_argument("--record", type=Path, help="new folder for steps.csv and events.csv of every run")
    parser.add_argument("--deadline", type=float, help="seconds; no run is started that would end later")
    arguments = parser.parse_args()
    arguments.on_cpu = arguments.device == ["cpu"]
    began = time.time()
    out = Path(arguments.out)
    before = read_rows(out)
    seeds = [seed for seed in range(arguments.seeds) if not any(int(row["seed"]) == seed for row in before)]
    devices = arguments.device or [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    images = curriculum_data.cifar10(Path(arguments.data))
    say(f"data ready after {time.time() - began:.0f} s")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, out.open("a", newline="") as file:
        data = Path(folder) / "images.pickle"
        data.write_bytes(pickle.dumps(images))
        writer = csv.DictWriter(file, COLUMNS)
        if not before:
            writer.writeheader()
        rows = context.Queue()
        processes = []
        for number, device in enumerate(devices):
            mine = seeds[number :: len(devices)]
            processes.append(context.Process(target=work, args=(str(data), device, mine, arguments, began, rows)))
            processes[-1].start()
        running = len(processes)
        while running and any(process.is_alive() for process in processes):
            row = rows.get()
            if row is None:
                running -= 1
            elif isinstance(row, str):
                say(row)
            else:
                writer.writerow(row)
                file.flush()
                say(
                    f"{time.time() - began:.0f} s seed {row['seed']}, {row['arm']}: {100 * row['accuracy']:.2f} % in "
                    f"{row['seconds']:.1f} s, micro-batches {row['micro_batches']}"
                )
        for process in processes:
            process.join()
    print_table(read_rows(out))


if __name__ == "__main__":
    main()
