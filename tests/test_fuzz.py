"""Damaged configuration files, checkpoints and folders of images: each a message and exit code 1 or 2, no traceback.

More of them: ACMDS_FUZZ=2000 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from acmds_optimizer import TrainConfig, cli, run_training
from acmds_optimizer.config import field_names

CASES = int(os.environ.get("ACMDS_FUZZ", "200"))
"""How many in all; a third of each kind."""

SEEDS = range((CASES + 2) // 3)
RUN = ["--model", "small_cnn", "--device", "cpu", "--max-steps", "2", "--num-workers", "0", "--quiet"]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def assert_refused(arguments: list[str], watched: Path, capsys: Any) -> str:
    """The command ends with 1 or 2 and a message, and leaves what is there as it is."""
    before = contents(watched)
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    error = capsys.readouterr().err
    assert code in (1, 2), (code, error)
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1] if error.strip() else ""
    assert "acmds-train: " in error, error
    assert last, "a message"
    assert contents(watched) == before
    return error


# --- configuration files


def wrong_value(rng: random.Random) -> Any:
    return rng.choice(
        [-1, -1e308, 1e309, float("nan"), "", " ", "none", "yes", "1,5", "0x10", [], [1], {}, {"low": 1, "high": 2},
         None, True, "\u0000", "\U0001f600" * 50, 10**400, "../..", ["a", {"b": None}], "1e999", -0.0]
    )  # fmt: skip


def config_text(rng: random.Random) -> tuple[str, bytes]:
    """A file's suffix and content, with at least one fault."""
    names = field_names()
    settings: dict[Any, Any] = {"dataset": "nowhere/at/all", "device": "cpu"}  # so that none of them can train
    for _ in range(rng.randint(1, 6)):
        settings[rng.choice(names)] = wrong_value(rng)
    settings |= {"dataset": "nowhere/at/all"}
    kind = rng.choice(["values", "values", "unknown", "cut", "bytes", "top", "tag", "deep", "keys", "empty"])
    if kind == "unknown":
        settings[rng.choice(names)[:-1] + rng.choice("xyz")] = 1
    if kind == "keys":
        settings |= {rng.choice([1, None, 2.5, True]): 3}
    text = json.dumps(settings, default=str) if rng.random() < 0.5 or kind == "cut" else yaml.safe_dump(settings)
    suffix = rng.choice([".json", ".yaml", ".yml", ".txt", ""])
    if kind == "cut":
        text = text[: rng.randrange(1, len(text))]
    if kind == "top":
        text = rng.choice(["[1, 2]", "3", "null", '"text"', "- a\n- b", "---\na: 1\n---\nb: 2\n"])
    if kind == "tag":
        text = rng.choice(
            ["!!python/object/apply:os.getcwd []", "a: !!binary x", "a: &x [*x]", "a: *nothing", "%YAML 9\n"]
        )
    if kind == "deep":
        text = rng.choice(["[" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "- " * 2000])
    if kind == "empty":
        text = rng.choice(["", " \n", "#\n", "{}"])
    if kind == "bytes":
        return suffix, bytes(rng.randrange(256) for _ in range(rng.randint(1, 200)))
    return suffix, text.encode("utf-8", errors="replace")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_configuration_is_refused_in_words(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suffix, content = config_text(random.Random(seed))
    path = tmp_path / f"settings{suffix}"
    path.write_bytes(content)
    extra = ["--dataset", "nowhere/at/all", "--device", "cpu"] if seed % 2 else []
    arguments = ["--config", str(path), *extra]
    if not extra and b"nowhere" not in content:  # an empty file is a good one, which asks for a GPU
        arguments += ["--dataset", "nowhere/at/all", "--device", "cpu"]
    assert_refused(arguments, tmp_path, capsys)


# --- checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    settings = TrainConfig(
        model="small_cnn", dataset="digits", device="cpu", enable_amp=False, max_steps=2, target_headroom_gb=0.1,
        ema_decay=0.9,
    )  # fmt: skip
    run_training(settings, output_dir=folder)
    return folder


def damage_state(state: dict[str, Any], rng: random.Random) -> None:
    """Take away, or put something else in the place of, one thing that a run cannot do without."""
    vital = sorted(state.keys() - {"format", "version", "config", "data", "scaler", "stage"})
    name = rng.choice(vital)
    how = rng.choice(["gone", "other", "inner", "inner"])
    if how == "gone":
        del state[name]
    elif how == "other":
        state[name] = rng.choice([None, 3, "text", [1, 2], torch.zeros(3), {}])
    else:
        inner = state[name]
        key = rng.choice([key for key in inner if key != "cuda" and not (name == "optimizer" and key != "state")])
        if name == "model" and isinstance(inner[key], torch.Tensor):
            inner[key] = torch.zeros(7, 7)
        elif name in ("optimizer", "controller"):
            inner[key] = "text"
        else:
            del inner[key]


