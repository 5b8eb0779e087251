"""Models and data sets by name: what they are, and what the user is told when they cannot be."""

from __future__ import annotations

import os
import pickle
import shutil
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from acmds_optimizer.config import TrainConfig
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo.datasets import NAMED, build_data, describe
from acmds_optimizer.zoo.folders import corrupt_images, read_folder, stratified_split
from acmds_optimizer.zoo.models import build_model, check_shape, model_names
from acmds_optimizer.zoo.names import DATASETS, written_models


def load(dataset: str | Path, **settings) -> Any:
    """The bundle; Any, since the tests look at what these data sets have beyond torch's Dataset."""
    return build_data(TrainConfig(dataset=str(dataset), **{"device": "cpu", **settings}))


def write_images(folder: Path, counts: dict[str, int], size: tuple[int, int] = (12, 12), suffix: str = ".png") -> Path:
    """`counts` images of random pixels in each class folder; size is (width, height)."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}{suffix}")
    return folder


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Puts a module into a fresh current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


# --- models


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 17), (4, 64)])
def test_small_cnn_takes_any_channels_and_sizes_from_8(channels, size):
    model = build_model("small_cnn", 7, in_channels=channels, image_size=size)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_small_cnn_refuses_images_below_8_px():
    with pytest.raises(DataError, match="at least 8 px, not 4"):
        build_model("small_cnn", 10, image_size=4)


def test_small_cnn_learns_digits_above_95_percent_in_five_epochs():
    data = load("digits")
    images, targets = data.train.images.float() / 255, torch.from_numpy(data.train.targets)
    torch.manual_seed(0)
    model = build_model("small_cnn", 10, in_channels=1, image_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(5):
        for picked in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[picked]), targets[picked]).backward()
            optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(data.val.images.float() / 255).argmax(1).numpy()
    assert np.mean(predicted == data.val.targets) > 0.95


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_resnets_get_the_cifar_stem_up_to_64_px(name):
    model: Any = build_model(name, 10, image_size=64)
    assert (model.conv1.kernel_size, model.conv1.stride, type(model.maxpool)) == ((3, 3), (1, 1), nn.Identity)
    assert build_model(name, 10, image_size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("size", [65, None])
def test_resnets_keep_their_usual_stem_above_64_px(size):
    model: Any = build_model("resnet18", 10, image_size=size)
    assert (model.conv1.kernel_size, model.conv1.stride, type(model.maxpool)) == ((7, 7), (2, 2), nn.MaxPool2d)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("resnet18", 96), ("squeezenet1_1", 32), ("mnasnet0_5", 32)]
)
def test_models_take_grey_images(name, size):
    model = build_model(name, 5, in_channels=1, image_size=size)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_every_model_is_for_classification_of_images():
    names = model_names()
    assert {"small_cnn", "resnet50", "vit_b_16", "convnext_tiny"} <= set(names)
    assert not [name for name in names if "rcnn" in name or "deeplab" in name or "r3d" in name or "raft" in name]
    assert len(names) == 1 + len(torchvision.models.list_models(module=torchvision.models))
    assert sorted(["small_cnn", *written_models()]) == names, "as torchvision's source is read without importing it"


def test_models_with_auxiliary_heads_give_one_output():
    model = build_model("googlenet", 4, image_size=64).train()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_transformers_are_built_for_the_image_size():
    assert build_model("vit_b_32", 3, image_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("vit_b_32", 40), ("maxvit_t", 32)])
def test_a_model_that_cannot_take_the_size_says_so_when_built(name, size):
    with pytest.raises(DataError, match=f"{name} cannot take images of {size} px .*another image_size or model"):
        build_model(name, 10, image_size=size)


@pytest.mark.parametrize("name", ["densenet121", "vit_b_16"])
def test_a_model_that_takes_the_width_but_not_the_height_says_so_when_built(name):
    with pytest.raises(DataError, match=f"{name} cannot take images of 64x8 px .*another image_size or model"):
        build_model(name, 10, image_size=(8, 64))


def test_images_that_are_not_square_are_taken_where_both_sides_suffice():
    assert build_model("small_cnn", 7, image_size=(8, 64))(torch.zeros(2, 3, 8, 64)).shape == (2, 7)
    with pytest.raises(DataError, match="at least 8 px, not 64x4 px"):
        build_model("small_cnn", 7, image_size=(4, 64))


@pytest.mark.parametrize("size", [(8, 65), (65, 8)])
def test_the_larger_side_decides_on_the_cifar_stem(size):
    small: Any = build_model("resnet18", 10, image_size=(8, 64))
    assert small.conv1.kernel_size == (3, 3)
    usual: Any = build_model("resnet18", 10, image_size=size)
    assert usual.conv1.kernel_size == (7, 7)
    assert usual(torch.zeros(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "timm/resnet18"])
@pytest.mark.parametrize("shape", [(20,), (28, 28), (3, 4, 32, 32)])
def test_items_that_are_no_images_are_refused_by_models_for_images(name, shape):
    with pytest.raises(DataError, match=r"takes images \(C, H, W\)") as refused:
        check_shape(name, shape)
    said = str(refused.value)
    assert said.startswith(f"model {name!r}: ")
    assert f"shape {shape}" in said
    assert "package.module:callable" in said


def test_a_model_of_ones_own_may_take_items_of_any_shape():
    check_shape("own_model:build", (20,))
    check_shape("small_cnn", (1, 8, 8))


def test_the_size_check_leaves_the_model_in_training_mode_with_real_weights():
    model = build_model("resnet18", 10, image_size=32)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_same_seed_gives_the_same_weights():
    weights: list[Any] = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(build_model("resnet18", 10, image_size=32).get_parameter("conv1.weight"))
    assert torch.equal(weights[0], weights[1])


def test_each_data_set_that_has_a_name_can_be_built():
    assert set(NAMED) == set(DATASETS)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(DataError, match=r"no model named 'resnet55': did you mean resnet50 or"):
        build_model("resnet55", 10)


def test_a_model_of_ones_own_comes_from_the_current_directory(write_module):
    write_module("own_model", "import torch\ndef build(num_classes):\n    return torch.nn.Linear(4, num_classes)\n")
    assert build_model("own_model:build", 6).out_features == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_x:build", "module 'no_such_module_x' cannot be imported"),
        ("bad_model:biuld", r"bad_model has no 'biuld' \(did you mean 'build'\?\)"),
        ("bad_model:NUMBER", "NUMBER is a int, not a function or class"),
        ("bad_model:build", "must return a torch.nn.Module, but returned a str"),
        ("bad_model:no_arguments", "must accept one argument, num_classes"),
        ("bad_model:", "expected package.module:callable"),
    ],
)
def test_a_model_of_ones_own_that_cannot_be_used_says_why(write_module, spec, message):
    write_module(
        "bad_model", "NUMBER = 3\ndef build(num_classes):\n    return 'x'\ndef no_arguments():\n    return None\n"
    )
    with pytest.raises(DataError, match=message):
        build_model(spec, 10)


# --- digits and CIFAR


def test_digits_are_split_ten_to_one_with_every_class_alike():
    data = load("digits")
    assert (len(data.train), len(data.val)) == (1618, 179)
    everyone = np.bincount(data.train.targets) + np.bincount(data.val.targets)
    assert np.bincount(data.val.targets).tolist() == [round(count / 10) for count in everyone]
    assert everyone.sum() == 1797


def test_digits_fill_the_range_of_uint8_and_are_never_mirrored():
    data = load("digits")
    assert (data.train.images.dtype, int(data.train.images.max())) == (torch.uint8, 255)
    assert (data.image_shape, data.flip, data.num_classes) == ((1, 8, 8), False, 10)


def test_digits_statistics_are_those_of_the_images():
    data = load("digits", val_fraction=0)
    pixels = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=2e-4)
    assert data.std[0] == pytest.approx(pixels.std().item(), abs=2e-4)


def test_the_split_does_not_depend_on_the_seed():
    first, second = (load("digits", seed=seed).val.images for seed in (0, 1))
    assert torch.equal(first, second)


def test_nothing_is_held_out_at_val_fraction_0():
    data = load("digits", val_fraction=0)
    assert len(data.train) == 1797
    assert data.val is None


def test_split_holds_out_one_of_each_class_but_never_the_last():
    targets = np.array([0] * 20 + [1] * 3 + [2])
    kept, held_out = stratified_split(targets, 0.1)
    assert np.bincount(targets[held_out], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*kept, *held_out]) == list(range(24))


def test_a_failed_download_names_the_folder_and_what_to_do(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(
        DataError, match=r"cifar10 could not be downloaded into .*cifar.*no route.*cifar-10-python.tar.gz"
    ):
        load("cifar10", data_dir=str(tmp_path / "cifar"))


def test_cifar_keeps_its_own_test_images_for_validation(monkeypatch):
    class Stored:
        filename = "x"
        classes = ("plane", "car")

        def __init__(self, _root, train, download):
            assert download
            self.data = np.full((4 if train else 2, 32, 32, 3), [1, 2, 3], dtype=np.uint8)
            self.targets = [0, 1, 1, 0] if train else [1, 0]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stored)
    data = load("cifar10")
    assert (len(data.train), len(data.val), data.num_classes, data.class_names) == (4, 2, 2, ["plane", "car"])
    assert data.train.images[0, :, 5, 5].tolist() == [1, 2, 3]
    assert (data.image_shape, data.crop, data.flip) == ((3, 32, 32), "pad", True)


def test_the_files_of_cifar_are_summed_up_once_a_start(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    summed: list[str] = []

    def count(path: str, _md5: str) -> bool:
        summed.append(Path(path).name)
        return True

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", count)
    data = load("cifar10", data_dir=str(tmp_path))
    assert (len(data.train), len(data.val)) == (10, 2)
    assert len([name for name in summed if name != "batches.meta"]) == 6


# --- folders


@pytest.mark.parametrize("validation", ["val", "valid", "test"])
def test_a_folder_with_train_and_validation_is_taken_as_it_is(tmp_path, validation):
    write_images(tmp_path / "train", {"cat": 3, "dog": 4})
    write_images(tmp_path / validation, {"dog": 2})
    data = load(tmp_path)
    assert (len(data.train), len(data.val), data.class_names) == (7, 2, ["cat", "dog"])
    assert data.val.targets.tolist() == [1, 1]
    assert data.image_shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("training", "validation"),
    [("Training", "Testing"), ("Train", "Val"), ("TRAIN", "VAL"), ("training", "validation"), ("train", "Test")],
)
def test_the_parts_of_a_folder_are_known_in_any_case_and_as_training_and_testing(tmp_path, training, validation):
    write_images(tmp_path / training, {"cat": 3, "dog": 4})
    write_images(tmp_path / validation, {"dog": 2})
    data = load(tmp_path)
    assert (len(data.train), len(data.val), data.class_names) == (7, 2, ["cat", "dog"])


def test_of_two_spellings_of_a_part_the_small_letters_count(tmp_path):
    for name, count in (("Train", 5), ("train", 3), ("VAL", 2), ("val", 1)):
        write_images(tmp_path / name, {"cat": count, "dog": count})
    data = load(tmp_path)
    assert (len(data.train), len(data.val)) == (6, 2)


def test_class_folders_alone_are_split(tmp_path):
    write_images(tmp_path, {"a": 10, "b": 20})
    data = load(tmp_path, val_fraction=0.2)
    assert np.bincount(data.train.targets).tolist() == [8, 16]
    assert np.bincount(data.val.targets).tolist() == [2, 4]


def test_train_without_validation_is_split(tmp_path):
    write_images(tmp_path / "train", {"a": 10, "b": 10})
    data = load(tmp_path)
    assert (len(data.train), len(data.val)) == (18, 2)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "capitals", {"Bus": 4, "Car": 4, "Train": 4})
    assert load(tmp_path / "capitals").class_names == ["Bus", "Car", "Train"]
    shutil.rmtree(tmp_path / "capitals")
    write_images(tmp_path, {"bus": 4, "car": 4, "train": 4})
    assert load(tmp_path).class_names == ["bus", "car", "train"]
    write_images(tmp_path, {"val": 1})
    with pytest.raises(DataError, match="train: holds 4 images but no class folders"):
        load(tmp_path)


def test_large_images_and_those_of_differing_sizes_become_224_px(tmp_path):
    write_images(tmp_path / "large", {"a": 2, "b": 2}, size=(65, 65))
    write_images(tmp_path / "mixed", {"a": 2}, size=(20, 20))
    write_images(tmp_path / "mixed", {"b": 2}, size=(24, 20))
    for name in ("large", "mixed"):
        data = load(tmp_path / name)
        assert (data.image_shape, data.crop) == ((3, 224, 224), "resized")


def test_image_size_overrides_the_stored_size(tmp_path):
    write_images(tmp_path, {"a": 2, "b": 2})
    assert load(tmp_path, image_size=96).image_shape == (3, 96, 96)
    assert load(tmp_path, image_size=16).crop == "pad"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "holds no class folders"),
        ({"a": 0, "b": 0}, "no images .* in its 2 class folders"),
        ({"a": 3}, r"only one class has images \('a'\)"),
        ({"a": 3, "b": 0}, r"only one class has images \('a'\)"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_says_what_is_expected(tmp_path, counts, message):
    write_images(tmp_path, counts)
    with pytest.raises(DataError, match=message + r".*Expected train/ and val/"):
        load(tmp_path)


def test_loose_images_are_counted_in_the_error(tmp_path):
    write_images(tmp_path, {"x": 3})
    with pytest.raises(DataError, match="holds 3 images but no class folders"):
        load(tmp_path / "x")


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder. Expected train/ and val/"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_that_lead_back_are_not_followed(target, tmp_path):
    write_images(tmp_path / "images", {"ant": 3, "bee": 2})
    (tmp_path / "more").mkdir()
    write_images(tmp_path / "more", {"wings": 1})
    for name in ("ant", "bee"):
        (tmp_path / "images" / name / "up").symlink_to(target)
    (tmp_path / "images" / "bee" / "more").symlink_to(tmp_path / "more")
    images, _ = read_folder(tmp_path / "images", 0.0)
    assert np.bincount(images.targets).tolist() == [3, 3]


@pytest.mark.parametrize("inside", [".", "bee", "bee/wings"])
def test_a_folder_that_may_not_be_read_is_an_error_and_not_a_smaller_class(inside, tmp_path, monkeypatch):
    write_images(tmp_path, {"ant": 3, "bee": 2, "bee/wings": 1, "cow": 2})
    listed = os.scandir

    def refused(path: Any) -> Any:
        if Path(path) == tmp_path / inside:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied"):
        load(tmp_path)


def test_a_data_set_whose_name_is_too_long_for_a_path_is_an_error():
    with pytest.raises(DataError, match="no data set and no folder named"):
        load("x" * 300)


def test_hidden_files_and_folders_are_no_images(tmp_path):
    write_images(tmp_path, {"ant": 3, "bee": 2, "ant/.thumbnails": 3, ".trash": 1})
    (tmp_path / "bee" / "._000.png").write_bytes(b"Mac OS X")
    images, _ = read_folder(tmp_path, 0.0)
    assert np.bincount(images.targets).tolist() == [3, 2]
    assert corrupt_images(images) == []


def test_a_file_instead_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "images.zip").write_text("x")
    with pytest.raises(DataError, match="is a file, not a folder"):
        load(tmp_path / "images.zip")


def test_a_validation_class_that_training_lacks_is_an_error(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="has classes that training lacks: c"):
        load(tmp_path)


def test_a_folder_without_images_is_no_class_in_validation_either(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1, "c": 0})
    write_images(tmp_path / "val", {"a": 1, "b": 2, "c": 0})
    data = load(tmp_path)
    assert (data.class_names, data.val.targets.tolist()) == (["a", "b"], [0, 1, 1])


def test_a_misspelt_name_gets_the_nearest_one():
    with pytest.raises(DataError, match=r"named 'cifr10' \(did you mean 'cifar10'\?\)"):
        load("cifr10")


def test_imagenet_says_which_folder_is_missing(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"imagenet: .* \(data_dir\) has no val/\. Expected train/ and val/"):
        load("imagenet", data_dir=str(tmp_path))


def test_imagenet_is_read_from_data_dir(tmp_path):
    write_images(tmp_path / "train", {"n01": 2, "n02": 2}, size=(80, 70), suffix=".JPEG")
    write_images(tmp_path / "val", {"n01": 1, "n02": 1}, size=(80, 70), suffix=".JPEG")
    data = load("imagenet", data_dir=str(tmp_path))
    assert (len(data.train), len(data.val), data.image_shape) == (4, 2, (3, 224, 224))


# --- one's own data, and class counts

OWN_DATA = """
import numpy as np, torch
from torch.utils.data import Dataset, TensorDataset
images = torch.arange(6 * 3 * 10 * 10).reshape(6, 3, 10, 10) % 256
labels = torch.tensor([0, 1, 2, 0, 1, 2])
def as_uint8():
    return TensorDataset(images.byte(), labels), None
