"""Which checkpoints are kept, what a run that is killed loses, and what can be made of a checkpoint."""

from __future__ import annotations

import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from acmds_optimizer import ACMDSTrainer, CurriculumConfig, MemoryPressureController, TrainConfig, cli, run_training
from acmds_optimizer.engine import checkpoint
from acmds_optimizer.engine.epochs import EpochLog
from acmds_optimizer.engine.evaluate import Best
from acmds_optimizer.engine.run import make_model
from acmds_optimizer.errors import ACMDSError, CheckpointError, ConfigError
from acmds_optimizer.zoo.datasets import build_data
from acmds_tune.child import DATASET_MODULES, TRAINER_MODULES

BITWISE: dict[str, Any] = {"knee_gain_fraction": 0.0, "seed": 3}
"""The micro-batch must not follow the clock where two runs are to be equal to the last bit."""


def config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "model": "small_cnn", "dataset": "digits", "device": "cpu", "enable_amp": False, "max_batch_size": 128,
        "target_headroom_gb": 0.1,
    }  # fmt: skip
    return TrainConfig(**(defaults | settings))


def stop_after(steps: int) -> Any:
    asked = itertools.count()
    return lambda: next(asked) > steps


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{path}/{key}").items()}
    return {path: value}


CLOCK = ("/seconds", "_seconds", "_timed_", "/config/", "headroom", "reserved", "/controller/")
"""What is of the clock, says which folder it was, or is a memory reading: that of a card shared with the process's
own garbage, so equal to within a kilobyte only. The micro-batches chosen by it are compared.
"""


def same(name: str, one: Any, other: Any) -> bool:
    if name.startswith("/recorder/") and isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)  # sums of a log, whose grouping depends on when it was written
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def assert_same_training(folder: Path, other: Path) -> None:
    """Weights, optimizer, averages, scores, order and random numbers are equal to the last bit."""
    ours, theirs = (leaves(checkpoint.load(each)) for each in (folder, other))
    different = [
        name
        for name in (ours | theirs)
        if not any(word in name for word in CLOCK) and not same(name, ours.get(name), theirs.get(name))
    ]
    assert different == []
    columns = ("step", "epoch", "samples_seen", "effective_batch", "micro_batch", "loss", "lr", "difficulty_mean")
    rows = []
    for each in (folder, other):
        with (each / "steps.csv").open(encoding="utf-8") as file:
            rows.append([[row[name] for name in columns] for row in csv.DictReader(file)])
    assert rows[0] == rows[1]


# --- which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    run_training(config(epochs=3, keep_checkpoints=2, max_batch_size=256), output_dir=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "checkpoint.pt", "checkpoint_00000014.pt", "checkpoint_00000021.pt"]  # 7 steps an epoch
    assert checkpoint.load(tmp_path)["trainer"]["step"] == 21
    best = checkpoint.load(tmp_path / "best.pt")["trainer"]
    assert best["best"]["epoch"] == best["epoch"]


@pytest.mark.parametrize(
    ("metric", "values", "best", "stopped_after"),
    [
        ("val_accuracy", [0.5, 0.7, 0.7, 0.6, 0.9], 2, 4),
        ("val_loss", [0.5, 0.7, 0.4, 0.6, 0.45, 0.3], 3, 5),
        ("val_loss", [3.0, 2.0, 1.0], 3, None),
        ("val_loss", [math.nan, 2.0, 1.0], 3, None),
        ("val_loss", [2.0, math.nan, math.nan], 1, 3),
    ],
)
def test_best_and_early_stopping_follow_the_metric(metric, values, best, stopped_after):
    tracker = Best(metric, patience=2)
    for epoch, value in enumerate(values, 1):
        tracker.update({metric: value}, epoch)
        if tracker.exhausted:
            break
    assert tracker.epoch == best
    assert tracker.exhausted == (stopped_after is not None)
    assert epoch == (stopped_after or len(values))


