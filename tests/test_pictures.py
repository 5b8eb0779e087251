"""The table of epochs, and the pictures drawn from a run's tables."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from acmds_optimizer import TrainConfig, cli, run_training
from acmds_optimizer.engine.epochs import EPOCH_COLUMNS, EpochLog
from acmds_optimizer.pictures import draw_run, thin

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a <run>")
    settings = TrainConfig(
        model="small_cnn", dataset="digits", device="cpu", enable_amp=False, epochs=2, target_headroom_gb=0.1
    )
    run_training(settings, output_dir=folder)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "epochs.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_epoch_is_a_row_with_its_figures(run):
    table = rows(run)
    assert list(table[0]) == list(EPOCH_COLUMNS)
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert [row["samples"] for row in table] == ["1618", "3236"]
    assert float(table[1]["epoch_loss"]) < float(table[0]["epoch_loss"])
    assert table[0]["is_best"] == "1"


def test_quantiles_of_difficulty_are_those_of_the_sorted_scores(tmp_path):
    log = EpochLog(tmp_path)
    log.write(1, 10, 2.5, {"epoch_loss": 1.0}, torch.arange(20).flip(0) / 20)
    log.close()
    (row,) = rows(tmp_path)
    assert [row[name] for name in ("difficulty_p10", "difficulty_p50", "difficulty_p90")] == ["0.1", "0.5", "0.9"]
    assert (row["step"], row["seconds"], row["val_loss"], row["is_best"]) == ("9", "2.5", "", "0")


def test_every_column_of_epochs_is_described(run):
    text = (REPOSITORY / "docs" / "reports.md").read_text(encoding="utf-8")
    section = text[text.index("## epochs.csv") :]
    assert re.findall(r"^\| `(\w+)` \|", section.split("\n## ")[0], flags=re.M) == list(EPOCH_COLUMNS)


def test_a_run_is_drawn_as_a_picture_and_as_a_page_that_needs_nothing_else(run, capsys):
    assert cli.main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(run / "run.png"), str(run / "run.html")]
    assert (run / "run.png").read_bytes()[:4] == b"\x89PNG"
    page = (run / "run.html").read_text(encoding="utf-8")
    for text in ("Memory (GB)", "Difficulty of the samples", "Validation accuracy", "samples_per_second", "small_cnn"):
        assert text in page
    assert "a &lt;run&gt;" in page
    links = re.findall(r'(?:src|href)="([^#][^"]*)"', page)
    assert links == [], "what it needs is in it"


def test_no_out_of_memory_error_is_left_out_of_a_long_run():
    steps = pd.DataFrame({"step": range(5000), "oom_events": 0})
    steps.loc[[3, 4001], "oom_events"] = 1
    thinned = thin(steps)
    assert thinned["step"].tolist() == sorted({*range(0, 5000, 5), 3, 4001})


def test_a_run_that_is_cut_off_can_be_drawn(run, tmp_path):
    lines = (run / "steps.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "steps.csv").write_text("\n".join(lines[:5]) + "\n", encoding="utf-8")
    png, page = draw_run(tmp_path)
    assert png.stat().st_size > 10_000
    assert page.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no steps.csv"),
        ("step\n", "with steps in it"),
        ("", "cannot be"),
        ("step,loss\n0,1\n", "column 'oom_events'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "steps.csv").write_text(content)
    assert cli.main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_without_matplotlib_the_run_ends_well_and_plot_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", str(run)]) == 2
    assert "pip install 'acmds[plot]'" in capsys.readouterr().err
    cli._draw_if_possible(run)
