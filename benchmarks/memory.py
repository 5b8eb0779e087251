"""Every way to choose a batch size, on the same card, in the same run: one command, one table.

    python -m benchmarks.memory --out memory.csv                              # a CUDA card, ResNet-50 at 224 px
    python -m benchmarks.memory --device cpu --out memory.csv                 # a card on the CPU, in two minutes
    python -m benchmarks.memory --systems ours,fixed_cap --scenarios neighbour --out n.csv --plot n.png

Each system trains in a child process of its own, so that contexts and caches do not leak from one to the next; model,
images (on the device already), precision, memory layout, fused AdamW and seeds are the same. A child that crashes or
hangs is a row with its reason, and the others go on. Progress goes to stderr, the table to --out, and beside it, with
the ending .json, versions, hardware, settings and what the offline search found. GB are 2**30 bytes.

Systems: oracle (the fastest fixed batch that keeps the headroom, found offline), oracle_phases (the same for each
phase of the scenario, known ahead), fixed_cap (the largest that fits at the start), accelerate, lightning_power and
lightning_binsearch (the packages' own search), halving and aimd (by hand), ours (micro-batch free to move), ours_hold
(effective batch held by accumulation), ours_no_knee (memory alone decides; only in the scenario neighbour), ours_auto
(precision, layout and graphs chosen by probes, so not with equal flags; only in static).

Scenarios: static; neighbour (another process wants 8 GB in the middle third); growing (image sides in four phases);
heavy (each batch's side drawn, most small, few large); cold (the first images alone, search included; the column
first_images_per_second says the same of the other scenarios). The scenario neighbour starts as static does, so there
Lightning's systems begin with what they found in static, and are charged the seconds of that search but not its errors.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from acmds_tune.neighbour import serve
from benchmarks.memory_scenarios import SCENARIOS, Scenario, Setting
from benchmarks.memory_systems import Known

COLUMNS = {
    "scenario": "static, neighbour, growing, heavy or cold",
    "system": "who chose the batch size",
    "repeat": "number of the repetition, from 0",
    "status": "ok, out_of_memory (an error escaped and ended it), crashed, timeout, error or skipped",
    "reason": "why, where it is not ok",
    "oom_escaped": "out-of-memory errors that ended the run",
    "oom_recovered": "out-of-memory errors thrown and caught, search included",
    "oom_after_20_steps": "those thrown after the first 20 steps",
    "alloc_retries": "times the allocator released its cache to serve a request",
    "headroom_kept_fraction": "share of the steps that left the headroom free: budget less peak reserved",
    "worst_breach_gb": "most that was missing of the headroom in a step",
    "images_per_second": "over the whole run, search apart, recoveries included",
    "steady_images_per_second": "over its second half",
    "first_images_per_second": "over the first images, search included; empty if so many were not reached",
    "search_seconds": "until the first step was done, beyond a usual step",
    "size_changes": "how often the micro-batch changed",
    "distinct_sizes": "how many sizes it had",
    "batch_mean": "mean micro-batch over the steps",
    "batch_last": "micro-batch of the last step",
    "neighbour_got_fraction": "what the neighbour held of what it wanted, mean over the steps of its third",
    "done_fraction": "share of the run that was done; below 1 where it ended early",
    "steps": "optimizer steps",
    "images": "images trained on",
    "seconds": "from the start of the search to the end",
}
"""Columns of the table, and what they mean."""

_SEARCHES = ("lightning_power", "lightning_binsearch")
_CUDA = Setting("cuda", "resnet50", 224, 23.2, 3.0, "bf16", 512, 6.0, None, 20_000)
_CPU = Setting("cpu", "small_cnn", 14, 0.03125, 0.00390625, "off", 128, 30.0, 4000, 1000, classes=10)
_SEARCH_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.memory_child import SYSTEMS

    parser = _parser(list(SYSTEMS))
    options = parser.parse_args(argv)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    setting = _setting(options)
    repository = str(Path(__file__).resolve().parent.parent)
    # the forkserver starts as a fresh interpreter, and does not take over sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (repository, os.environ.get("PYTHONPATH"))))
    bench = Bench(setting, options.deadline)
    rows: list[dict[str, Any]] = []
    timelines: dict[str, tuple[str, list[Any]]] = {}
    facts = bench.probe(options.scenarios, options.systems)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"command": " ".join(["python -m benchmarks.memory", *(argv or sys.argv[1:])]), "columns": COLUMNS}
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        for scenario in options.scenarios:
            for system in options.systems:
                if not _takes_part(system, scenario):
                    continue
                for repeat in range(options.repeats):
                    row, timeline = bench.run(scenario, system)
                    row |= {"scenario": scenario, "system": system, "repeat": repeat}
                    rows.append(row)
                    writer.writerow({name: _plain(row.get(name)) for name in COLUMNS})
                    file.flush()
                    if scenario == "neighbour" and timeline:
                        timelines.setdefault(system, (row["status"], timeline))
    print(f"{len(rows)} rows in {options.out} after {time.monotonic() - bench.began:.0f} s", file=sys.stderr)
    if options.plot:
        from benchmarks.memory_plot import draw

        try:
            draw(timelines, setting, options.plot)
        except ValueError as error:
            print(f"no picture: {error}", file=sys.stderr)
            return 1
    return 0


def _parser(systems: list[str]) -> argparse.ArgumentParser:
    def names(valid: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [name for name in chosen if name not in valid]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(valid)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="where the table goes, as CSV")
    add("--plot", type=Path, metavar="FILE", help="draw memory, batch and neighbour over time into this PNG")
    add("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    add("--scenarios", type=names(SCENARIOS), default=list(SCENARIOS[:-1]), help="default: all but cold")
    add("--systems", type=names(systems), default=systems, help="default: all")
    add("--repeats", type=int, default=1, help="runs of each (default: 1)")
    add("--deadline", type=float, metavar="S", help="start nothing that would not be done S seconds after the start")
    group = parser.add_argument_group("settings; defaults for a CUDA card, and in brackets for the CPU")
    for name, text in {
        "model": "", "image_size": "largest side, in pixels", "cap_gb": "what the process may hold",
        "headroom_gb": "to keep free", "amp": "bf16, fp16 or off", "max_batch": "largest micro-batch of ours",
        "seconds": "length of a run, search apart", "images": "or its length in images, if that is less",
        "first_images": "how many count as the cold start", "seed": "",
    }.items():  # fmt: skip
        kind = {"model": str, "amp": str}.get(name, float if name.endswith("_gb") or name == "seconds" else int)
        choices = ("bf16", "fp16", "off") if name == "amp" else None
        defaults = f"{getattr(_CUDA, name)} [{getattr(_CPU, name)}]"
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, choices=choices, help=f"{text} (default: {defaults})".strip()
        )
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    base = _CPU if options.device == "cpu" else replace(_CUDA, device=options.device)
    given = {name: getattr(options, name, None) for name in asdict(base) if name not in ("device", "classes")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _takes_part(system: str, scenario: str) -> bool:
    """oracle_phases differs from oracle only where something changes; ours without knee is about the neighbour."""
    if system in ("ours_no_knee", "ours_auto"):
        return scenario == ("static" if system == "ours_auto" else "neighbour")
    if system == "oracle_phases":
        return scenario not in ("static", "cold")
    return system != "ours_hold" or scenario not in ("growing", "heavy")


class Bench:
    """Starts the children one after the other, and waits for each no longer than it may take."""

    def __init__(self, setting: Setting, deadline_s: float | None) -> None:
        self.setting = setting
        self.began = time.monotonic()
        self._deadline_s = deadline_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.memory_child"])
        self._known = Known()
        self._found: dict[tuple[str, int, bool], tuple[int, float]] = {}
        self._overhead_s = 5.0

    def probe(self, scenarios: list[str], systems: list[str]) -> dict[str, Any]:
        """Search offline for the batch sizes that oracles and the fixed batch use; facts for the JSON file."""
        wanting = [name for name in systems if name.startswith(("oracle", "fixed"))]
        sides = sorted({side for name in scenarios for side in Scenario(name, self.setting).sides})
        timed = 0.5 if self.setting.device != "cpu" else 0.0
        result, _ = self._child("probe", (self.setting, sides if wanting else [], timed), 180.0, None)
        probes = result.pop("probes", [])
        self._known = Known(probes)
        self._say(f"offline search: {result['status']} {result['reason']}, {len(probes)} sizes at {sides} px")
        return {
            "setting": asdict(self.setting),
            "environment": result.get("environment", {}),
            "probes": [asdict(probe) for probe in probes],
        }

    def run(self, scenario_name: str, system: str) -> tuple[dict[str, Any], list[Any]]:
        """One row of the table, and the steps behind it."""
        scenario = Scenario(scenario_name, self.setting)
        if self._deadline_s is not None:
            expected = time.monotonic() - self.began + self.setting.seconds + self._overhead_s
            if expected > self._deadline_s:
                return {"status": "skipped", "reason": "no time left before --deadline"}, []
        key = (system, scenario.side(0.0, 0), scenario_name == "heavy")
        known = self._known
        if scenario_name == "neighbour" and key in self._found:
            known = Known(known.probes, *self._found[key])
        timeout = _SEARCH_S + 3 * self.setting.seconds
        if self._deadline_s is not None:
            timeout = min(timeout, self._deadline_s - (time.monotonic() - self.began))
        began = time.monotonic()
        row, timeline = self._child("run", (self.setting, scenario_name, system, known), timeout, scenario)
        took = time.monotonic() - began
        if system in _SEARCHES and row.get("batch_last"):
            self._found[key] = (row["batch_last"], row["search_seconds"])
        self._say(
            f"{scenario_name:<10} {system:<20} {row['status']:<13} {row.get('images_per_second') or 0:7.0f} img/s  "
            f"batch {row.get('batch_mean') or 0:5.0f}  headroom kept {row.get('headroom_kept_fraction') or 0:6.1%}  "
            f"{row.get('oom_recovered', 0)} recovered  {took:4.1f} s  {row['reason'][:80]}"
        )
        return row, timeline

    def _child(
        self, task: str, arguments: tuple[Any, ...], timeout: float, scenario: Scenario | None
    ) -> tuple[dict[str, Any], list[Any]]:
        from benchmarks import memory_child

        ours, theirs = self._context.Pipe()
        extra: tuple[Any, ...] = ()
        other: BaseProcess | None = None
        if scenario is not None:
            link, held = None, None
            if scenario.name == "neighbour" and self.setting.device != "cpu":
                near, link = self._context.Pipe()
                held = self._context.Value("d", 0.0)
                other = self._start(serve, (near, held, self.setting.device))
                near.close()
            extra = (link, held)
        process = self._start(getattr(memory_child, task), (theirs, *arguments, *extra))
        theirs.close()
        try:
            return _answer(process, ours, timeout)
        finally:
            for started in (process, other):
                if started is not None:
                    started.kill()
                    started.join()
            for connection in (ours, *extra[:1]):
                if connection is not None:
                    connection.close()

    def _start(self, target: Any, arguments: tuple[Any, ...]) -> BaseProcess:
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)


def _answer(process: BaseProcess, connection: Any, timeout: float) -> tuple[dict[str, Any], list[Any]]:
    """What the child sends, or a row that says why it did not."""
    try:
        if connection.poll(timeout):
            return connection.recv()
    except (EOFError, ConnectionError):
        process.join(10.0)
        return {"status": "crashed", "reason": f"the process ended with exit code {process.exitcode}"}, []
    return {"status": "timeout", "reason": f"no end after {timeout:.0f} s"}, []


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


if __name__ == "__main__":
    sys.exit(main())