def test_a_run_stops_early_and_says_that_it_is_done(tmp_path):
    settings = config(epochs=50, patience_epochs=1, lr=1e-12, best_metric="val_accuracy")  # nothing is learned
    outcome = run_training(settings, output_dir=tmp_path)
    assert (outcome.epochs, outcome.best_epoch, outcome.stopped_early) == (2, 1, False)


# --- what a stop loses


def test_a_run_stopped_in_the_middle_of_epochs_equals_one_that_was_not(tmp_path):
    settings = config(
        **BITWISE, epochs=2, ema_decay=0.9, mixup_alpha=0.2, cutout_fraction=0.25, label_smoothing=0.1,
        direction="easy", lr_schedule="plateau", lr_decay_epochs=0.5,
    )  # fmt: skip
    whole = run_training(settings, output_dir=tmp_path / "whole")
    parts = tmp_path / "parts"
    resume = None
    for steps in (5, 13, 14):  # 13 steps an epoch: also right at its end, before it is validated
        run_training(settings, output_dir=parts, resume=resume, should_stop=stop_after(steps))
        resume = parts
    outcome = run_training(settings, output_dir=parts, resume=parts)
    assert (outcome.steps, outcome.samples) == (whole.steps, whole.samples), "the figures are of the whole run"
    assert_same_training(parts, tmp_path / "whole")


def test_an_average_of_the_weights_can_begin_and_end_with_a_resume(tmp_path):
    run_training(config(max_steps=3), output_dir=tmp_path)
    before = checkpoint.load(tmp_path)["model"]["head.weight"]
    run_training(config(max_steps=4, ema_decay=0.999), output_dir=tmp_path, resume=tmp_path)
    state = checkpoint.load(tmp_path)
    average = state["average"]["module.head.weight"]
    assert torch.equal(average, state["model"]["head.weight"]), "that of one step is what it left"
    assert not torch.equal(state["model"]["head.weight"], before)
    assert run_training(config(max_steps=5), output_dir=tmp_path, resume=tmp_path).steps == 5
    assert not checkpoint.load(tmp_path)["average"]


def test_checkpoints_by_steps_alone(tmp_path):
    settings = config(max_steps=12, checkpoint_every=0, checkpoint_every_steps=5, keep_checkpoints=9)
    run_training(settings, output_dir=tmp_path / "both")
    kept = {path.name for path in (tmp_path / "both").glob("*.pt")}
    assert kept >= {"checkpoint_00000005.pt", "checkpoint_00000010.pt", "checkpoint.pt", "best.pt"}
    settings.checkpoint_every_steps = None
    run_training(settings, output_dir=tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.pt"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2, "checkpoint_every_steps": 13, "checkpoint_every": 2},
        {"max_steps": 10, "checkpoint_every_steps": 5},
    ],
    ids=["at the end of an epoch", "in the middle of one"],
)
@pytest.mark.parametrize("owner", [ACMDSTrainer, EpochLog], ids=["before it is validated", "after it was"])
def test_a_run_killed_after_its_last_step_validates_once_when_it_goes_on(settings, owner, tmp_path, monkeypatch):
    asked = config(**BITWISE, **settings)
    whole = run_training(asked, output_dir=tmp_path / "whole")
    killed = tmp_path / "killed"
    name = "evaluate" if owner is ACMDSTrainer else "write"
    real, left = getattr(owner, name), iter(range(asked.epochs if asked.max_steps is None else 1))

    def fatal(*args: Any) -> Any:
        figures = real(*args)
        if next(left) == whole.epochs - (asked.max_steps is None):
            raise Killed
        return figures

    monkeypatch.setattr(owner, name, fatal)
    with pytest.raises(Killed):
        run_training(asked, output_dir=killed)
    monkeypatch.undo()
    outcome = run_training(asked, output_dir=killed, resume=killed)
    assert (outcome.val_loss, outcome.best_epoch, outcome.epochs) == (whole.val_loss, whole.best_epoch, whole.epochs)
    assert_same_training(killed, tmp_path / "whole")
    epochs = []
    for folder in (killed, tmp_path / "whole"):
        with (folder / "epochs.csv").open(encoding="utf-8") as file:
            epochs.append([(row["epoch"], row["step"], row["val_loss"]) for row in csv.DictReader(file)])
    assert epochs[0] == epochs[1]


