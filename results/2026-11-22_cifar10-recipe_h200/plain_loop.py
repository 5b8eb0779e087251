"""ResNet-18 on the JPEG copy of CIFAR-10 by a plain PyTorch loop: what the recipe is compared with.

usage: python plain_loop.py [FOLDER]      FOLDER as made by benchmarks/cifar10_folder.py
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

BATCH, SIZE, PAD = 512, 32, 4


def read(path: Path) -> np.ndarray:
    """One image as (32, 32, 3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def split(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and targets (n,), on the GPU."""
    classes = sorted(path.name for path in folder.iterdir())
    files = [(path, number) for number, name in enumerate(classes) for path in (folder / name).iterdir()]
    with ProcessPoolExecutor(12) as pool:
        images = np.stack(list(pool.map(read, [path for path, _ in files], chunksize=500)))
    targets = torch.tensor([number for _, number in files])
    return torch.from_numpy(images).cuda().permute(0, 3, 1, 2).contiguous(), targets.cuda()


def normalise(images: Tensor) -> Tensor:
    """Uint8 to normalised float32, NHWC."""
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device="cuda").view(1, 3, 1, 1) * 255
    std = torch.tensor([0.247, 0.2435, 0.2616], device="cuda").view(1, 3, 1, 1) * 255
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor) -> Tensor:
    """Random crops of the padded images, and mirroring."""
    images = nn.functional.pad(images, (PAD,) * 4)
    rows, columns = torch.randint(0, 2 * PAD + 1, (2, len(images), 1), device="cuda")
    steps, count = torch.arange(SIZE, device="cuda"), torch.arange(len(images), device="cuda")
    images = images[
        count[:, None, None, None],
        torch.arange(3, device="cuda")[None, :, None, None],
        (rows + steps)[:, None, :, None],
        (columns + steps)[:, None, None, :],
    ]
    flips = torch.rand(len(images), device="cuda") < 0.5
    return torch.where(flips[:, None, None, None], images.flip(-1), images)


def run(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int, lr: float, smoothing: float) -> None:
    """Train from scratch and print the accuracy on the test images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    steps = len(train[0]) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * steps, pct_start=0.2, anneal_strategy="linear"
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=smoothing)
    began = time.time()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train[0]), device="cuda")
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_fn(model(normalise(augment(train[0][chosen]))).float(), train[1][chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    right = 0
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for images, targets in zip(test[0].split(1000), test[1].split(1000), strict=True):
            right += int((model(normalise(images)).argmax(1) == targets).sum())
    print(f"{epochs} epochs, lr {lr}, smoothing {smoothing}: {right / len(test[0]):.4f}, {time.time() - began:.1f} s")


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "cifar")
    data = split(root / "train"), split(root / "test")
    run(*data, epochs=15, lr=0.4, smoothing=0.0)
    run(*data, epochs=30, lr=0.4, smoothing=0.1)
