"""What --dry-run predicts, beside what a training step really takes on this GPU.

usage: python -m benchmarks.dry_run --out dry_run.csv [--models resnet18,resnet50,efficientnet_b0] [--batches 32,256]
       [--device cuda] [--size 224] [--deadline 120]
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch

from acmds_optimizer.config import GIB, TrainConfig
from acmds_optimizer.engine.dry_run import predict
from acmds_optimizer.engine.run import run_training
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import build_model

COLUMNS = (
    "model",
    "batch",
    "predicted_gb",
    "allocated_gb",
    "reserved_gb",
    "error_fraction",
    "seconds",
    "torch",
    "device",
)
CLASSES = 1000
STEPS = 3
_count, _size = 0, 224


def photos() -> tuple[TensorImages, None]:
    """Grey images of the asked size, as many as the steps need."""
    pixels = torch.full((_count, 3, _size, _size), 128, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(_count) % CLASSES, [str(number) for number in range(CLASSES)]), None


def measure(model: str, batch: int, size: int, device: str) -> dict[str, object]:
    """One row: a prediction and a short training."""
    global _count, _size
    _count, _size = STEPS * batch, size
    config = TrainConfig(
        model=model, dataset="benchmarks.dry_run:photos", num_classes=CLASSES, image_size=size, device=device,
        min_batch_size=batch, max_batch_size=batch, target_headroom_gb=0.0, augment=False, epochs=1, num_workers=2,
        amp_dtype="bf16", channels_last=True, enable_cuda_graphs=False, checkpoint_every=0,
    )  # fmt: skip
    began = time.monotonic()
    shape = (3, size, size)
    predicted = predict(build_model(model, CLASSES, image_size=size), shape, config).peak_bytes(batch)
    with tempfile.TemporaryDirectory() as folder:
        run_training(config, output_dir=Path(folder))
        with (Path(folder) / "steps.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    allocated = max(float(row["peak_allocated_gb"]) for row in rows)
    return {
        "model": model,
        "batch": batch,
        "predicted_gb": round(predicted / GIB, 4),
        "allocated_gb": allocated,
        "reserved_gb": max(float(row["reserved_gb"]) for row in rows),
        "error_fraction": round(predicted / GIB / allocated - 1, 4),
        "seconds": round(time.monotonic() - began, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", default="resnet18,resnet50,efficientnet_b0")
    parser.add_argument("--batches", default="32,256")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which nothing is begun")
    options = parser.parse_args()
    sys.modules["benchmarks.dry_run"] = sys.modules["__main__"]  # the data set is looked up by its name
    began = time.monotonic()
    with Path(options.out).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for model in options.models.split(","):
            for batch in options.batches.split(","):
                if time.monotonic() - began > options.deadline:
                    return
                row = measure(model, int(batch), options.size, options.device)
                writer.writerow(row)
                file.flush()
                print(row, file=sys.stderr)


if __name__ == "__main__":
    main()