def command(arguments: list[str], error: str) -> None:
    with Path(error).open("w", buffering=1, encoding="utf-8") as sys.stderr:
        sys.exit(cli.main(arguments))


class Command:
    """acmds-train in a process of its own: a fork of one that has imported what it needs, so that it starts at once."""

    def __init__(self, *arguments: str, error: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*TRAINER_MODULES, *DATASET_MODULES["digits"], "pytest"])
        self._error = error
        self._process = context.Process(target=command, args=(list(arguments), str(error)))
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        if self.running:
            os.kill(self._process.pid or 0, number)

    def end(self) -> tuple[int | None, str]:
        """Exit code, and what it wrote to stderr."""
        self._process.join(120)
        return self._process.exitcode, self._error.read_text(encoding="utf-8")


def kill_and_resume(run: Path, settings: dict[str, Any], moments: list[float], number: signal.Signals) -> int:
    """Train in processes that are killed so many seconds after the training began; how often that happened."""
    flags = [item for key, value in settings.items() for item in (f"--{key.replace('_', '-')}", str(value))]
    killed = 0
    for moment in [*moments, None]:
        start = ["--resume", str(run)] if (run / "checkpoint.pt").exists() else ["--output-dir", str(run), *flags]
        if not (run / "checkpoint.pt").exists() and run.exists():
            for path in run.iterdir():  # killed before the first checkpoint: as a user would, start again
                path.unlink()
        before = (run / "checkpoint.pt").stat().st_mtime_ns if (run / "checkpoint.pt").exists() else 0
        process = Command("--quiet", "--no-enable-amp", *start, error=run.with_suffix(".txt"))
        if moment is not None:
            while process.running and not (
                (run / "checkpoint.pt").exists() and (run / "checkpoint.pt").stat().st_mtime_ns > before
            ):
                time.sleep(0.01)
            time.sleep(moment)
            killed += process.running
            process.send(number)
        code, error = process.end()
        assert "Traceback" not in error, error
    assert code == 0
    return killed


KILLED: dict[str, Any] = {
    "model": "small_cnn", "dataset": "digits", "device": "cpu", "max_batch_size": 128, "target_headroom_gb": 0.1,
    "checkpoint_every_steps": 5, "ema_decay": 0.9, "cutmix_alpha": 1.0, **BITWISE,
}  # fmt: skip


KILLS = int(os.environ.get("ACMDS_KILLS", "1"))
SIGNALS = [signal.SIGKILL, signal.SIGTERM] if KILLS > 1 else [signal.SIGKILL]  # SIGTERM has a test of its own below


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_run_killed_at_random_moments_and_resumed_equals_one_that_was_not(number, tmp_path, own_fork_server):
    """By hand: ACMDS_KILLS=10 pytest tests/test_checkpoints.py -k killed_at."""
    settings = KILLED | {"epochs": 6 * KILLS}
    chance = random.Random(KILLS)
    happened = kill_and_resume(tmp_path / "killed", settings, [chance.uniform(0.0, 0.5) for _ in range(KILLS)], number)
    assert happened == KILLS
    run_training(config(**settings), output_dir=tmp_path / "whole")
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_can_be_resumed(number, tmp_path, own_fork_server):
    run = tmp_path / "run"
    flags = [item for name in ("model", "dataset", "device") for item in (f"--{name}", KILLED[name])]
    process = Command(*flags, "--output-dir", str(run), "--epochs", "500", error=tmp_path / "error.txt")
    deadline = time.monotonic() + 60
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send(number)
    code, error = process.end()
    assert code == 130
    assert f"acmds-train --resume {run}" in error
    before = len((run / "steps.csv").read_text().splitlines())
    assert cli.main(["--resume", str(run), "--max-steps", str(before + 10), "--quiet"]) == 0
    assert len((run / "steps.csv").read_text().splitlines()) == before + 10 + 1