def as_float():
    return TensorDataset(images.float(), labels), None
class Plain(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return images[index].permute(1, 2, 0).byte().numpy(), int(labels[index])
def unlabelled():
    return Plain(), Plain()
def only_one():
    return Plain()
def needs(argument):
    pass
def not_images():
    return [("text", 0)], None
"""


def test_ones_own_data_is_described_by_its_items(write_module):
    write_module("own_data", OWN_DATA)
    data = load("own_data:as_uint8")
    assert (data.image_shape, data.num_classes, data.crop, data.is_float) == ((3, 10, 10), 3, "pad", False)


def test_float_data_is_passed_through(write_module):
    write_module("own_data", OWN_DATA)
    data = load("own_data:as_float")
    assert (data.is_float, data.crop, data.mean, data.flip) == (True, "none", None, False)


def test_numpy_images_are_read_as_height_width_channels(write_module):
    write_module("own_data", OWN_DATA)
    assert load("own_data:unlabelled", num_classes=3).image_shape == (3, 10, 10)


def test_a_grey_image_among_coloured_ones_takes_neither_their_colour_nor_their_size():
    images = [Image.new("L" if number == 0 else "RGB", (32, 24)) for number in range(3)]
    labelled: Any = list(zip(images, [0, 1, 0], strict=True))
    assert describe(labelled).image_shape == (3, 24, 32)


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("own_data:unlabelled", {}, "number of classes cannot be read .* give num_classes"),
        ("own_data:only_one", {}, r"must return \(train, val\), but returned a Plain"),
        ("own_data:needs", {}, "must be callable without arguments"),
        ("own_data:not_images", {}, "the image is a str"),
        ("own_data:as_float", {"image_size": 32}, "image_size 32 cannot be applied"),
        ("own_data:as_uint8", {"num_classes": 2}, "num_classes is 2, but the labels go up to 2: .* at least 3"),
        ("own_data:missing", {}, "own_data has no 'missing'"),
    ],
)
def test_ones_own_data_that_cannot_be_used_says_why(write_module, spec, settings, message):
    write_module("own_data", OWN_DATA)
    with pytest.raises(DataError, match=message):
        load(spec, **settings)


def test_more_classes_than_labels_are_allowed(caplog):
    assert load("digits", num_classes=12).num_classes == 12
    assert "num_classes is 12, but the data has 10" in caplog.text


def test_a_data_set_without_a_bundle_keeps_its_size_and_is_not_augmented():
    data = describe(TensorDataset(torch.zeros(4, 3, 100, 90, dtype=torch.uint8), torch.tensor([0, 3, 1, 0])))
    assert (data.image_shape, data.crop, data.flip, data.num_classes) == ((3, 100, 90), "none", False, 4)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(DataError, match=r"\(TensorDataset\) is empty"):
        describe(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


def test_a_data_set_without_length_is_an_error():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(DataError, match="Endless has no length"):
        describe(Endless())


def test_a_loader_in_the_place_of_its_data_set_is_refused_with_what_to_give():
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    loader: Any = torch.utils.data.DataLoader(data, batch_size=2)
    with pytest.raises(DataError, match=r"DataLoader has no __getitem__.*give its \.dataset"):
        describe(loader)
