"""All measurements that need a GPU, within a number of seconds.

    python -m benchmarks.gpu_session OUT 6140 --data cifar10            # everything; 102 minutes
    python -m benchmarks.gpu_session OUT 560 --parts tests,memory       # a part of it
    python -m benchmarks.gpu_session OUT 560 --list                     # only print the commands

Each part is a command of its own with a limit of its own. One that fails or hangs is noted, and the next one begins;
what does not fit into the seconds left is skipped. With several GPUs the parts that want more than one run first, and
the others side by side, one on each. OUT gets the parts' tables, PART.log with all that a part printed, and a row for
each in session.csv. A part whose log is there already is not run again, except those that go on where they stopped
(curriculum, resolution, study). --data: a folder of CIFAR-10 images as benchmarks/cifar10_folder.py writes it, or the
parquet file that it unpacks.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COLUMNS = ("part", "status", "seconds", "limit_s", "gpus", "command")
_SHORTEST_S = 30.0
_GRACE_S = 15.0
"""A script's own deadline comes so long before it is killed."""


@dataclass(frozen=True)
class Part:
    """One command, in which {out} is the folder of results, {data} that of CIFAR-10, {deadline} the seconds it has."""

    name: str
    limit_s: float
    command: str
    table: str = ""
    """Where its stdout goes, if that is a table."""
    goes_on: bool = False
    """Whether it can be run again, and adds what is missing."""
    gpus: int = 1


