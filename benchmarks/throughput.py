"""How fast a step is: the plain loop, the same as a hand-written CUDA graph or compiled, and ours through its API.

    python -m benchmarks.throughput --out throughput.csv                      # a CUDA card, about eight minutes
    python -m benchmarks.throughput --device cpu --out throughput.csv         # small, to see that it works
    python -m benchmarks.throughput --out t.csv --parts grid --models resnet18 --image-sizes 32 --batches 128

All systems of a row stand side by side in one process and take turns, a block of steps each, so that a drifting clock
or a busy neighbour hits them alike; `ratio` is the median over the rounds of their rate by the plain loop's of the same
round. All have the same model, fused AdamW, bf16 and NHWC, but for `ours_auto`, which chooses by itself. The plain loop
and the graph get the same images again and again, eager_fed the next ones; ours draws, augments, scores and logs them.

Parts: grid (every model, size and batch, as far as the plain loop fits into 23.2 GiB); headline (what one gets who
leaves the batch to us, over a common batch); cifar (--folder: images through `acmds-train`, against the bare graph);
jpeg (JPEG files of 500 px, 500 of them under many names, against what the workers decode and what the model trains);
first (seconds from the start of `acmds-train` to the first step).
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from acmds_optimizer import ACMDSTrainer, CurriculumConfig
from acmds_optimizer.config import GIB, TrainConfig
from acmds_optimizer.engine.images import InputSpec
from acmds_optimizer.engine.prepare import set_up_cuda
from acmds_optimizer.engine.resident import ResidentSource
from acmds_optimizer.engine.run import environment, run_training
from acmds_optimizer.memory.out_of_memory import is_out_of_memory
from acmds_optimizer.zoo.models import build_model
from benchmarks.memory_ours import Named

COLUMNS = {
    "part": "grid, headline, cifar, jpeg or first",
    "model": "",
    "image_size": "pixels",
    "batch": "samples of a step; for ours_free what it began to be compared with",
    "system": "eager, graph, compiled, ours (equal flags), ours_auto (chooses precision), ours_free (and the batch)",
    "status": "ok, out_of_memory or error",
    "reason": "why, where it is not ok",
    "images_per_second": "median over the rounds",
    "ratio": "median over the rounds of the rate by the plain loop's (cifar: the graph's; jpeg: the slower limit's)",
    "ratio_lowest": "the lowest of the rounds",
    "peak_gb": "peak of allocated memory while it ran alone, beyond what was there; ours with the others' blocks",
    "batch_last": "micro-batch of the last step",
    "replayed": "of ours, whether its last step was a replayed graph",
    "seconds_before": "from building it to the end of its warm-up; in part first, to the first step",
    "rounds": "blocks that count",
}
CAP_GB, HEADROOM_GB = 23.2, 3.0
_MODELS = ("resnet18", "resnet50", "resnet101", "efficientnet_b0")
_DISTINCT_JPEGS = 500
_EPOCHS_TO_SETTLE = 8
_HEADLINE = (("resnet50", 32), ("resnet101", 16), ("efficientnet_b0", 64))


class Cell:
    """One model at one image size: what all systems of a row share."""

    def __init__(self, model: str, size: int, device: torch.device, images: int) -> None:
        self.model, self.size, self.device = model, size, device
        self.classes = 10 if size <= 64 else 1000
        generator = torch.Generator(device).manual_seed(0)
        spec = InputSpec(
            (3, size, size), (0.5,) * 3, (0.25,) * 3, True, "pad" if size <= 64 else "none", False, self.classes, 0
        )
        pool = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=generator, device=device)
        pool = pool.permute(0, 3, 1, 2)  # NHWC, as a trainer stores images that it moves there
        targets = np.random.default_rng(0).integers(0, self.classes, images)
        self.source = ResidentSource(pool, targets, spec, device, True, device.type == "cuda")

    def build(self) -> nn.Module:
        """As torchvision has it, without the stem for small images, as most tables have it."""
        torch.manual_seed(0)
        if self.model == "small_cnn":
            return build_model("small_cnn", self.classes)
        return torchvision.models.get_model(self.model, num_classes=self.classes)


System = Callable[[int], int]
"""Runs so many steps, and says how many samples that were."""


def eager(cell: Cell, batch: int, *, fed: bool = False, compiled: bool = False, graph: bool = False) -> System:
    """The plain loop, compiled, or as one CUDA graph of the whole step; fed: with the next images in each step."""
    cuda = cell.device.type == "cuda"
    model = cell.build().to(cell.device)
    if cuda:
        model = model.to(memory_format=torch.channels_last)
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=graph)
    with cell.source.stream(np.arange(len(cell.source)), epoch=0) as stream:
        data = stream.take(batch)
    layout = torch.channels_last if cuda else torch.contiguous_format
    inputs, targets = data.inputs.contiguous(memory_format=layout), data.targets.clone()
    images, position = cell.source.images, 0

    def step(set_to_none: bool = True) -> None:
        nonlocal inputs, position
        if fed:
            position = position + batch if position + 2 * batch <= len(images) else 0
            inputs = images[position : position + batch].to(torch.float32, memory_format=layout)
            inputs.sub_(127.5).div_(63.75)
        optimizer.zero_grad(set_to_none=set_to_none)
        with torch.autocast(cell.device.type, torch.bfloat16, enabled=cuda, cache_enabled=not graph):
            loss = nn.functional.cross_entropy(run(inputs), targets)
        loss.backward()
        optimizer.step()

    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step(set_to_none=False)

    def block(steps: int) -> int:
        for _ in range(steps):
            captured.replay() if graph else step()
        return steps * batch

    return block


def ours(cell: Cell, config: CurriculumConfig) -> tuple[System, ACMDSTrainer]:
    """The trainer, with everything on; its images lie on the device."""
    model = cell.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    trainer = ACMDSTrainer(model, Named(len(cell.source), cell.source.spec.shape), optimizer, config, cell.device)
    trainer.source.close()
    trainer.source = cell.source
    trainer.total_epochs = 10**6
    return _Turns(trainer), trainer


def settled(built: tuple[System, ACMDSTrainer]) -> tuple[System, ACMDSTrainer]:
    """The same once it has kept a batch size for two epochs: the first use of a size can take seconds."""
    system, trainer = built
    for _ in range(_EPOCHS_TO_SETTLE):
        batch = trainer.controller.batch_size
        system(2 * len(trainer.dataset) // batch)
        if trainer.controller.batch_size == batch:
            break
    return built


class _Turns:
    """Lets a trainer run in a thread of its own and pause after a number of steps, in the midst of an epoch.

    To end an epoch with each block would cost what an epoch's begin and end cost, some milliseconds.
    """

    def __init__(self, trainer: ACMDSTrainer) -> None:
        self._trainer = trainer
        self._last = 0
        self._go, self._paused = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        trainer.should_stop = self._pause
        threading.Thread(target=self._run, daemon=True).start()
        self._paused.wait()

    def __call__(self, steps: int) -> int:
        figures = self._trainer.recorder.figures
        before, self._last = figures["samples"], self._trainer.step + steps
        self._paused.clear()
        self._go.set()
        self._paused.wait()
        if self._error is not None:
            raise self._error
        return int(figures["samples"] - before)

    def _run(self) -> None:
        try:
            if self._trainer.device.type == "cuda":
                torch.cuda.set_device(self._trainer.device)
            while True:
                self._trainer.train_epoch()
        except BaseException as error:  # noqa: BLE001  # raised again by whose turn it is
            self._error = error
            self._paused.set()

    def _pause(self) -> bool:
        while self._trainer.step >= self._last:
            self._go.clear()
            self._paused.set()
            self._go.wait()
        return False


def config_of(batch: int, **settings: Any) -> CurriculumConfig:
    equal = {"amp_dtype": "bf16", "channels_last": True}
    return CurriculumConfig(**{"min_batch_size": batch, "max_batch_size": batch} | equal | settings)


class Bench:
    """Lets systems take turns, and writes the rows."""

    def __init__(self, out: Path, device: torch.device, seconds: float, rounds: int, deadline_s: float | None) -> None:
        self.device, self.seconds, self.rounds = device, seconds, rounds
        self.began = time.monotonic()
        self._end = self.began + deadline_s if deadline_s else float("inf")
        self._file = out.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, list(COLUMNS))
        self._writer.writeheader()

    def late(self) -> bool:
        return time.monotonic() > self._end

    def row(self, **values: Any) -> None:
        self._writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})
        self._file.flush()
        shown = " ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values.values())
        print(f"{time.monotonic() - self.began:6.1f} s  {shown}", file=sys.stderr, flush=True)

    def _timed(self, system: System, steps: int) -> tuple[float, int]:
        self._wait()
        began = time.perf_counter()
        samples = system(steps)
        self._wait()
        return time.perf_counter() - began, samples

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(self, systems: dict[str, Callable[[], tuple[System, ACMDSTrainer | None]]], **where: Any) -> float:
        """A row for each system; the first is what the ratios are by. Its peak in GiB, 0 where it did not run."""
        ready: dict[str, tuple[System, ACMDSTrainer | None, float, float, int]] = {}
        bad: dict[str, tuple[str, str]] = {}
        for name, build in systems.items():
            began, base = time.perf_counter(), self._allocated()
            try:
                system, trainer = build()
                self._timed(system, 15 if self.device.type == "cuda" else 3)
                steps = 4
                took, _ = self._timed(system, steps)
                if trainer is not None:  # the probes of `auto` end after a dozen steps
                    took, _ = self._timed(system, 12)
                    took /= 3
                peak = trainer.controller.state.peaks.largest_peak if trainer is not None else self._peak()
                ready[name] = (system, trainer, peak - base, time.perf_counter() - began,
                               max(2, round(self.seconds / (took / steps))))  # fmt: skip
            except Exception as error:  # noqa: BLE001  # whatever it is, it is a row of the table
                status = "out_of_memory" if is_out_of_memory(error) else "error"
                bad[name] = (status, (str(error).splitlines() or [type(error).__name__])[0][:100])
            gc.collect()
        rates: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(self.rounds):
            for name, (system, _, _, _, steps) in ready.items():
                took, samples = self._timed(system, steps)
                rates[name].append(samples / took)
        first = next(iter(systems))
        for name in systems:
            if name in bad:
                self.row(**where, system=name, status=bad[name][0], reason=bad[name][1])
                continue
            _, trainer, peak, before, _ = ready[name]
            ratios = [a / b for a, b in zip(rates[name], rates.get(first, rates[name]), strict=True)]
            self.row(
                **where, system=name, status="ok", images_per_second=statistics.median(rates[name]),
                ratio=statistics.median(ratios), ratio_lowest=min(ratios), peak_gb=peak / GIB,
                batch_last=trainer.controller.batch_size if trainer else where["batch"], seconds_before=before,
                replayed=_replayed(trainer), rounds=self.rounds,
            )  # fmt: skip
            if trainer is not None:
                trainer.shutdown()
        first_peak = ready[first][2] / GIB if first in ready else 0.0
        ready.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return first_peak

    def _allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def close(self) -> None:
        self._file.close()


def _replayed(trainer: ACMDSTrainer | None) -> bool | str:
    graphs = trainer.train_step.graphs if trainer is not None else None
    return graphs.replayed if graphs is not None else ""


def grid(bench: Bench, options: argparse.Namespace) -> None:
    cuda = bench.device.type == "cuda"
    for model in options.models:
        for size in options.image_sizes:
            if size < 64 and model not in ("resnet18", "small_cnn"):
                continue  # the others shrink 32 px to nothing
            cell = Cell(model, size, bench.device, 50_000 if size <= 64 and cuda else 25_000 if cuda else 512)
            peak_per_sample = 0.0
            for batch in options.batches:
                if bench.late():
                    return
                if cuda and batch * peak_per_sample > CAP_GB:
                    continue  # it would not fit on the card that this is about
                systems: dict[str, Any] = {
                    "eager": lambda batch=batch, cell=cell: (eager(cell, batch), None),
                    "eager_fed": lambda batch=batch, cell=cell: (eager(cell, batch, fed=True), None),
                    "graph": lambda batch=batch, cell=cell: (eager(cell, batch, graph=True), None),
                    "compiled": lambda batch=batch, cell=cell: (eager(cell, batch, compiled=True), None),
                    "ours": lambda batch=batch, cell=cell: ours(cell, config_of(batch)),
                    "ours_compiled": lambda batch=batch, cell=cell: ours(cell, config_of(batch, compile_model=True)),
                    "ours_auto": lambda batch=batch, cell=cell: ours(
                        cell, config_of(batch, amp_dtype="auto", channels_last="auto")
                    ),
                }  # fmt: skip
                chosen = {name: systems[name] for name in options.systems}
                peak = bench.compare(chosen, part="grid", model=model, image_size=size, batch=batch)
                peak_per_sample = peak / batch


def headline(bench: Bench, options: argparse.Namespace) -> None:
    """A common batch by hand against ours with the card's 23.2 GiB, headroom 3 GB, and the batch left to it."""
    for model, batch in _HEADLINE:
        if bench.late():
            return
        cell = Cell(model, 224, bench.device, 4096)
        free = {"min_batch_size": 4, "max_batch_size": 512, "batch_policy": "free", "memory_limit_gb": CAP_GB}
        auto = free | {"amp_dtype": "auto", "channels_last": "auto"}
        for name, settings in (("ours_free", free), ("ours_free_auto", auto)):  # they would share the card's 23.2 GiB
            systems: dict[str, Any] = {
                "eager": lambda cell=cell, batch=batch: (eager(cell, batch), None),
                name: lambda cell=cell, settings=settings: settled(ours(cell, config_of(4, **settings))),
            }
            bench.compare(systems, part="headline", model=model, image_size=224, batch=batch)


