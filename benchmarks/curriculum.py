"""Arms of the curriculum against plain shuffling, in paired runs, at equal samples and at equal wall time.

usage: python -m benchmarks.curriculum digits --out digits.csv                          # CPU, minutes
       python -m benchmarks.curriculum photos --data /tmp/cifar --out photos.csv        # CPU, half an hour
       python -m benchmarks.curriculum cifar --data /tmp/cifar --out cifar.csv --deadline 480
       python -m benchmarks.curriculum table digits.csv cifar.csv

A pair is one seed: the same weights, the same wrong labels, the same order. The arms differ in `direction` alone. The
network, the optimizer and every speed setting are shared. Validation labels are all right. Runs that are in the CSV
file already are not repeated; with --deadline no run is started that would end later. Each visible GPU runs one at a
time.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import pickle
import queue
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.engine.trainer import ACMDSTrainer
from acmds_optimizer.memory.device import open_memory
from acmds_optimizer.zoo.models import build_model
from benchmarks import curriculum_data
from benchmarks.curriculum_data import Images
from benchmarks.curriculum_table import COLUMNS, print_tables

ARMS = ("none", "easy", "hard", "random", "matched", "auto", "relabel", "watch")
"""Values of `direction`; relabel is auto with that `noise_action`, watch a shuffle beside which the gate looks on, for
--record."""
_ON_THE_CPU: dict[str, Any] = {
    "enable_amp": False, "max_batch_size": 64, "min_batch_size": 64, "optimizer": "adamw", "warmup_fraction": 0.1,
    "memory_limit_gb": 4.0, "target_headroom_gb": 1.0, "num_workers": 0,
}  # fmt: skip
SPEED: dict[str, dict[str, Any]] = {
    "digits": {**_ON_THE_CPU, "lr": 5e-3, "augment": False},
    "photos": {**_ON_THE_CPU, "lr": 3e-3, "augment": True},
    "cifar": {
        "amp_dtype": "bf16", "enable_cuda_graphs": True, "max_batch_size": 512, "min_batch_size": 512,
        "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "warmup_fraction": 0.2, "augment": True,
        "num_workers": 0,
    },
}  # fmt: skip
"""Settings that all arms share."""

_MODELS = {"photos": "small_cnn", "cifar": "resnet18"}
_DATA = {"photos": curriculum_data.photos, "cifar": curriculum_data.cifar10}


@dataclass(frozen=True)
class Spec:
    """One run."""

    suite: str
    condition: str
    """`clean`, `noise NN`, or `imbalanced NN`, NN being the share of wrong labels in percent."""
    epochs: int
    arm: str
    seed: int
    lr: float

    @property
    def noise(self) -> float:
        return 0.0 if self.condition == "clean" else int(self.condition.split()[1]) / 100

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in asdict(self).values())


def run(spec: Spec, images: Images, device: str, record: Path | None) -> dict[str, Any]:
    """Train once; a row of the table.

    Args:
        spec: what to train.
        images: the data.
        device: where.
        record: folder for an .npz with what the noise gate saw after each epoch (difficulties, predictions).
    """
    kept = np.arange(len(images.train))
    if spec.condition.startswith("imbalanced"):
        kept = curriculum_data.imbalanced(images.train_labels, spec.seed)
    labels, wrong = curriculum_data.wrong_labels(images.train_labels[kept], spec.noise, spec.seed)
    settings = {**SPEED[spec.suite], "lr": spec.lr}
    if spec.arm == "relabel":
        settings["noise_action"] = spec.arm
    direction: Any = "auto" if spec.arm in ("watch", "relabel") else spec.arm
    config = TrainConfig(**settings, device=device, epochs=spec.epochs, direction=direction, seed=spec.seed)
    bundle = images.bundle(images.train[kept], labels, augment=config.augment)
    torch.manual_seed(spec.seed)
    model = curriculum_data.mlp() if spec.suite == "digits" else build_model(_MODELS[spec.suite], 10, image_size=32)
    memory = open_memory(device, config.memory_limit_gb)
    curve: list[tuple[float, int, float]] = []
    seconds, fired = 0.0, None
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    with ACMDSTrainer(
        model,
        bundle.train,
        build_optimizer(model, config),
        config,
        memory=memory,
        val_dataset=bundle.val,
        bundle=bundle,
    ) as trainer:
        gate = trainer.feedback.gate
        if gate is not None and spec.arm == "watch":
            gate.end_epoch = lambda progress: False  # type: ignore[method-assign]
            gate.losses.alpha = 1.0
        while not trainer.finished:
            began = time.perf_counter()
            figures = trainer.train_epoch()  # waits for the device at its end
            seconds += time.perf_counter() - began
            curve.append((round(seconds, 3), int(figures["samples"]), trainer.evaluate()["val_accuracy"]))
            if fired is None and trainer.feedback.flagged is not None:
                fired = trainer.epoch
            if record is not None and gate is not None:
                seen.append((gate.losses.difficulty().half().cpu().numpy(), gate.predictions.byte().cpu().numpy()))
        flagged = trainer.feedback.flagged
        batch = trainer.controller.batch_size
    memory.close()
    if record is not None and seen:
        name = f"{spec.condition}_{spec.epochs}_{spec.arm}_{spec.seed}_{spec.lr:g}.npz".replace(" ", "")
        difficulties, predictions = (np.stack(parts) for parts in zip(*seen, strict=True))
        np.savez_compressed(
            record / name,
            difficulties=difficulties,
            predictions=predictions,
            labels=labels.astype(np.uint8),
            wrong=wrong,
        )
    flagged = np.zeros(len(labels), dtype=np.bool_) if flagged is None else flagged
    accuracies = [accuracy for _, _, accuracy in curve]
    return {
        **asdict(spec),
        "accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "best_epoch": int(np.argmax(accuracies)) + 1,
        "samples": curve[-1][1],
        "seconds": seconds,
        "seconds_to_90": next((s for s, _, a in curve if a >= 0.90), None),
        "seconds_to_93": next((s for s, _, a in curve if a >= 0.93), None),
        "fired_epoch": fired,
        "flagged": int(flagged.sum()),
        "precision": float((flagged & wrong).sum() / flagged.sum()) if flagged.any() else None,
        "recall": float((flagged & wrong).sum() / wrong.sum()) if wrong.any() else None,
        "micro_batch": batch,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "curve": json.dumps(curve),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that are in a CSV file already; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def work(data: str, device: str, record: Path | None, specs: Any, rows: Any) -> None:
    """A process: takes runs until there are none."""
    torch.set_num_threads(1 if device == "cpu" else 4)
    images: Images = pickle.loads(Path(data).read_bytes())
    while True:
        spec = specs.get()
        if spec is None:
            return
        try:
            rows.put((spec, run(spec, images, device, record)))
        except Exception as error:  # noqa: BLE001  # one run that fails must not cost the others
            rows.put((spec, f"{type(error).__name__}: {error}"))


def plan(arguments: argparse.Namespace) -> list[Spec]:
    """All runs asked for, the most wanted first: a seed at a time, all conditions of it, all arms side by side."""
    lr = arguments.lr or [SPEED[arguments.suite]["lr"]]
    specs = [
        Spec(arguments.suite, condition, epochs, arm, seed, rate)
        for seed in range(arguments.seeds)
        for rate in lr
        for epochs in arguments.epochs
        for condition in arguments.conditions
        for arm in arguments.arms
    ]
    specs += [
        Spec(arguments.suite, condition, budget, "none", seed, lr[0])
        for seed in range(arguments.seeds)
        for condition in arguments.conditions
        for budget in arguments.budgets
        if condition != "clean"
    ]
    return list(dict.fromkeys(specs))


def measure(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    out = Path(arguments.out)
    done = {tuple(row[name] for name in Spec.__dataclass_fields__) for row in read_rows(out)}
    specs = [spec for spec in plan(arguments) if spec.key not in done]
    devices = arguments.device or (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if arguments.suite == "cifar" else ["cpu"]
    )
    images = curriculum_data.digits() if arguments.suite == "digits" else _DATA[arguments.suite](Path(arguments.data))
    say(f"{len(specs)} runs on {', '.join(devices)} x {arguments.processes}; data ready after {elapsed(began)}")
    with tempfile.TemporaryDirectory() as folder, out.open("a", newline="", buffering=1) as file:
        data = Path(folder) / "images.pickle"
        data.write_bytes(pickle.dumps(images))
        writer = csv.DictWriter(file, COLUMNS)
        if not done and not file.tell():
            writer.writeheader()
        record = Path(arguments.record) if arguments.record else None
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        rows = context.Queue()
        workers = []
        for device in devices * arguments.processes:
            channel = context.Queue()
            process = context.Process(target=work, args=(str(data), device, record, channel, rows), daemon=True)
            process.start()
            workers.append((channel, process))
        spread(specs, workers, rows, writer, began, arguments.deadline)
    print_tables([out])


def spread(
    specs: list[Spec], workers: list[tuple[Any, Any]], rows: Any, writer: Any, began: float, deadline: float | None
) -> None:
    """Hand the runs to the workers, write what comes back, and start none that would end too late."""
    waiting, per_epoch = list(specs), 0.0
    started: dict[Spec, tuple[int, float]] = {}

    def hand_out(number: int) -> bool:
        while waiting:
            spec = waiting.pop(0)
            if deadline and time.monotonic() - began + per_epoch * spec.epochs > deadline:
                continue  # a shorter one may still fit
            started[spec] = (number, time.monotonic())
            workers[number][0].put(spec)
            return True
        workers[number][0].put(None)
        return False

    running = sum(hand_out(number) for number in range(len(workers)))
    left_out = 0
    while running:
        try:
            spec, row = rows.get(timeout=5.0)
        except queue.Empty:
            if not any(process.is_alive() for _, process in workers):
                raise SystemExit("all processes ended") from None
            if deadline and time.monotonic() - began > deadline + 30:
                left_out = running
                break
            continue
        number, start = started[spec]
        per_epoch = max(per_epoch, (time.monotonic() - start) / spec.epochs)
        if isinstance(row, str):
            say(f"{spec} failed: {row}")
        else:
            writer.writerow({name: row[name] for name in COLUMNS})
            say(
                f"{elapsed(began)} {spec.condition}, {spec.epochs} epochs, {spec.arm}, seed {spec.seed}: "
                f"{100 * row['accuracy']:.2f} % (best {100 * row['best_accuracy']:.2f}) in {row['seconds']:.1f} s, "
                f"flagged {row['flagged']}"
            )
        running -= 1 - hand_out(number)
    missing = len(specs) - sum(1 for spec in specs if spec in started) + left_out
    if missing:
        say(f"{missing} runs left out: the deadline")
    for _, process in workers:
        process.join(timeout=1.0)
        if process.is_alive():
            process.terminate()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def elapsed(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("digits", "photos", "cifar", "table"))
    parser.add_argument("files", nargs="*", help="with `table`: the CSV files to print")
    parser.add_argument("--data", help="photos, cifar: folder of images")
    parser.add_argument("--out", default="curriculum.csv")
    parser.add_argument("--device", nargs="+", help="default: for cifar every visible GPU, else the CPU")
    parser.add_argument("--processes", type=int, default=1, help="at once on each device")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--conditions", nargs="+", help="clean, noise20, imbalanced20 and so on")
    parser.add_argument("--budgets", type=int, nargs="*", help="epochs of plain shuffling stopped early")
    parser.add_argument("--lr", type=float, nargs="+")
    parser.add_argument("--record", help="folder for what the noise gate sees, one .npz a run of auto or watch")
    parser.add_argument("--deadline", type=float, help="seconds")
    arguments = parser.parse_args()
    if arguments.suite == "table":
        print_tables([Path(name) for name in arguments.files])
        return
    defaults: dict[str, dict[str, Any]] = {
        "digits": {
            "seeds": 16, "epochs": [20], "arms": ["none", "auto"], "budgets": [3, 5, 8, 12],
            "conditions": ["clean", "noise20", "noise40", "imbalanced20"],
        },
        "photos": {
            "seeds": 3, "epochs": [20], "arms": ["none", "auto", "relabel"], "budgets": [],
            "conditions": ["clean", "noise20", "noise40"],
        },
        "cifar": {
            "seeds": 3, "epochs": [15], "arms": ["none", "auto"], "budgets": [],
            "conditions": ["clean", "noise20", "noise40"],
        },
    }  # fmt: skip
    for name, value in defaults[arguments.suite].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.conditions = [spaced(name) for name in arguments.conditions]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    measure(arguments)


def spaced(name: str) -> str:
    """`noise20` as `noise 20`."""
    words = name.rstrip("0123456789").strip()
    return f"{words} {name[len(words) :].strip()}".strip()


if __name__ == "__main__":
    main()
