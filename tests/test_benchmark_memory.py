"""The memory benchmark: its scenarios, its neighbour, and a small table on the card on the CPU."""

from __future__ import annotations

import csv
import importlib.util
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # benchmarks/ is run from the repository, never installed

from acmds_tune.neighbour import PIECE_BYTES, Holder  # noqa: E402
from benchmarks import memory, memory_child, memory_systems, neighbour  # noqa: E402
from benchmarks.memory_plant import Meter, Neighbour, Plant  # noqa: E402
from benchmarks.memory_scenarios import Probe, Scenario, Setting, best_batch, grid, largest_batch  # noqa: E402
from benchmarks.memory_systems import Known  # noqa: E402

SETTING = Setting("cpu", "small_cnn", 224, 23.2, 3.0, "off", 512, 10.0, None, 20_000)
SYSTEMS = ["oracle", "fixed_cap", "accelerate", "lightning_binsearch", "halving", "ours"]
PACKAGES = {"accelerate": "accelerate", "lightning_binsearch": "lightning"}


# --- scenarios


def test_resolution_grows_in_four_equal_phases():
    growing = Scenario("growing", SETTING)
    assert [growing.side(progress, 0) for progress in (0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 1.0)] == [
        128, 128, 160, 192, 192, 224, 224,
    ]  # fmt: skip


def test_heavy_tailed_sides_are_mostly_small_and_the_same_for_every_system():
    heavy = Scenario("heavy", SETTING)
    drawn = [heavy.side(0.5, step) for step in range(2000)]
    assert drawn == [heavy.side(0.9, step) for step in range(2000)]
    counts = Counter(drawn)
    assert sorted(counts) == [128, 160, 192, 224]
    # Pareto of shape 5 from 128 px, rounded at 144, 176 and 208 px: P(X > x) = (128 / x) ** 5
    for side, share in {128: 0.445, 160: 0.352, 192: 0.115, 224: 0.088}.items():
        assert counts[side] / 2000 == pytest.approx(share, abs=0.03)


