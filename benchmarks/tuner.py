"""What a search costs beside the training, and what survives a kill. CSV on stdout, progress on stderr.

    python -m benchmarks.tuner overhead [TRIALS] [DEVICE]   # 1 to 2 minutes: seconds lost a trial beyond training
    python -m benchmarks.tuner kill [KILLS] [AT_ONCE]       # CPU, minutes: kill -9 at random moments, and resume
    python -m benchmarks.tuner study FILE.yaml [SECONDS]    # a search, and what it found beside its baselines
    python -m benchmarks.tuner pair [TRIALS] [DEVICE]       # two GPUs (or `cpu`): trials an hour, one and two at once

All take `--backend local` as the last words to do without Ray, and `--out FOLDER` before them to keep the studies.
"""

from __future__ import annotations

import csv
import inspect
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from acmds_tune.records import busy_share, choose_best, confirmations
from acmds_tune.report import load_study
from acmds_tune.space_load import load

QUICK = """
trials: {trials}
seed: 1
objective: speed
budget: {{epochs: 1}}
fixed: {{device: cpu, dataset: digits, model: small_cnn, memory_limit_gb: 0.02, target_headroom_gb: 0.002}}
search:
  lr: {{low: 0.0001, high: 0.1, log: true}}
  min_batch_size: {{low: 4, high: 32}}
"""

QUICK_ON_GPU = """
trials: {trials}
seed: 1
objective: speed
budget: {{seconds: 1}}
fixed: {{dataset: benchmarks.synthetic_images:float224, model: resnet50, memory_limit_gb: 23.2, target_headroom_gb: 3.0,
  channels_last: true, epochs: 1000}}
search:
  max_batch_size: {{low: 64, high: 256, step: 32}}
"""

LATER_STAGES = """
anchor_every: 9
baselines: [default, fixed batch]
confirm: {top: 2, seeds: 2}
"""
"""What a search that is killed has as well, so that kills strike in every stage."""