_THROUGHPUT = "benchmarks.throughput --out {out}/{part}.csv --deadline {deadline} --parts"
_CURRICULUM = "benchmarks.curriculum cifar --data {data} --out {out}/curriculum.csv --seeds 3 --deadline {deadline}"
PARTS = {
    part.name: part
    for part in (
        Part("tests", 300, "pytest -m gpu -q -p no:cacheprovider"),
        Part("memory", 580, "benchmarks.memory --out {out}/memory.csv --plot {out}/neighbour.png --seconds 6 "
             "--deadline {deadline}"),
        Part("grid", 540, f"{_THROUGHPUT} headline,grid"),
        Part("jpeg", 120, f"{_THROUGHPUT} jpeg"),
        Part("cifar", 120, f"{_THROUGHPUT} first,cifar --folder {{data}}"),
        Part("compiled", 240, f"{_THROUGHPUT} grid --image-sizes 224 --models resnet50,efficientnet_b0 "
             "--batches 32,256 --systems eager,compiled,ours,ours_compiled"),
        Part("curriculum_15", 560, f"{_CURRICULUM} --epochs 15", goes_on=True),
        Part("curriculum_30", 560, f"{_CURRICULUM} --epochs 30", goes_on=True),
        Part("resolution", 300, "benchmarks.resolution --data {data} --out {out}/resolution.csv "
             "--plans 0.5:3:17 0.5:3:18 --record {out}/resolution_steps --deadline {deadline}", goes_on=True),
        Part("dry_run", 180, "benchmarks.dry_run --out {out}/dry_run.csv --deadline {deadline}"),
        Part("study", 1800, "benchmarks.tuner study search_spaces/resnet50_neighbour.yaml {deadline} --out {out}/study",
             table="study.csv", goes_on=True),
        Part("ranks", 240, "benchmarks.ranks --rounds 2 --seconds 5", table="ranks.csv", gpus=2),
        Part("pair", 600, "benchmarks.tuner pair 24 cuda --out {out}/pair", table="pair.csv", gpus=2),
    )
}  # fmt: skip
"""In the order in which they are run, but for those that want several GPUs."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for tables and logs")
    parser.add_argument("seconds", type=float, metavar="SECONDS", help="what it all may take")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", type=Path, help="CIFAR-10, for the parts cifar, curriculum and resolution")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    options = parser.parse_args(argv)
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    chosen = [PARTS[name] for name in PARTS if name in names]
    if options.data is None and (wanting := [part.name for part in chosen if "{data}" in part.command]):
        parser.error(f"--data is needed for {', '.join(wanting)}")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data: {options.data} does not exist")
    if options.list:
        for part in chosen:
            print(shlex.join(arguments(part, options.out.resolve(), options.data, part.limit_s)))
        return 0
    return run_all(chosen, options.out.resolve(), options.data, options.seconds)


def arguments(part: Part, out: Path, data: Path | None, limit_s: float) -> list[str]:
    """The command line of a part that may take `limit_s`."""
    deadline = round(max(1.0, limit_s - _GRACE_S))
    values = {"out": str(out), "part": part.name, "data": str(data), "deadline": str(deadline)}
    return [sys.executable, "-m", *(word.format(**values) for word in part.command.split())]


def run_all(parts: Sequence[Part], out: Path, data: Path | None, seconds: float) -> int:
    """Run them, with a row each in session.csv; 1 if one did not end well."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    fresh = not (out / "session.csv").exists()
    gpus = _gpus()
    waiting = deque(sorted(parts, key=lambda part: part.gpus == 1))
    with (
        tempfile.TemporaryDirectory() as scratch,
        (out / "session.csv").open("a", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        if fresh:
            table.writerow(COLUMNS)
        folder = None if data is None else _folder(data.resolve(), Path(scratch))
        lock, stop = threading.Lock(), threading.Event()
        bad: list[str] = []

        def take(part: Part, visible: str, environment: dict[str, str]) -> None:
            began = time.monotonic()
            limit = min(part.limit_s, end - began)
            command = arguments(part, out, folder, limit)
            log = out / f"{part.name}.log"
            if log.exists() and not part.goes_on:
                status = "was there already"
            elif limit < _SHORTEST_S:
                status = "no time left"
            elif part.gpus > max(1, len(gpus)):
                status = f"needs {part.gpus} GPUs, and here are {len(gpus)}"
            else:
                status = _run(command, log, out / part.table if part.table else None, limit, environment, stop)
            took = time.monotonic() - began
            with lock:
                if status not in ("ok", "was there already"):
                    bad.append(part.name)
                table.writerow((part.name, status, f"{took:.1f}", f"{limit:.0f}", visible, shlex.join(command)))
                file.flush()
                print(f"{part.name}: {status}, {took:.0f} s", flush=True)

        def serve(visible: str, environment: dict[str, str]) -> None:
            while not stop.is_set():
                try:
                    part = waiting.popleft()
                except IndexError:
                    return
                take(part, visible, environment)

        everything = ",".join(gpus)
        while waiting and waiting[0].gpus > 1:
            take(waiting.popleft(), everything, {})
        lanes: dict[str, dict[str, str]] = {everything: {}}
        if len(gpus) > 1:  # what a part probes and remembers is none of the others' business
            lanes = {
                gpu: {"CUDA_VISIBLE_DEVICES": gpu, "XDG_CACHE_HOME": str(Path(scratch) / f"cache-{gpu}")}
                for gpu in gpus
            }
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                for served in [pool.submit(serve, *lane) for lane in lanes.items()]:
                    served.result()
            finally:
                stop.set()  # after Ctrl-C the others end what they run
    return int(bool(bad))


def _run(
    command: list[str], log: Path, table: Path | None, limit_s: float, more: dict[str, str], stop: threading.Event
) -> str:
    """How it ended. It and all that it started are ended at the limit, or when `stop` is set."""
    environment = {
        **os.environ,
        **more,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
    }
    with log.open("a", encoding="utf-8") as text:
        output = table.open("w", encoding="utf-8") if table else text
        try:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=text,
                start_new_session=True,
            )  # fmt: skip
        finally:
            if table:
                output.close()
    end = time.monotonic() + limit_s
    try:
        while (code := process.poll()) is None and time.monotonic() < end:
            if stop.wait(min(0.2, max(0.0, end - time.monotonic()))):
                return "interrupted"
        if code is None:
            return f"ended after {limit_s:.0f} s"
        return "ok" if code == 0 else f"exit code {code}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5.0)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _folder(data: Path, scratch: Path) -> Path:
    if data.is_dir():
        return data
    from benchmarks.cifar10_folder import main as unpack

    unpack(str(data), str(scratch / "cifar10"))
    return scratch / "cifar10"


def _gpus() -> list[str]:
    """The GPUs that parts may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(main())