def test_the_neighbour_wants_its_share_in_the_middle_third_only():
    scenario = Scenario("neighbour", SETTING)
    assert [scenario.has_neighbour(progress) for progress in (0.0, 0.3, 0.34, 0.66, 0.67, 1.0)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip
    assert SETTING.neighbour_bytes == 8 * 2**30


def test_the_oracle_takes_the_fastest_batch_within_the_budget_and_not_the_largest():
    probes = [Probe(224, 64, 4, 900.0), Probe(224, 128, 8, 1000.0), Probe(224, 256, 16, 990.0), Probe(128, 512, 8, 5e3)]
    assert best_batch(probes, 224, 20) == 128
    assert best_batch(probes, 224, 7) == 64
    assert best_batch(probes, 224, 3) == 0
    assert largest_batch(probes, 224) == 256


def test_offline_sizes_are_four_an_octave():
    assert grid(1024) == [128, 152, 184, 216, 256, 304, 360, 432, 512, 608, 728, 864, 1024]


# --- the neighbour


class SmallCard(Holder):
    """A holder on a card with a number of free bytes."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__("cpu")
        self.card_bytes = free_bytes

    def _allocate(self, size: int) -> torch.Tensor | None:
        return None if size > self.card_bytes - self.held_bytes else torch.empty(size, dtype=torch.uint8, device="meta")


def test_the_neighbour_takes_what_is_free_and_the_rest_once_it_is():
    piece = PIECE_BYTES
    holder = SmallCard(3 * piece)
    holder.take(5 * piece)
    assert holder.poll()
    assert holder.held_bytes == 3 * piece
    assert not holder.poll()
    holder.card_bytes = 10 * piece
    assert holder.poll()
    assert holder.held_bytes == 5 * piece
    holder.free()
    assert not holder.poll()
    assert holder.held_bytes == 0


def test_the_script_of_a_neighbour_is_played_in_order():
    changes = []
    orders = neighbour.parse(["take", "0.5", "wait", "0.03", "free"])
    neighbour.play(orders, SmallCard(2**30), lambda _, held: changes.append(held))
    assert changes == [0, 2**29, 0]


@pytest.mark.parametrize("words", [["grab", "1"], ["take"], ["take", "x"], ["wait", "-1"]])
def test_a_wrong_script_is_refused(words):
    with pytest.raises(ValueError):
        neighbour.parse(words)


# --- children that end badly


@pytest.mark.parametrize(
    ("target", "argument", "status"), [(os._exit, 3, "crashed"), (time.sleep, 60, "timeout")], ids=["crash", "hang"]
)
def test_a_child_that_crashes_or_hangs_is_a_row_with_its_reason(target, argument, status):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(argument,))
    process.start()
    theirs.close()
    row, steps = memory._answer(process, ours, 5.0 if status == "crashed" else 0.2)
    process.kill()
    process.join()
    assert (row["status"], steps) == (status, [])
    assert ("exit code 3" if status == "crashed" else "no end after 0 s") in row["reason"]


# --- Lightning's search


def test_lightnings_search_takes_images_within_its_steps_alone_and_leaves_nothing_behind(monkeypatch):
    pl = pytest.importorskip("lightning.pytorch")
    setting = replace(SETTING, image_size=14, cap_gb=0.0107, max_batch=32, classes=10)
    plant = Plant(setting)
    before = plant.memory.read().allocated_bytes
    # AdamW's moments and its steps, and the last step's gradients, which Lightning frees after the forward pass
    state = 3 * sum(parameter.nbytes for parameter in plant.model.parameters()) + 1024
    held = []
    take = plant.take

    def watched_take(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        held.append(plant.memory.read().allocated_bytes)
        return take(count, side)

    monkeypatch.setattr(plant, "take", watched_take)
    meter = Meter(plant, Scenario("static", setting), Neighbour(plant))
    size = memory_systems._search_with_lightning(pl, plant, meter, "binsearch")
    after = plant.memory.read()
    assert size > 8
    assert after.out_of_memory_errors >= 1
    assert max(held) <= before + state  # no batch taken ahead, and none while a failed step is still held
    assert after.allocated_bytes == before


# --- a table


def bench(folder: Path, *arguments: str) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of a small table by (scenario, system)."""
    out = folder / "table.csv"
    given = [
        "--device", "cpu", "--out", str(out), "--max-batch", "32", "--cap-gb", "0.0107", "--headroom-gb", "0.0015",
        "--first-images", "150", *arguments,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # is put back
        assert memory.main(given) == 0
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(memory.COLUMNS)
        return {(row["scenario"], row["system"]): row for row in reader}


@pytest.fixture(scope="module")
def table(tmp_path_factory, own_fork_server):
    folder = tmp_path_factory.mktemp("bench")
    rows = bench(
        folder, "--scenarios", "neighbour", "--systems", ",".join(SYSTEMS), "--images", "500",
        *(["--plot", str(folder / "plot.png")] if importlib.util.find_spec("matplotlib") else []),
    )  # fmt: skip
    return folder, rows


def test_every_system_has_a_row(table):
    _, rows = table
    assert list(rows) == [("neighbour", system) for system in SYSTEMS]
    for (_, system), row in rows.items():
        package = PACKAGES.get(system)
        if package and importlib.util.find_spec(package) is None:
            assert (row["status"], f"{package} is not installed" in row["reason"]) == ("skipped", True)
        else:
            assert row["status"] in ("ok", "out_of_memory"), row
            assert int(row["oom_escaped"]) == (row["status"] == "out_of_memory")


def test_ours_makes_room_for_the_neighbour_with_nothing_escaped(table):
    _, rows = table
    row = rows["neighbour", "ours"]
    assert (row["status"], row["oom_escaped"], float(row["done_fraction"])) == ("ok", "0", 1.0)
    assert int(row["images"]) >= 500
    assert float(row["images_per_second"]) > 0
    assert float(row["first_images_per_second"]) > 0
    assert float(row["neighbour_got_fraction"]) == 1.0
    assert int(row["size_changes"]) >= 1  # it made room


def test_a_fixed_batch_ends_with_the_error_that_it_cannot_catch(table):
    _, rows = table
    row = rows["neighbour", "fixed_cap"]
    assert (row["status"], row["oom_escaped"]) == ("out_of_memory", "1")
    assert "out of memory" in row["reason"].lower()
    assert float(row["done_fraction"]) < 0.5
    assert float(row["headroom_kept_fraction"]) < 1.0


def test_halving_recovers_and_shrinks(table):
    _, rows = table
    row = rows["neighbour", "halving"]
    assert (row["status"], row["oom_escaped"]) == ("ok", "0")
    assert int(row["oom_recovered"]) >= 2  # down from above at the start, and once more for the neighbour
    assert int(row["size_changes"]) >= 1


def test_the_facts_and_the_picture_are_beside_the_table(table):
    folder, _ = table
    text = (folder / "table.json").read_text()
    assert '"reserved_bytes"' in text
    assert '"torch"' in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "plot_steps.csv").read_text().startswith("system,seconds,")


def test_ours_follows_growing_images_through_the_controller_alone(tmp_path, own_fork_server):
    row = bench(tmp_path, "--scenarios", "growing", "--systems", "ours", "--images", "600")["growing", "ours"]
    assert (row["status"], row["oom_escaped"], float(row["done_fraction"])) == ("ok", "0", 1.0)
    assert int(row["distinct_sizes"]) >= 2


def test_a_system_that_cannot_start_is_a_row_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # meant for a process of its own
    sent: list[Any] = []
    setting = replace(SETTING, model="no_such_model")
    memory_child.run(cast(Any, SimpleNamespace(send=sent.append)), setting, "cold", "halving", Known(), None, None)
    row, steps = sent[0]
    assert (row["status"], steps) == ("error", [])
    assert "no model named" in row["reason"]