PAIR = """
seed: 1
objective: speed
budget: {{seconds: 12}}
fixed: {{device: {device}, dataset: {dataset}, model: {model}, effective_batch_size: 256, enable_cuda_graphs: false,
  channels_last: true, amp_dtype: bf16, epochs: 1000}}
search:
  max_batch_size: {{low: 64, high: 256, step: 32}}
resources: {{concurrent_trials: {places}}}
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tune(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "acmds_tune.cli", *arguments]


def overhead(folder: Path, backend: list[str], trials: int = 30, device: str = "cpu") -> None:
    """Seconds of a trial that are not training, from its start to the start of the next one."""
    text = QUICK if device == "cpu" else QUICK_ON_GPU
    (folder / "overhead.yaml").write_text(text.format(trials=trials), encoding="utf-8")
    subprocess.run(
        tune("search", str(folder / "overhead.yaml"), "--results-dir", str(folder), *backend),
        check=True,
        stdout=DEVNULL,
    )
    rows = sorted(load_study(folder / "overhead").trials, key=lambda row: row.number)
    inside = [(row.seconds or 0.0) - (row.figures["training_seconds"] or 0.0) for row in rows]
    between = [(b.began or 0.0) - (a.began or 0.0) - (a.seconds or 0.0) for a, b in pairwise(rows)]
    lost = [one + other for one, other in zip(inside, [*between, 0.0], strict=True)][:-1]
    table = csv.writer(sys.stdout)
    table.writerow(("figure", "median", "largest", "n"))
    for name, values in (("lost_in_trial_s", inside[1:]), ("lost_between_s", between[1:]), ("lost_s", lost[1:])):
        table.writerow((name, f"{statistics.median(values):.3f}", f"{max(values):.3f}", len(values)))
    table.writerow(("lost_first_s", f"{lost[0]:.3f}", f"{lost[0]:.3f}", 1))


def kill(folder: Path, backend: list[str], kills: int = 20, at_once: int = 1) -> None:
    """Kill the search at random moments; every resume must go on, and the last one end with every trial, once.

    A search of 20 trials has an anchor after each nine, a baseline and a confirmation, and is killed in these as well.
    """
    rng, trials = random.Random(0), 20
    text = f"{QUICK.format(trials=trials)}{LATER_STAGES}resources: {{concurrent_trials: {at_once}}}\n"
    (folder / "kill.yaml").write_text(text, encoding="utf-8")
    study = folder / "kill"
    command = tune("search", str(folder / "kill.yaml"), "--results-dir", str(folder), "--resume", *backend)
    table = csv.writer(sys.stdout)
    table.writerow(("kill", "after_trials", "and_s", "rows", "finished", "lost_rows"))
    finished_before: dict[int, str] = {}
    for number in range(kills):
        ended = len(list(study.glob("trials/*/outcome.json")))
        more = rng.choice((-1, 0, 1, 2, 3))  # trials that end before; -1: while the search starts
        process = subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL)
        while process.poll() is None and more >= 0 and len(list(study.glob("trials/*/outcome.json"))) < ended + more:
            time.sleep(0.02)
        delay = rng.uniform(0.0, 1.5)
        time.sleep(delay)
        process.kill()
        process.wait()
        rows = load_study(study).trials if (study / "journal.log").is_file() else ()
        finished = {row.number: row.status for row in rows if row.status != "running" and not row.interrupted}
        lost = [each for each, status in finished_before.items() if finished.get(each) != status]
        table.writerow((number, more, f"{delay:.2f}", len(rows), len(finished), len(lost)))
        say(f"kill {number}: {len(finished)} finished, {len(lost)} lost")
        finished_before = finished
        if sum(row.stage == "confirm" for row in rows) > 4:  # a new one, so that each kill strikes a search that runs
            finish(table, command, study, trials)
            study.rename(folder / f"kill_{number}")
            finished_before = {}
    if study.exists():
        finish(table, command, study, trials)


def finish(table: Any, command: list[str], study: Path, trials: int) -> None:
    """Resume to the end, and check that every trial is there once."""
    resume = tune("resume", str(study), *command[command.index("--resume") + 1 :])
    subprocess.run(resume, check=True, stdout=DEVNULL, stderr=DEVNULL)
    counted = [row for row in load_study(study).trials if not row.interrupted]
    searched = [row for row in counted if row.stage == "search"]
    points = Counter(tuple(row.config[name] for name in ("lr", "min_batch_size")) for row in searched)
    later = Counter((row.stage, row.label, row.seed) for row in counted if row.stage in ("baseline", "confirm"))
    repeated = sum(count - 1 for count in [*points.values(), *later.values()])
    stages = Counter(row.stage for row in counted)
    say(f"resumed to the end: {dict(stages)}, {repeated} repeated")
    table.writerow(("end", "", "", len(load_study(study).trials), len(counted), repeated))
    # two of the best, the defaults (if they are not among these) and the best fixed batch on two seeds; an anchor after
    # each nine trials
    first = next(f"trial {row.number}" for row in searched if row.label == "default")
    among = any(row.stage == "confirm" and row.label == first for row in counted)
    wanted = {"search": trials, "anchor": (trials - 1) // 9, "confirm": 6 if among else 8}
    if repeated or any(stages[name] != count for name, count in wanted.items()):
        raise SystemExit(f"a trial was lost or repeated: {dict(stages)}")


def study(folder: Path, backend: list[str], file: str, deadline: int = 300) -> None:
    """Run the file's search, or go on with it, and write a row for the best, the defaults and the best fixed batch."""
    began = time.monotonic()
    last = (load(file, resumed=True).budget.seconds or 10.0) + 15.0  # the trial under way ends first, then the report
    command = tune("search", file, "--results-dir", str(folder / "results"), "--resume", *backend)
    process = subprocess.Popen(command, stdout=DEVNULL)
    try:
        process.wait(max(1.0, deadline - last))
    except subprocess.TimeoutExpired:
        say("the deadline is near: ending the search")
        process.send_signal(signal.SIGINT)
        process.wait(last)
    wall = time.monotonic() - began
    found = folder / "results" / Path(file).stem
    if not (found / "journal.log").is_file():
        raise SystemExit(
            f"the search ended with code {process.returncode} before its first trial; what it said is above"
        )
    record = load_study(found)
    best, again = choose_best(record), confirmations(record)
    table = csv.writer(sys.stdout)
    table.writerow(("what", "trials", "feasible", record.objectives[0].name, "standard_deviation"))
    if best is not None:
        table.writerow(("best (selection run)", 1, best.feasible, f"{best.values[0]:.1f}" if best.values else "", ""))
    for label, found in again.items():
        mean, deviation = (found.means or (0.0,))[0], (found.deviations or (0.0,))[0]
        chosen = best is not None and label == f"trial {best.number}"
        label = f"best, confirmed ({label})" if chosen else label
        table.writerow((label, len(found.trials), found.feasible, f"{mean:.1f}", f"{deviation:.1f}"))
    lost = [
        (row.seconds or 0.0) - (row.figures.get("training_seconds") or 0.0)
        for row in record.trials
        if row.status in ("ok", "infeasible")
    ]
    statuses = ", ".join(f"{count} {status}" for status, count in Counter(t.status for t in record.trials).items())
    say(f"{len(record.trials)} trials ({statuses}), {wall:.0f} s in all")
    table.writerow(("wall_s", len(record.trials), "", f"{wall:.1f}", ""))
    table.writerow(("gpu_busy_share", "", "", busy_share(record), ""))
    table.writerow(("training_share", "", "", busy_share(record, "training_seconds"), ""))
    table.writerow(("lost_in_trial_s (median)", len(lost), "", f"{statistics.median(lost or [0.0]):.3f}", ""))


