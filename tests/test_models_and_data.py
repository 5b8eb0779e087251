"""Pretrained weights, frozen parts, timm, the Hub, and what is said of imbalance and corruption."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from acmds_optimizer import TrainConfig, cli, run_training
from acmds_optimizer.engine.prepare import checkpoint_activations
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.datasets import build_data
from acmds_optimizer.zoo.items import TensorImages
from acmds_optimizer.zoo.models import SmallCNN, build_model, freeze


def photos(folder: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


# --- models


@pytest.fixture
def weights(monkeypatch) -> list[str]:
    """torchvision without a network: its pretrained weights are all 0.5."""
    asked: list[str] = []
    real = torchvision.models.get_model

    def get_model(name: str, weights: str | None = None, **options: Any) -> nn.Module:
        model = real(name, weights=None, **options)
        if weights:
            asked.append(name)
            for parameter in model.parameters():
                nn.init.constant_(parameter, 0.5)
        return model

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return asked


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_pretrained_weights_are_kept_but_for_a_new_last_layer(name, weights):
    model = build_model(name, 7, image_size=64, pretrained=True)
    assert weights == [name]
    kept = [bool((p == 0.5).all()) for p in model.parameters()]
    assert kept == [True] * (len(kept) - 2) + [False, False]
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_pretrained_weights_that_cannot_be_had_are_refused_in_words(monkeypatch):
    def offline(name: str, **options: Any) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(DataError, match="pretrained weights could not be loaded: Name or service not known"):
        build_model("resnet18", 10, pretrained=True)
    with pytest.raises(DataError, match="take 3 channels, but the images have 1"):
        build_model("resnet18", 10, in_channels=1, pretrained=True)
    with pytest.raises(DataError, match="no pretrained weights here"):
        build_model("small_cnn", 10, pretrained=True)


@pytest.mark.parametrize(
    ("what", "trained"),
    [(None, 17), ("backbone", 2), ("features", 2), ("features.0,features.1.", 14), ("head", 15)],
)
def test_what_is_frozen_is_not_trained(what, trained):
    model = SmallCNN(10, 1)
    freeze(model, what)
    assert sum(p.requires_grad for p in model.parameters()) == trained


def test_a_frozen_part_stands_still_while_the_rest_is_trained(tmp_path):
    settings = TrainConfig(
        model="small_cnn", dataset="digits", device="cpu", enable_amp=False, freeze="backbone", max_steps=3,
        target_headroom_gb=0.1,
    )  # fmt: skip
    run_training(settings, output_dir=tmp_path)
    torch.manual_seed(settings.seed)
    before = build_model("small_cnn", 10, in_channels=1, image_size=8).state_dict()
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "running" not in name and "tracked" not in name} == {"head.weight", "head.bias"}


def test_an_unknown_part_is_refused_with_the_parts_there_are():
    with pytest.raises(DataError, match="begins with 'layer9'; the model has features, head"):
        freeze(SmallCNN(10), "layer9")


def test_a_timm_model_is_built_where_timm_is_installed(monkeypatch):
    made: list[dict[str, Any]] = []

    class Theirs(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(4, num_classes)
            self.checkpointing = False

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.checkpointing = enable

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks(inputs))

    def create_model(name: str, num_classes: int, **options: Any) -> nn.Module:
        made.append({"name": name, **options})
        if "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        return Theirs(num_classes)

    timm: Any = types.ModuleType("timm")
    timm.create_model, timm.is_model = create_model, lambda name: name == "convnext_atto"
    timm.list_models = lambda: ["convnext_atto", "convnext_femto"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = build_model("timm/convnext_atto", 5, image_size=32, pretrained=True)
    assert made[-1] == {"name": "convnext_atto", "in_chans": 3, "pretrained": True}
    assert checkpoint_activations(model)
    assert isinstance(model, Theirs)
    assert model.checkpointing
    with pytest.raises(DataError, match="did you mean timm/convnext_atto"):
        build_model("timm/convnext_ato", 5)


def test_without_timm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DataError, match=r"pip install 'acmds\[timm\]'"):
        build_model("timm/resnet18", 10)


@pytest.mark.parametrize("more", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("images", "model", "message"),
    [
        (torch.zeros(8, 3, 8, 64, dtype=torch.uint8), "densenet121", "cannot take images of 64x8 px"),
        (torch.zeros(8, 20), "small_cnn", "model 'small_cnn': takes images (C, H, W)"),
    ],
)
def test_a_model_that_cannot_take_the_items_is_refused_in_words(images, model, message, more, monkeypatch, capsys):
    module: Any = types.ModuleType("own_items")
    module.data = lambda: (TensorImages(images, [0, 1] * 4), None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main(["--model", model, "--dataset", "own_items:data", "--device", "cpu", *more]) == 2
    assert message in capsys.readouterr().err


# --- data


class ClassLabel:
    names = ("cat", "dog")


ClassImage = type("Image", (), {})


class Table:
    """What of `datasets.Dataset` is used."""

    def __init__(self, count: int) -> None:
        self.features = {"img": ClassImage(), "fine": ClassLabel()}
        self.labels = [number % 2 for number in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Any) -> Any:
        if key == "fine":
            return self.labels
        return {"img": Image.new("RGB", (16, 16), (key, 0, 0)), "fine": self.labels[key]}


@pytest.fixture
def hub(monkeypatch) -> Any:
    module: Any = types.ModuleType("datasets")
    module.splits = {"train": Table(40), "test": Table(6)}

    def load_dataset(path: str, configuration: str | None, cache_dir: str) -> dict[str, Table]:
        if path != "someone/pets":
            raise FileNotFoundError(f"Couldn't find any data file at {path}")
        return module.splits

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_data_set_of_the_hub_is_read_by_its_columns(hub):
    bundle = build_data(TrainConfig(dataset="hf:someone/pets"))
    assert (bundle.num_classes, bundle.class_names, bundle.image_shape) == (2, ["cat", "dog"], (3, 16, 16))
    assert [len(part) for part in (bundle.train, bundle.val)] == [40, 6]  # type: ignore[arg-type]
    image, label = bundle.train[3]
    assert (image.getpixel((0, 0)), label) == ((3, 0, 0), 1)


def test_without_a_split_for_validation_a_share_is_held_out(hub):
    del hub.splits["test"]
    bundle = build_data(TrainConfig(dataset="hf:someone/pets", val_fraction=0.1))
    assert [len(part) for part in (bundle.train, bundle.val)] == [36, 4]  # type: ignore[arg-type]
    assert bundle.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("break_it", "name", "message"),
    [
        (lambda hub: None, "hf:nobody/nothing", "cannot be loaded: Couldn't find any data file"),
        (lambda hub: hub.splits.pop("train"), "hf:someone/pets", "has no split `train`, only test"),
        (lambda hub: hub.splits["train"].features.pop("img"), "hf:someone/pets", "no column of kind Image, only fine"),
    ],
)
def test_a_data_set_of_the_hub_that_does_not_fit_is_refused_in_words(hub, break_it, name, message):
    break_it(hub)
    with pytest.raises(DataError, match=message):
        build_data(TrainConfig(dataset=name))


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'acmds\[hub\]'"):
        build_data(TrainConfig(dataset="hf:someone/pets"))


@pytest.fixture
def fashion(tmp_path) -> Path:
    """FashionMNIST's four files with 20 and 10 images, so that nothing is downloaded."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28)
        sizes = [number.to_bytes(4, "big") for number in (0x0803, count, 28, 28)]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"".join(sizes) + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = (0x0801).to_bytes(4, "big") + count.to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return tmp_path