def damage(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    kind = rng.choice(["cut", "noise", "zip", "pickle", "state", "state", "state", "torch", "text", "holes"])
    if kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "noise":
        path.write_bytes(bytes(rng.randrange(256) for _ in range(rng.randint(0, 3000))))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(rng.choice([{"format": "acmds-checkpoint"}, [1], Path("x"), print])))
    elif kind == "torch":
        torch.save(rng.choice([torch.zeros(3), {"format": "acmds-checkpoint"}, {"state_dict": {}}, [1, 2], None]), path)
    elif kind == "text":
        path.write_text(rng.choice(["", "checkpoint", "{}", "PK\x03\x04"]))
    elif kind == "holes":
        holed = bytearray(data)
        for _ in range(20):
            at = rng.randrange(len(data) - 4096)
            holed[at : at + 4096] = bytes(4096)
        path.write_bytes(bytes(holed))
    else:
        state = torch.load(io.BytesIO(data), weights_only=True)
        damage_state(state, rng)
        torch.save(state, path)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_checkpoint_is_refused_in_words(seed, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / "checkpoint.pt", random.Random(seed))
    assert_refused(["--resume", str(folder), "--max-steps", "4", "--quiet"], tmp_path, capsys)


# --- folders of images


def photo(path: Path, rng: random.Random, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def good(folder: Path, rng: random.Random) -> list[Path]:
    paths = [folder / name / f"{number}.png" for name in ("cat", "dog") for number in range(6)]
    for path in paths:
        photo(path, rng)
    return paths


def cut_off(folder: Path, rng: random.Random) -> None:
    paths = good(folder, rng)
    for path in paths[:: rng.randint(1, 3)]:
        path.write_bytes(path.read_bytes()[: rng.randint(0, 400)])


def no_images(folder: Path, rng: random.Random) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / rng.choice(["a.txt", "b.mp4", ".hidden.png", "c"])).write_text("x")


def text_as_images(folder: Path, rng: random.Random) -> None:
    for path in good(folder, rng):
        path.with_suffix(".jpg").write_text("no image")


def one_class(folder: Path, rng: random.Random) -> None:
    photo(folder / "cat" / "1.png", rng)


def loose(folder: Path, rng: random.Random) -> None:
    for number in range(3):
        photo(folder / f"{number}.png", rng)


def a_class_of_its_own_in_val(folder: Path, rng: random.Random) -> None:
    good(folder / "train", rng)
    good(folder / "val", rng)
    photo(folder / "val" / "zebra" / "1.png", rng)


def an_empty_val(folder: Path, rng: random.Random) -> None:
    good(folder / "train", rng)
    (folder / rng.choice(["val", "test", "valid"])).mkdir()


def an_empty_train(folder: Path, rng: random.Random) -> None:
    (folder / "train").mkdir(parents=True)
    good(folder / "val", rng)


def a_file(folder: Path, rng: random.Random) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("not a folder")


def dangling_links(folder: Path, rng: random.Random) -> None:
    for path in good(folder, rng)[::2]:
        path.unlink()
        path.symlink_to(folder / "nowhere.png")


def folders_as_images(folder: Path, rng: random.Random) -> None:
    for name in ("cat", "dog"):
        (folder / name / "1.png").mkdir(parents=True)


def a_bomb(folder: Path, rng: random.Random) -> None:
    path = good(folder, rng)[0]
    header = bytearray(path.read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of a PNG
    path.write_bytes(bytes(header))


FOLDERS: list[Callable[[Path, random.Random], None]] = [
    cut_off, no_images, text_as_images, one_class, loose, a_class_of_its_own_in_val, an_empty_val, an_empty_train,
    a_file, dangling_links, folders_as_images, a_bomb,
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_folder_of_images_is_refused_in_words(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    folder = tmp_path / rng.choice(["photos", "pho tos", "fotos-ü", "a" * 100])
    FOLDERS[seed % len(FOLDERS)](folder, rng)
    error = assert_refused(["--dataset", str(folder), *RUN, "--output-dir", str(tmp_path / "out")], folder, capsys)
    assert folder.name in error