def pair(folder: Path, backend: list[str], trials: int = 8, device: str = "cuda") -> None:
    """The same search one trial at a time and two at once.

    `settled` counts from when the first trials have ended, who wait for a process to import PyTorch.
    """
    what = ("benchmarks.synthetic_images:float224", "resnet50") if device == "cuda" else ("digits", "small_cnn")
    table, rates = csv.writer(sys.stdout), []
    columns = ("at_once", "trials", "seconds", "trials_an_hour", "samples_per_second_median", "ratio")
    table.writerow((*columns, "settled_trials_an_hour", "settled_ratio"))
    for places in (1, 2):
        name = f"at_once_{places}"
        text = PAIR.format(device=device, dataset=what[0], model=what[1], places=places)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        options = ["--name", name, "--trials", str(trials), "--results-dir", str(folder / "results")]
        subprocess.run(tune("search", str(folder / f"{name}.yaml"), *options, *backend), check=False, stdout=DEVNULL)
        rows = [row for row in load_study(folder / "results" / name).trials if row.seconds and row.began]
        ends = sorted((row.began or 0.0) + (row.seconds or 0.0) for row in rows)
        seconds = ends[-1] - min(row.began or 0.0 for row in rows)
        speeds = [row.figures.get("samples_per_second") or 0.0 for row in rows]
        settled = (len(rows) - places) / max(ends[-1] - ends[places - 1], 1e-9)
        rates.append((3600 * len(rows) / seconds, 3600 * settled))
        row = (places, len(rows), f"{seconds:.1f}", f"{rates[-1][0]:.0f}", f"{statistics.median(speeds):.0f}")
        (first, first_settled), (now, now_settled) = rates[0], rates[-1]
        table.writerow((*row, f"{now / first:.2f}", f"{now_settled:.0f}", f"{now_settled / first_settled:.2f}"))


def main(words: list[str]) -> int:
    commands = {"overhead": overhead, "kill": kill, "study": study, "pair": pair}
    if not words or words[0] not in commands:
        say(__doc__ or "")
        return 0 if words in (["--help"], ["-h"]) else 2
    backend: list[str] = []
    if "--backend" in words:
        place = words.index("--backend")
        backend, words = words[place : place + 2], words[:place]
    out = None
    if "--out" in words:
        place = words.index("--out")
        out, words = Path(words[place + 1]), words[:place] + words[place + 2 :]
        out.mkdir(parents=True, exist_ok=True)
    arguments = [int(word) if word.isdigit() else word for word in words[1:]]
    try:
        inspect.signature(commands[words[0]]).bind(out, backend, *arguments)
    except TypeError as error:
        say(f"{words[0]}: {error}")
        return 2
    with tempfile.TemporaryDirectory(prefix="acmds-bench-") as temporary:
        commands[words[0]](out or Path(temporary), backend, *arguments)  # type: ignore[operator]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