def cifar(bench: Bench, options: argparse.Namespace) -> None:
    """A folder of 32-px images through run_training, against the bare graph of the same model and batch."""
    for batch in (128, 512):
        if bench.late():
            return
        config = TrainConfig(
            model="resnet18", dataset=options.folder, device=str(bench.device), epochs=6, min_batch_size=batch,
            max_batch_size=batch, amp_dtype="bf16", channels_last=True, memory_limit_gb=CAP_GB,
        )  # fmt: skip
        began = time.perf_counter()
        outcome = run_training(config)
        before = time.perf_counter() - began - outcome.seconds
        cell = Cell("resnet18", 32, bench.device, 2048)
        cell.build = lambda: build_model("resnet18", 10, image_size=32)  # type: ignore[method-assign]
        system = eager(cell, batch, graph=True)
        bench._timed(system, 20)
        took, samples = bench._timed(system, round(100 * 512 / batch))
        where = {"part": "cifar", "model": "resnet18", "image_size": 32, "batch": batch, "status": "ok"}
        bench.row(**where, system="graph", images_per_second=samples / took, ratio=1.0, rounds=1)
        rate = outcome.samples_per_second or 0.0
        bench.row(**where, system="ours", images_per_second=rate, ratio=rate * took / samples,
                  peak_gb=outcome.peak_reserved_gb, seconds_before=before, rounds=1)  # fmt: skip