def test_a_data_set_of_torchvision_is_had_by_its_class_name(fashion):
    bundle = build_data(TrainConfig(dataset="torchvision:FashionMNIST", data_dir=str(fashion)))
    assert [len(part) for part in (bundle.train, bundle.val)] == [20, 10]  # type: ignore[arg-type]
    assert (bundle.num_classes, bundle.image_shape, bundle.flip) == (10, (1, 28, 28), True)
    assert bundle.class_names is not None
    assert bundle.class_names[0] == "T-shirt/top"
    (fashion / "FashionMNIST").rename(fashion / "MNIST")
    assert not build_data(TrainConfig(dataset="torchvision:MNIST", data_dir=str(fashion))).flip  # a mirrored 2 is no 2


def test_a_data_set_of_torchvision_with_splits_trains_and_is_validated(tmp_path, capsys):
    home = tmp_path / "food-101"
    for part, numbers in (("train", range(6)), ("test", range(6, 8))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in ("pizza", "soup")}
        (home / "meta").mkdir(parents=True, exist_ok=True)
        (home / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for path in (path for paths in listed.values() for path in paths):
            (home / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 16), (90, 9, 9)).save(home / "images" / f"{path}.jpg")
    settings: list[str] = ["--dataset", "torchvision:Food101", "--data-dir", str(tmp_path), "--device", "cpu"]
    more = ["--model", "small_cnn", "--image-size", "16", "--epochs", "1", "--num-workers", "0", "--quiet"]
    assert cli.main([*settings, *more, "--output-dir", str(tmp_path / "run")]) == 0
    assert "samples: 12" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["data"]["class_names"] == ["pizza", "soup"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("FashionMINST", r"no data set of this name .*did you mean 'FashionMNIST'"), ("Caltech101", "with training and"),
     ("FashionMNIST", r"cannot be had in .*no network.*Check the network")],
)  # fmt: skip
def test_a_data_set_that_torchvision_does_not_have_is_refused_in_words(name, message, tmp_path, monkeypatch):
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("(no network)")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=message):
        build_data(TrainConfig(dataset=f"torchvision:{name}", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("counts", "level"),
    [({"cat": 20, "dog": 30}, None), ({"cat": 10, "dog": 30}, logging.INFO), ({"cat": 3, "dog": 45}, logging.WARNING)],
)
def test_classes_of_unequal_size_are_named(counts, level, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    build_data(TrainConfig(dataset=str(photos(tmp_path / "photos", counts)), val_fraction=0.0))
    found = [record for record in caplog.records if "class imbalance" in record.getMessage()]
    assert [record.levelno for record in found] == ([] if level is None else [level])
    if found:
        assert f"'cat' has {counts['cat']} training samples, 'dog' has {counts['dog']}" in found[0].getMessage()


def test_a_policy_that_cannot_take_the_images_is_refused(monkeypatch):
    module: Any = types.ModuleType("four_channels")
    images = TensorImages(torch.zeros(8, 4, 16, 16, dtype=torch.uint8), [0, 1] * 4)
    module.data = lambda: (images, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(DataError, match="auto_augment rand: takes images of 1 or 3 channels, not of 4"):
        build_data(TrainConfig(dataset="four_channels:data", auto_augment="rand"))
    assert build_data(TrainConfig(dataset="four_channels:data")).image_shape == (4, 16, 16)


def test_corrupt_images_are_listed(tmp_path, capsys):
    folder = photos(tmp_path / "photos", {"cat": 4, "dog": 2})
    assert cli.main(["check", str(folder)]) == 0
    assert "6 images" in capsys.readouterr().err
    (folder / "cat" / "1.png").write_bytes((folder / "cat" / "1.png").read_bytes()[:300])
    (folder / "dog" / "9.jpg").write_text("no image")
    assert cli.main(["check", str(folder)]) == 1
    out, error = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        str(folder / "cat" / "1.png"), str(folder / "dog" / "9.jpg"),
    ]  # fmt: skip
    assert "cat 4, dog 3" in error
    assert "2 of them cannot be read" in error


def test_the_check_of_a_folder_sees_the_parts_that_a_training_sees(tmp_path, capsys):
    photos(tmp_path / "Training", {"cat": 4, "dog": 3})
    photos(tmp_path / "Testing", {"cat": 1, "dog": 2})
    assert cli.main(["check", str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert f"7 images in {tmp_path / 'Training'}: cat 4, dog 3" in error
    assert f"3 images in {tmp_path / 'Testing'}: dog 2, cat 1" in error
