"""The throughput benchmark, small and on the CPU, and the probe's memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acmds_optimizer import CurriculumConfig
from acmds_optimizer.engine import probe
from acmds_optimizer.zoo.models import build_model

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_script_writes_a_row_for_each_system(tmp_path):
    out = tmp_path / "t.csv"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.throughput", "--device", "cpu", "--out", str(out), "--batches", "16",
            "--seconds", "0.05", "--rounds", "2",
        ],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["system"]: row for row in csv.DictReader(out.open(encoding="utf-8"))}
    assert {name: row["status"] for name, row in rows.items()} == {"eager": "ok", "ours": "ok"}
    assert float(rows["eager"]["ratio"]) == 1.0
    assert float(rows["ours"]["ratio"]) > 0.0
    assert rows["ours"]["batch_last"] == "16"
    assert "torch" in json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def test_on_the_cpu_nothing_is_probed():
    config = CurriculumConfig(enable_amp=False)
    assert probe.choose(build_model("small_cnn", 10), config, torch.device("cpu"), (3, 14, 14)) == (None, False)


def test_a_probe_is_remembered_and_a_damaged_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probe._remember("model a", {"bf16 NHWC": 0.5})
    probe._remember("model b", {"fp16 NHWC": 0.25})
    assert probe._remembered("model a") == {"bf16 NHWC": 0.5}
    (tmp_path / "acmds" / "probes.json").write_text("{", encoding="utf-8")
    assert probe._remembered("model a") == {}
    probe._remember("model c", {"bf16 NHWC": 1.0})
    assert probe._remembered("model c") == {"bf16 NHWC": 1.0}


@pytest.mark.gpu
def test_the_probe_leaves_the_model_and_the_random_state_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda", 0)
    model = build_model("resnet18", 10, image_size=32).to(device)
    before = [value.clone() for value in model.state_dict().values()]
    state = torch.cuda.get_rng_state(device)
    chosen = probe.choose(model, CurriculumConfig(), device, (3, 32, 32))
    assert chosen[0] in (torch.bfloat16, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    (remembered,) = json.loads((tmp_path / "acmds" / "probes.json").read_text(encoding="utf-8")).values()
    assert set(remembered) == {"bf16 NHWC", "fp16 NHWC", "bf16 NCHW"}
    monkeypatch.setattr(probe, "_measure", None)  # a second time it need not measure
    assert probe.choose(model, CurriculumConfig(), device, (3, 32, 32)) == chosen