def jpeg(bench: Bench, options: argparse.Namespace) -> None:
    """JPEG files of 500 px: training against the workers alone and the model alone."""
    from PIL import Image

    from acmds_optimizer.engine.data import make_source
    from acmds_optimizer.zoo.datasets import build_data

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(options.jpegs):
            target = Path(folder) / f"class{number % 10}"
            target.mkdir(exist_ok=True)
            path = target / f"{number}.jpg"
            if number >= _DISTINCT_JPEGS:  # to decode one again takes as long
                os.link(target / f"{number % _DISTINCT_JPEGS}.jpg", path)
                continue
            small = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # as hard to decode as a photograph, about 60 kB
            image = Image.fromarray(small).resize((500, 500), Image.Resampling.BICUBIC)
            noise = rng.normal(0, 8, (500, 500, 3))
            Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        config = TrainConfig(
            model="resnet18", dataset=folder, image_size=224, device=str(bench.device), epochs=3,
            min_batch_size=128, max_batch_size=128, amp_dtype="bf16", channels_last=True,
            num_workers=max(1, (os.cpu_count() or 2) - 1),
        )  # fmt: skip
        bundle = build_data(config)
        source = make_source(bundle.train, bundle, config, bench.device, train=True)
        rates = []
        for epoch in range(2):  # the first starts the workers
            began = time.perf_counter()
            with source.stream(np.arange(len(source)), epoch=epoch, augment=True) as stream:
                while stream.remaining:
                    stream.take(128)
            bench._wait()
            rates.append(len(source) / (time.perf_counter() - began))
        source.close()
        where = {"part": "jpeg", "model": "resnet18", "image_size": 224, "batch": 128, "status": "ok"}
        bench.row(**where, system="workers", images_per_second=rates[-1], rounds=1)
        cell = Cell("resnet18", 224, bench.device, 512)
        system, trainer = ours(cell, config_of(128))
        bench._timed(system, 20)
        took, samples = bench._timed(system, 60 if bench.device.type == "cuda" else 2)
        trainer.shutdown()
        bench.row(**where, system="model", images_per_second=samples / took, rounds=1)
        outcome = run_training(config)
        limit, rate = min(rates[-1], samples / took), outcome.samples_per_second or 0.0
        bench.row(**where, system="ours", images_per_second=rate, ratio=rate / limit, rounds=1)