@pytest.mark.parametrize("content", ["truncated", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name_and_nothing_is_written_over(content, tmp_path, capsys):
    run_training(config(max_steps=2), output_dir=tmp_path)
    path = tmp_path / "checkpoint.pt"
    if content == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(path.read_bytes()[:-2000])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for arguments in (["--resume", str(tmp_path)], ["--evaluate", str(path)]):
        assert cli.main([*arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error
        assert "Traceback" not in error
        assert "weights_only" not in error  # PyTorch's advice, to trust the file, is not ours
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Weights only load failed. Load it all the same \x1b[1mif you trust it\x1b[0m", "Weights only load failed"),
        ("Weights only load failed\x1b[1m: it can be loaded\x1b[0m", "Weights only load failed"),
        ("file a.b: failed finding central directory\nat frame #0", "file a.b: failed finding central directory"),
        (" \n", "RuntimeError"),
    ],
)  # fmt: skip  # a line a message
def test_of_what_pytorch_says_of_a_foreign_file_the_first_sentence_is_told(text, said, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    (path := tmp_path / "foreign.pt").write_bytes(b"x")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(path)
    assert str(refused.value) == f"{path}: not a whole checkpoint of this program ({said})"


def test_a_pickled_model_is_refused_in_one_line_without_advice(tmp_path):
    torch.save(nn.Linear(2, 2), path := tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(path)
    assert str(refused.value).isprintable()
    assert "trust" not in str(refused.value)


@pytest.mark.parametrize("name", ["step", "reserved_ratio", "pool_ratio", "highest_allocated", "law", "peaks", "times"])
def test_a_controllers_state_that_is_damaged_is_refused_and_changes_nothing(name):
    controller = MemoryPressureController("cpu", CurriculumConfig(memory_limit_gb=1.0, target_headroom_gb=0.1))
    controller.observe(controller.decide().batch, excess_bytes=2**20)
    state = controller.state_dict()
    before, damaged = (controller.step, controller.state), state | {name: "text"}
    with pytest.raises((TypeError, ValueError, AttributeError)):
        controller.load_state_dict(damaged)
    if name == "law":
        with pytest.raises(ValueError, match="could not convert"):
            controller.load_state_dict(state | {"law": state["law"] | {"target": "text"}})
    assert (controller.step, controller.state) == before
    controller.load_state_dict(state)
    assert controller.state_dict() == state


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.x1y2").write_bytes(b"half")
    checkpoint.CheckpointFolder(tmp_path).save({"trainer": {}}, 3, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "checkpoint.pt"]


def test_of_older_checkpoints_those_written_last_are_kept_also_after_a_step_back(tmp_path):
    for second, step in enumerate((200, 300, 400, 250)):  # the last after the run went on from its best
        checkpoint.CheckpointFolder(tmp_path, keep=2).save({"trainer": {}}, step, best=False)
        os.utime(tmp_path / f"checkpoint_{step:08}.pt", (second, second))
    names = [path.name for path in sorted(tmp_path.glob("checkpoint_*.pt"))]
    assert names == ["checkpoint_00000250.pt", "checkpoint_00000400.pt"]


# --- what can be made of one


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_training(config(epochs=2, ema_decay=0.9), output_dir=folder)
    return folder


def test_evaluate_prints_the_figures_of_the_run(run, capsys):
    assert cli.main(["--evaluate", str(run), "--quiet"]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    outcome = json.loads((run / "outcome.json").read_text())
    assert float(printed["val_accuracy"]) == pytest.approx(outcome["val_accuracy"])
    assert float(printed["val_loss"]) == pytest.approx(outcome["val_loss"], rel=1e-5)
    assert float(printed["val_top5"]) == pytest.approx(outcome["val_top5"])
    assert outcome["val_top5"] >= outcome["val_accuracy"] > 0.2


def test_evaluate_needs_no_scores(run, tmp_path, capsys):
    state = checkpoint.load(run)
    state["config"]["scoring"] = str(tmp_path / "scores_of_the_training_samples.npy")
    checkpoint.save(tmp_path / "scored.pt", state)
    printed = []
    for path in (run, tmp_path / "scored.pt"):
        assert cli.main(["--evaluate", str(path), "--quiet"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_evaluate_refuses_another_model(run, capsys):
    assert cli.main(["--evaluate", str(run), "--model", "resnet18", "--quiet"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "does not fit resnet18" in said
    assert len(said) < 400, "not a line for each of its tensors"


@pytest.mark.parametrize("beside", [["--dry-run"], ["--resume", "run"]])
def test_evaluate_is_not_mistaken_for_something_else(beside, run, capsys):
    assert cli.main(["--evaluate", str(run), *beside]) == 2
    assert "--evaluate does not train" in capsys.readouterr().err


def test_exported_weights_are_those_that_were_validated(run, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file

    target = tmp_path / "weights.safetensors"
    assert cli.main(["export", str(run), str(target)]) == 0
    settings = config()
    model = make_model(settings, build_data(settings))
    model.load_state_dict(load_file(target))
    averaged = checkpoint.final_weights(checkpoint.load(run))
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == [str(digit) for digit in range(10)]
    capsys.readouterr()
    before = target.read_bytes()
    assert cli.main(["export", str(run), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_bytes() == before


def test_a_checkpoint_is_neither_validated_nor_trained_on_with_other_classes(tmp_path, capsys):
    for name in ("cat", "dog", "zebra"):
        for part in ("train", "val"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / part / name / "0.png")
    images = str(tmp_path / "images")
    run_training(config(dataset=images, epochs=1), output_dir=tmp_path / "run")
    for part in ("train", "val"):
        (tmp_path / "images" / part / "zebra").rename(tmp_path / "images" / part / "ape")
    for arguments in (["--evaluate", str(tmp_path / "run" / "best.pt")], ["--resume", str(tmp_path / "run")]):
        assert cli.main([*arguments, "--epochs", "2", "--quiet"]) == 2
        assert f"{images}: class 0 is 'ape', but 'cat' in the checkpoint" in capsys.readouterr().err


def test_an_export_without_the_package_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'acmds\[export\]'"):
        checkpoint.export_weights(run, tmp_path / "w.safetensors")


def test_an_export_that_safetensors_cannot_write_says_so(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("I/O error: Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(ACMDSError, match=r"w\.safetensors: cannot be written: I/O error: Permission denied"):
        checkpoint.export_weights(run, tmp_path / "w.safetensors")


def test_an_export_that_cannot_be_written_says_so(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ACMDSError, match="cannot be written"):
        checkpoint.export_weights(run, tmp_path / "file" / "w.safetensors")


def test_a_run_that_ends_in_the_middle_of_an_epoch_names_it(tmp_path):
    outcome = run_training(config(max_steps=3), output_dir=tmp_path)
    assert outcome.best_epoch == 1
    with (tmp_path / "epochs.csv").open(encoding="utf-8") as file:
        assert [(row["epoch"], row["step"]) for row in csv.DictReader(file)] == [("1", "2")]


@pytest.mark.parametrize("tail", [b"\0" * 99, b"\xff\xfe\x80", b"1,2\n", b"x" * 9 + b",0" * 99 + b"\n"])
def test_a_run_whose_tables_end_in_anything_goes_on(tail, tmp_path):
    run_training(config(max_steps=2), output_dir=tmp_path)
    for name in ("steps.csv", "epochs.csv", "events.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(tail)
    run_training(config(max_steps=3), output_dir=tmp_path, resume=tmp_path)
    with (tmp_path / "steps.csv").open(encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
