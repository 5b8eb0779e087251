"""The script that runs all GPU measurements, with parts that need no GPU."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # benchmarks/ is run from the repository, never installed

from benchmarks import gpu_session  # noqa: E402
from benchmarks.gpu_session import Part  # noqa: E402

WHERE = """
import os, time
gpus = os.environ["CUDA_VISIBLE_DEVICES"]
print(gpus)
started = lambda: os.path.getsize(os.environ["STARTED"])
if "," not in gpus:
    with open(os.environ["STARTED"], "a") as file:
        file.write(".")
        file.flush()
        number = file.tell()
    while started() < number + number % 2:  # until the other one of the pair has been started beside this one
        time.sleep(0.01)
"""
"""Hangs unless parts of one GPU are run two at a time."""


def rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "session.csv").open(encoding="utf-8") as file:
        return [(row["part"], row["status"]) for row in csv.DictReader(file)]


def test_a_part_that_fails_or_hangs_is_noted_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "_SHORTEST_S", 0.5)
    parts = [
        Part("bad", 60, "no_such_module"),
        Part("hangs", 1, "http.server 0 --bind 127.0.0.1"),
        Part("fine", 60, "this", table="zen.csv"),
        Part("goes_on", 60, "this", goes_on=True),
        Part("two", 60, "this", gpus=99),
    ]
    assert gpu_session.run_all(parts, tmp_path, None, 100.0) == 1
    assert rows(tmp_path) == [
        ("two", f"needs 99 GPUs, and here are {len(gpu_session._gpus())}"),
        ("bad", "exit code 1"), ("hangs", "ended after 1 s"), ("fine", "ok"), ("goes_on", "ok"),
    ]  # fmt: skip
    assert "No module named no_such_module" in (tmp_path / "bad.log").read_text()
    assert "Beautiful is better" in (tmp_path / "zen.csv").read_text()
    assert gpu_session.run_all(parts[2:4], tmp_path, None, 100.0) == 0
    assert rows(tmp_path)[5:] == [("fine", "was there already"), ("goes_on", "ok")]
    assert gpu_session.run_all([Part("late", 60, "this")], tmp_path, None, 0.1) == 1
    assert rows(tmp_path)[7:] == [("late", "no time left")]


def test_with_two_gpus_parts_run_side_by_side_each_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    (tmp_path / "where.py").write_text(WHERE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    parts = [Part(name, 60, "where") for name in ("one", "two", "three", "four")]
    out = tmp_path / "out"
    assert gpu_session.run_all([*parts, Part("both", 60, "where", gpus=2)], out, None, 100.0) == 0
    assert rows(out)[0] == ("both", "ok")
    assert (out / "both.log").read_text() == "4,7\n"
    assert sorted((out / f"{part.name}.log").read_text() for part in parts) == ["4\n", "4\n", "7\n", "7\n"]


def test_all_commands_are_printed_with_their_deadlines_and_nothing_is_written(tmp_path, capsys):
    assert gpu_session.main([str(tmp_path / "out"), "100", "--data", str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_session.PARTS)
    assert not [line for line in lines if "{" in line]
    assert f"benchmarks.memory --out {tmp_path}/out/memory.csv" in lines[1]
    assert lines[1].endswith("--deadline 565")  # 15 s before it is ended
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--parts", "memroy"], "memroy is none of"), (["--parts", "jpeg,cifar"], "--data is needed for cifar"),
     (["--data", "/no/such"], "/no/such does not exist")],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_runs(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_session.main([str(tmp_path / "out"), "100", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