def first(bench: Bench, options: argparse.Namespace) -> None:
    """Seconds from the command to the first step, as `acmds-train` is started by hand."""
    for system, extra in (("first_run", []), ("again", []), ("graphs_off", ["--no-enable-cuda-graphs"])):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "acmds_optimizer.cli", "--dataset", options.folder, "--model", "resnet18",
                "--max-batch-size", "256", "--max-steps", "1", "--quiet", "--device", str(bench.device),
                "--output-dir", folder + "/run", "--checkpoint-every", "0", *extra,
            ]  # fmt: skip
            began, steps = time.perf_counter(), Path(folder) / "run" / "steps.csv"
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while process.poll() is None and not (steps.is_file() and steps.read_text().count("\n") > 1):
                time.sleep(0.02)
            took = time.perf_counter() - began  # what comes after the step is a validation, and the pictures
            said = process.communicate()[1]
            reason = "" if process.returncode == 0 else said.splitlines()[-1][:100]
            bench.row(part="first", model="resnet18", image_size=32, batch=256, system=system,
                      status="error" if reason else "ok", reason=reason, seconds_before=took, rounds=1)  # fmt: skip


PARTS: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
    "grid": grid, "headline": headline, "cifar": cifar, "jpeg": jpeg, "first": first,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    names = lambda kind=str: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out", type=Path, required=True, metavar="FILE", help="where the table goes, as CSV; facts beside it as .json"
    )
    add("--device", type=torch.device, default="cuda", help="default: cuda")
    add("--parts", type=names(), default=None, help=f"of {', '.join(PARTS)} (default: grid, headline)")
    add("--models", type=names(), help=f"default: {','.join(_MODELS)} [small_cnn]")
    add("--image-sizes", type=names(int), help="default: 32,224 [14]")
    add("--batches", type=names(int), help="default: 16,32,64,128,256,512 [16,32]")
    add(
        "--systems",
        type=names(),
        help="default: eager,graph,ours,ours_auto [eager,ours]; also eager_fed, compiled, ours_compiled",
    )
    add("--folder", help="of 32-px images, for the parts cifar and first")
    add("--jpegs", type=int, default=16_000, help="files of the part jpeg (default: 16000)")
    add("--seconds", type=float, default=0.4, help="length of a block (default: 0.4)")
    add("--rounds", type=int, default=3, help="blocks of each system that count (default: 3)")
    add("--deadline", type=float, metavar="S", help="start no row later than S seconds after the start")
    options = parser.parse_args(argv)
    cuda = options.device.type == "cuda"
    options.parts = options.parts or (["grid", "headline"] if cuda else ["grid"])
    options.models = options.models or (list(_MODELS) if cuda else ["small_cnn"])
    options.image_sizes = options.image_sizes or ([32, 224] if cuda else [14])
    options.batches = options.batches or ([16, 32, 64, 128, 256, 512] if cuda else [16, 32])
    options.systems = options.systems or (["eager", "graph", "ours", "ours_auto"] if cuda else ["eager", "ours"])
    if not options.folder and {"cifar", "first"} & set(options.parts):
        parser.error("the parts cifar and first need --folder")
    if cuda:
        set_up_cuda(CurriculumConfig())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(options.device) | {"columns": COLUMNS}
    facts["command"] = " ".join(["python -m benchmarks.throughput", *(argv or sys.argv[1:])])
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    bench = Bench(options.out, options.device, options.seconds, options.rounds, options.deadline)
    for part in options.parts:
        PARTS[part](bench, options)
    bench.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
