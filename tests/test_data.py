"""Streams of batches: exact order, augmentation that depends on the position alone, both kinds of source alike."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.transforms.v2 import functional

from acmds_optimizer.config import CurriculumConfig, TrainConfig
from acmds_optimizer.curriculum.resolution import averaged
from acmds_optimizer.engine import data as data_module
from acmds_optimizer.engine import decode
from acmds_optimizer.engine.batches import Batch, DataSource
from acmds_optimizer.engine.images import (
    InputSpec,
    Normaliser,
    Shifts,
    centre_box,
    prepare,
    random_box,
    sample_rng,
)
from acmds_optimizer.engine.resident import ResidentSource, ResidentStream
from acmds_optimizer.engine.workers import WorkerSource
from acmds_optimizer.errors import DataError
from acmds_optimizer.zoo import datasets
from acmds_optimizer.zoo.datasets import DataBundle
from acmds_optimizer.zoo.items import TensorImages

CPU = torch.device("cpu")


def build_data(config: TrainConfig) -> Any:
    """The bundle; Any, since the tests look at what these data sets have beyond torch's Dataset."""
    return datasets.build_data(config)


def make_source(*args, **settings) -> Any:
    return data_module.make_source(*args, **settings)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002  # the global one is what must not move
    return state[1].tolist()


def spec_for(shape=(3, 16, 16), **changes) -> InputSpec:
    settings = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "flip": True,
        "crop": "pad",
        "is_float": False,
        "num_classes": None,
        "seed": 5,
    }
    return InputSpec(shape=shape, **{**settings, **changes})


def small_images(count: int = 90, size: int = 16) -> TensorImages:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return TensorImages(images, np.arange(count) % 7)


def resident() -> DataSource:
    data = small_images()
    return ResidentSource(data.images, data.targets, spec_for(), CPU, augment=True)


def small_by_workers(processes: int = 0) -> DataSource:
    return WorkerSource(small_images(), spec_for(), CPU, augment=True, workers=processes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 45 JPEGs of differing sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2)
    for number in range(90):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        size = (90 + number, 130 - number // 2)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / "ab"[number % 2] / f"{number:02}.jpg", quality=90)
    return folder


def photo_source(folder: Path, processes: int) -> DataSource:
    config = TrainConfig(
        dataset=str(folder), image_size=72, val_fraction=0, num_workers=processes, device="cpu", seed=5
    )
    data = build_data(config)
    return make_source(data.train, data, config, "cpu", train=True)


@pytest.fixture(params=["resident", "workers, small", "workers, photos", "two processes"])
def source(request, photos):
    made = {
        "resident": resident,
        "workers, small": small_by_workers,
        "workers, photos": lambda: photo_source(photos, 0),
        "two processes": lambda: photo_source(photos, 2),
    }[request.param]()
    yield made
    made.close()


ORDER = np.random.default_rng(0).permutation(90)


def take_all(source: DataSource, sizes: list[int], **settings) -> Batch:
    """The epoch in batches of `sizes` and the rest, as one batch."""
    with source.stream(ORDER, **{"epoch": 3, "augment": True, **settings}) as stream:
        batches = [stream.take(size) for size in sizes]
        batches.append(stream.take(1000))
        assert stream.remaining == 0
    parts = ("inputs", "targets", "indices", "weights")
    return Batch(*(torch.cat([getattr(batch, part) for batch in batches]) for part in parts))


def assert_equal(first: Batch, second: Batch) -> None:
    for part in ("inputs", "targets", "indices", "weights"):
        assert torch.equal(getattr(first, part), getattr(second, part)), part


# --- what every source promises


def test_samples_do_not_depend_on_how_the_epoch_is_cut(source):
    whole = take_all(source, [])
    assert_equal(take_all(source, [7, 13, 1, 64]), whole)
    assert_equal(take_all(source, [20, 44]), whole)


def test_order_and_targets_are_exact(source):
    batch = take_all(source, [10])
    assert batch.indices.tolist() == ORDER.tolist()
    photos = source.spec.shape == (3, 72, 72)
    assert batch.targets.tolist() == (ORDER // 45 if photos else ORDER % 7).tolist()


def test_an_epoch_resumed_in_the_middle_continues_as_if_uninterrupted(source):
    whole = take_all(source, [])
    rest = take_all(source, [5, 9], start=33)
    assert_equal(rest, whole.slice(33, 90))


def test_augmentation_changes_with_the_epoch_and_not_with_repetition(source):
    first, again, other = (take_all(source, [], epoch=epoch).inputs for epoch in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_augmentation_every_epoch_is_the_same(source):
    first, other = (take_all(source, [], epoch=epoch, augment=False).inputs for epoch in (3, 4))
    assert torch.equal(first, other)


def test_weights_travel_with_their_samples_and_default_to_ones(source):
    weights = np.linspace(0, 2, 90, dtype=np.float32)
    assert take_all(source, [11], weights=weights).weights.tolist() == weights.tolist()
    assert take_all(source, []).weights.tolist() == [1.0] * 90


def test_types_are_those_the_loop_expects(source):
    batch = take_all(source, [])
    kinds = (batch.inputs.dtype, batch.targets.dtype, batch.indices.dtype, batch.weights.dtype)
    assert kinds == (torch.float32, torch.int64, torch.int64, torch.float32)
    assert len(batch) == 90


def test_taking_from_an_ended_epoch_gives_an_empty_batch(source):
    with source.stream(ORDER, epoch=0, start=90) as stream:
        batch = stream.take(4)
    assert (len(batch), batch.inputs.shape[1:]) == (0, take_all(source, []).inputs.shape[1:])


def test_a_sample_may_come_twice_in_an_epoch(source):
    with source.stream(np.array([4, 4, 9]), epoch=0) as stream:
        batch = stream.take(3)
    assert batch.indices.tolist() == [4, 4, 9]
    assert torch.equal(batch.inputs[0], batch.inputs[1])


def test_the_callers_order_may_change_afterwards(source):
    order = ORDER.copy()
    with source.stream(order, epoch=3, augment=True) as stream:
        order[:] = 0
        assert stream.take(90).indices.tolist() == ORDER.tolist()


@pytest.mark.parametrize("order", [[0, 90], [-1, 3]])
def test_an_index_outside_the_data_is_refused(source, order):
    with pytest.raises(ValueError, match="outside the data set's 90"):
        source.stream(np.array(order), epoch=0)


def test_the_training_s_random_state_is_left_alone(source):
    before = torch.get_rng_state(), numpy_state(), random.getstate()
    take_all(source, [30])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == numpy_state()
    assert before[2] == random.getstate()


def test_running_out_of_memory_in_take_loses_no_sample(source):
    whole = take_all(source, [])
    normalise, failures = source.normalise, [True]

    def fail_once(images):
        if failures:
            failures.clear()
            raise torch.OutOfMemoryError("no room")
        return normalise(images)

    with source.stream(ORDER, epoch=3, augment=True) as stream:
        first = stream.take(10)
        source.normalise = fail_once
        with pytest.raises(torch.OutOfMemoryError):
            stream.take(70)
        assert stream.position == 10
        second = stream.take(30)
    assert_equal(first, whole.slice(0, 10))
    assert_equal(second, whole.slice(10, 40))


def test_resident_and_worker_sources_give_the_same_small_images():
    assert_equal(take_all(resident(), [31]), take_all(small_by_workers(), [8]))


def test_the_number_of_processes_changes_nothing(photos):
    two = photo_source(photos, 2)
    try:
        assert_equal(take_all(photo_source(photos, 0), [31]), take_all(two, [8]))
    finally:
        two.close()


# --- the worker source


def test_close_leaves_no_process_behind(photos):
    before = set(multiprocessing.active_children())
    source = photo_source(photos, 2)
    stream = source.stream(ORDER, epoch=0, augment=True)
    stream.take(3)
    children = set(multiprocessing.active_children()) - before
    assert len(children) == 2
    source.close()
    assert not [child for child in children if child.is_alive()]


def test_an_interrupt_does_not_end_the_processes(photos):
    before = set(multiprocessing.active_children())
    source = photo_source(photos, 2)
    try:
        source.stream(ORDER, epoch=0).take(90)  # both have begun to work, and with that to ignore it
        with source.stream(ORDER, epoch=1) as stream:
            stream.take(3)
            for child in set(multiprocessing.active_children()) - before:
                os.kill(child.pid or 0, signal.SIGINT)
            assert len(stream.take(87)) == 87
    finally:
        source.close()


def test_processes_stay_from_epoch_to_epoch(photos):
    source = photo_source(photos, 2)
    try:
        seen = []
        for epoch in range(2):
            source.stream(ORDER, epoch=epoch).take(5)
            seen.append({child.pid for child in multiprocessing.active_children()})
        assert seen[0] == seen[1]
    finally:
        source.close()


def test_a_new_stream_ends_the_one_before():
    source = small_by_workers()
    first = source.stream(ORDER, epoch=0)
    first.take(3)
    source.stream(ORDER, epoch=1)
    with pytest.raises(ValueError, match="began another stream"):
        first.take(80)


@pytest.mark.parametrize(
    ("stored", "settings", "said"),
    [
        ((48, 40), {}, "2 classes, 48x40 px"),
        ((48, 40), {"image_size": 32}, "2 classes, 48x40 px, fed as 32x32 px"),
        ((None, None), {}, "2 classes, of differing sizes, fed as 224x224 px"),
    ],
)
def test_the_log_says_the_size_of_the_images_and_the_size_that_is_fed(stored, settings, said, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="acmds_optimizer.zoo.datasets")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            size = stored if stored[0] else (70 + number, 80)
            Image.new("RGB", size).save(tmp_path / name / f"{number}.png")
    build_data(TrainConfig(dataset=str(tmp_path), device="cpu", **settings))
    assert any(record.getMessage().endswith(said) for record in caplog.records)


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("content", [b"no image at all", None])
def test_a_broken_image_is_named(photos, tmp_path, processes, content):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        whole = (photos / name / ("10.jpg" if name == "a" else "11.jpg")).read_bytes()
        for number in range(100):
            (tmp_path / name / f"{number}.jpg").write_bytes(whole)
    (tmp_path / "b" / "57.jpg").write_bytes(whole[: len(whole) // 2] if content is None else content)
    source = photo_source(tmp_path, processes)
    try:
        with pytest.raises(
            DataError, match=r"57\.jpg: cannot be read as an image: .*Repair or remove the file.*--broken-images skip"
        ) as error:
            source.stream(np.arange(200), epoch=0).take(200)
        assert "Traceback" not in str(error.value)
    finally:
        source.close()


@pytest.mark.parametrize("processes", [0, 1])
def test_a_broken_image_gives_its_place_to_the_next_where_asked_and_is_named_once(photos, tmp_path, processes, caplog):
    caplog.set_level(logging.WARNING, logger="acmds_optimizer.engine.decode")  # a benchmark's test has silenced it
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(sorted((photos / name).iterdir())[:5]):
            shutil.copy(picture, tmp_path / name / f"{number}.jpg")
    for broken in ("a/3.jpg", "a/4.jpg", "b/4.jpg"):
        (tmp_path / broken).write_bytes(b"no image at all")
    config = TrainConfig(
        dataset=str(tmp_path),
        device="cpu",
        image_size=32,
        val_fraction=0.0,
        broken_images="skip",
        num_workers=processes,
    )
    data = build_data(config)
    source = make_source(data.train, data, config, "cpu", train=False)
    try:
        for epoch in range(2):
            batch = source.stream(np.arange(10), epoch=epoch).take(10)
            # a/3 and a/4 became b/0, b/4 the first of all
            assert batch.targets.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
            assert torch.equal(batch.inputs[3], batch.inputs[5])
            assert torch.equal(batch.inputs[9], batch.inputs[0])
        skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
        assert sorted(line.split(": cannot")[0][-7:] for line in skipped) == ["a/3.jpg", "a/4.jpg", "b/4.jpg"]
        assert not any("Repair" in line for line in skipped)
    finally:
        source.close()


@pytest.fixture
def looks_often(monkeypatch):
    """Whether workers live is looked at ten times a second; usually every five."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def test_a_process_that_is_killed_is_reported_with_the_next_chunk_not_in_the_midst_of_a_step(looks_often):
    before = signal.getsignal(signal.SIGCHLD)
    source = WorkerSource(small_images(), spec_for(), CPU, augment=False, workers=2)
    try:
        stream = source.stream(np.arange(90).repeat(20), epoch=0)
        stream.take(10)
        assert signal.getsignal(signal.SIGCHLD) is before
        assert source.reader._loader is not None
        for worker in source.reader._loader._iterator._workers:  # type: ignore[union-attr]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        assert float(torch.ones(100).sum()) == 100  # the step goes on
        with pytest.raises(DataError, match=r"a process that decodes images died .* lower num_workers"):
            stream.take(1700)
        with pytest.raises(DataError, match="a process that decodes images died"):
            source.stream(np.arange(90), epoch=1).take(90)
    finally:
        source.close()


def test_a_process_that_dies_is_reported_as_such(looks_often):
    class Deadly(Dataset):
        targets = (0, 1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            os._exit(3)

    source = WorkerSource(Deadly(), spec_for(), CPU, augment=False, workers=1)
    try:
        with pytest.raises(DataError, match=r"a process that decodes images died .* lower num_workers"):
            source.stream(np.array([0]), epoch=0).take(1)
    finally:
        source.close()


def test_a_label_beyond_the_classes_is_an_error_before_it_reaches_the_device():
    source = WorkerSource(small_images(), spec_for(num_classes=6), CPU, augment=False, workers=0)
    with pytest.raises(DataError, match="item 6 of the data set has label 6, but there are 6 classes"):
        source.stream(np.arange(90), epoch=0).take(10)


def test_random_transforms_of_ones_own_data_repeat_with_the_epoch():
    class Noisy(Dataset):
        targets = tuple([0, 1] * 45)

        def __len__(self):
            return 90

        def __getitem__(self, index):
            return torch.rand(2) + random.random() + np.random.rand(), index % 2  # noqa: NPY002

    spec = spec_for(shape=(2,), is_float=True, crop="none")
    source = WorkerSource(Noisy(), spec, CPU, augment=True, workers=0)
    first, again, other = (take_all(source, [13], epoch=epoch).inputs for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_chunks_shrink_to_fit_the_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 64 * 2**20}))
    monkeypatch.setattr(decode, "SHARED_MEMORY", Path("/"))
    photo_bytes = 3 * 224 * 224
    assert decode._chunk_samples(photo_bytes, workers=8) == 32 * 2**20 // (8 * 4 * photo_bytes) == 6
    assert decode._chunk_samples(192, workers=8) == decode.CHUNK_SAMPLES


@pytest.mark.parametrize(
    ("count", "largest", "workers", "distinct"),
    [
        (300, 64, 2, [8, 16, 32, 47]),
        (5000, 64, 8, [8, 16, 32, 63, 64]),
        (1500, 64, 31, [8, 16, 24, 25]),  # 64 at once would leave seven of the workers without any
        (5000, 6, 8, [5, 6]),
        (5, 64, 8, [1]),
        (5, 64, 0, [5]),
        (0, 64, 2, []),
    ],
)
def test_an_epochs_first_chunks_are_small_and_each_worker_gets_as_many(count, largest, workers, distinct):
    sizes = decode.chunk_sizes(count, largest, workers)
    assert sum(sizes) == count
    assert sorted(set(sizes)) == distinct
    assert count < max(1, workers) or len(sizes) % max(1, workers) == 0


# --- crops, flips, normalisation


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cut_equals_pad_crop_flip_one_image_at_a_time(layout):
    images = small_images(40, size=16).images.contiguous(memory_format=layout)
    shifts = Shifts.draw(40, epoch=0, spec=spec_for(), device=CPU)
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    cut = shifts.cut(images, chosen[5:30], 5, 30)
    for row, position in enumerate(range(5, 30)):
        padded = functional.pad(images[chosen[position]], [2, 2])
        expected = functional.crop(padded, 2 + int(shifts.rows[position]), 2 + int(shifts.columns[position]), 16, 16)
        assert torch.equal(cut[row], expected.flip(-1) if shifts.flips[position] else expected)
    assert cut.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("crop", ["none", "pad"])
def test_images_that_are_stored_as_nhwc_give_the_same_inputs(crop):
    data = small_images(60)
    inputs = []
    for layout in LAYOUTS:
        source = ResidentSource(data.images, data.targets, spec_for(crop=crop), CPU, augment=True)
        source.sized = source.images.contiguous(memory_format=layout)
        with source.stream(np.arange(60)[::-1].copy(), epoch=2, augment=True) as stream:
            inputs.append(stream.take(50).inputs)
    assert torch.equal(*inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smaller_images_are_made_once_and_shifted_by_as_much_of_their_side(layout):
    data = small_images(40, size=16)
    source = ResidentSource(data.images, data.targets, spec_for(cutout_fraction=0.25), CPU, augment=True)
    source.images = source.images.contiguous(memory_format=layout)
    small = averaged(data.images.float(), (8, 8)).round().to(torch.uint8)
    order = np.arange(40)[::-1].copy()
    with source.stream(order, epoch=1, augment=True) as stream:
        assert isinstance(stream, ResidentStream)
        stream._ahead = 30  # as on CUDA
        assert stream.take(4).inputs.shape[2:] == (16, 16)
        source.resize((8, 8), small.nbytes - 1)
        assert source.sized is source.images, "a copy may not take so much"
        source.resize((8, 8), small.nbytes)
        inputs = stream.take(20).inputs
        shifts, cutouts = stream._shifts, stream.cutouts
    assert shifts is not None
    assert cutouts is not None
    for row, position in enumerate(range(4, 24)):
        down, right = (round(int(drawn[position]) / 2) for drawn in (shifts.rows, shifts.columns))
        cut = functional.crop(functional.pad(small[order[position]], [1, 1]), 1 + down, 1 + right, 8, 8)
        expected = Normaliser(spec_for(), CPU)((cut.flip(-1) if shifts.flips[position] else cut)[None])
        top, left = (round(int(drawn[position]) / 2) - 1 for drawn in (cutouts.rows, cutouts.columns))
        expected[:, :, max(0, top) : top + 2, max(0, left) : left + 2] = 0.0
        assert torch.equal(inputs[row], expected[0])
    source.resize((16, 16), 0.0)
    assert source.sized is source.images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_are_on_the_device_already_are_not_copied_there(layout):
    data = small_images(8)
    images = data.images.contiguous(memory_format=layout)
    source = ResidentSource(images, data.targets, spec_for(), CPU, augment=True, channels_last=True)
    assert source.images.data_ptr() == images.data_ptr()


def test_shifts_are_uniform_and_half_of_the_images_are_flipped():
    shifts = Shifts.draw(50_000, epoch=1, spec=spec_for(shape=(3, 32, 16)), device=CPU)
    for drawn, choices in ((shifts.rows, 9), (shifts.columns, 5)):
        share = np.bincount(drawn.numpy() + choices // 2, minlength=choices) / 50_000
        assert len(share) == choices
        assert np.abs(share - 1 / choices).max() < 5 * np.sqrt(1 / choices / 50_000)
    assert abs(shifts.flips.float().mean() - 0.5) < 0.012


def test_digits_are_shifted_but_never_flipped():
    assert not Shifts.draw(1000, epoch=0, spec=spec_for(shape=(1, 8, 8), flip=False), device=CPU).flips.any()


def test_the_seed_changes_the_shifts():
    first, second = (Shifts.draw(100, 0, spec_for(seed=seed), CPU).rows for seed in (0, 1))
    assert not torch.equal(first, second)


def test_normalisation_equals_torchvision():
    images = small_images(5).images
    spec = spec_for()
    expected = functional.normalize(images.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert torch.allclose(Normaliser(spec, CPU)(images), expected, atol=1e-6)


def test_images_without_statistics_are_scaled_to_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    assert Normaliser(spec_for(shape=(1, 1, 1), mean=None, std=None), CPU)(images).flatten().tolist() == pytest.approx(
        [0, 0.2, 1]
    )


def test_the_kernel_that_normalises_gives_what_pytorch_does(monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # runs the kernel on the CPU
    monkeypatch.delitem(sys.modules, "acmds_optimizer.engine.kernels", raising=False)
    kernels = importlib.import_module("acmds_optimizer.engine.kernels")
    monkeypatch.delitem(sys.modules, "acmds_optimizer.engine.kernels")  # the next to import it gets a real one
    images = torch.randint(0, 256, (3, 3, 25, 17), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(3, 1, 1), torch.rand(3, 1, 1)
    found = kernels.compile_normalise(scale, shift)(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, torch.addcmul(shift, images, scale), rtol=1e-6)


def test_images_are_normalised_where_nothing_can_be_compiled(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "acmds_optimizer.engine.kernels", None)
    normalise = Normaliser(spec_for(), CPU, channels_last=True)
    with caplog.at_level(logging.DEBUG):
        normalise._compile()
    assert normalise._compiled is None
    assert "PyTorch's own kernel" in caplog.text


@pytest.mark.gpu
def test_many_large_batches_are_normalised_by_a_compiled_kernel_with_the_same_bits():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux")
    normalise = Normaliser(spec_for(shape=(3, 225, 225)), torch.device("cuda"), channels_last=True)
    images = torch.randint(0, 256, (29, 3, 225, 225), dtype=torch.uint8, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    expected = normalise(images).clone()
    for _ in range(100):
        normalise(images)
    deadline = time.monotonic() + 60
    while normalise._compiled is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert normalise._compiled is not None
    found = normalise(images)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    part = images[1:]  # begins at an address that no vector of bytes can be read from
    assert part.data_ptr() % 16
    assert torch.equal(normalise(part), expected[1:])


def test_random_boxes_have_torchvisions_areas_and_aspects():
    ours, theirs = [], []
    image = torch.empty(3, 300, 400)
    torch.manual_seed(0)
    for position in range(2000):
        left, top, wide, high = random_box(400, 300, sample_rng(0, 0, position))
        assert 0 <= left <= left + wide <= 400
        assert 0 <= top <= top + high <= 300
        ours.append((wide * high / 120_000, np.log(wide / high), left / 400, top / 300))
        params = torchvision.transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append(
            (params[2] * params[3] / 120_000, np.log(params[3] / params[2]), params[1] / 400, params[0] / 300)
        )
    for moment in (np.mean, np.std):
        assert moment(ours, axis=0) == pytest.approx(moment(theirs, axis=0), abs=0.025)


def test_validation_cuts_the_centre_of_224_in_256():
    assert centre_box(512, 256, (3, 224, 224), 224 / 256) == (144, 16, 224, 224)
    assert centre_box(100, 200, (3, 224, 224), 224 / 256) == (6.25, 56.25, 87.5, 87.5)


def test_validation_is_close_to_torchvisions_resize_and_centre_crop(photos):
    spec = spec_for(shape=(3, 72, 72), crop="resized")
    image = Image.open(photos / "a" / "40.jpg").convert("RGB")
    resized = functional.center_crop(functional.resize(image, [round(72 * 256 / 224)]), [72, 72])
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    assert (prepare(image, spec, None).float() - expected).abs().mean() < 3


def test_a_large_jpeg_decoded_at_reduced_scale_looks_the_same(tmp_path):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    coarse.resize((1001, 803), Image.Resampling.BICUBIC).save(tmp_path / "big.jpg", quality=95)
    spec = spec_for(shape=(3, 96, 96), crop="resized")
    drafted = Image.open(tmp_path / "big.jpg")
    whole = Image.open(tmp_path / "big.jpg").convert("RGB")
    difference = prepare(drafted, spec, None).float() - prepare(whole, spec, None).float()
    assert drafted.size < (600, 500)  # decoded at half the size
    assert difference.abs().mean() < 2


@pytest.mark.parametrize("size", [(65, 131), (33, 100), (1001, 67), (224, 224), (3, 3)])
def test_any_stored_size_can_be_cut(size):
    image = Image.new("RGB", size)
    for crop in ("pad", "resized"):
        spec = spec_for(shape=(3, 40, 40), crop=crop)
        for position in range(20):
            assert prepare(image, spec, sample_rng(0, 0, position)).shape == (3, 40, 40)
        assert prepare(image, spec, None).shape == (3, 40, 40)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_of_any_mode_become_rgb(mode):
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    assert prepare(image, spec_for(), None).unique().tolist() == [255]


def test_sixteen_bit_grey_is_scaled_instead_of_clipped():
    image = Image.fromarray(np.full((16, 16), 128 << 8, dtype=np.uint16))
    assert prepare(image, spec_for(shape=(1, 16, 16)), None).unique().tolist() == [128]


def test_tensors_and_pil_images_are_cut_alike():
    pixels = torch.nn.functional.interpolate(small_images(1, 6).images, size=(90, 120), mode="bilinear")[0]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    spec = spec_for(shape=(3, 40, 40), crop="resized")
    for position in range(5):
        cuts = [prepare(each, spec, sample_rng(0, 0, position)).float() for each in (pixels, image)]
        assert (cuts[0] - cuts[1]).abs().mean() < 1


# --- which source


def bundle_for(train: Dataset, **changes) -> DataBundle:
    settings = {
        "num_classes": 7,
        "class_names": None,
        "image_shape": (3, 16, 16),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    return DataBundle(train, None, **{**settings, **changes})


def test_digits_stay_on_the_device():
    config = TrainConfig(dataset="digits", device="cpu")
    data = build_data(config)
    assert isinstance(make_source(data.train, data, config, "cpu", train=True), ResidentSource)


def test_data_above_the_limit_is_loaded_by_workers():
    data = small_images()
    config = TrainConfig(num_workers=0, device="cpu")
    at_limit, above = (
        make_source(data, bundle_for(data), config, "cpu", train=True, resident_limit_bytes=limit)
        for limit in (90 * 768, 90 * 768 - 1)
    )
    assert (type(at_limit), type(above)) == (ResidentSource, WorkerSource)
    assert_equal(take_all(at_limit, []), take_all(above, []))


def test_a_folder_of_small_jpegs_is_decoded_once_and_says_how_long_it_took(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("acmds_optimizer.engine.data.SLOW_DECODE_S", 0.0)
    pixels = small_images(20, 24).images
    for number, image in enumerate(pixels):
        (tmp_path / "xy"[number % 2]).mkdir(exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / "xy"[number % 2] / f"{number:02}.png")
    config = TrainConfig(dataset=str(tmp_path), num_workers=1, val_fraction=0, device="cpu")
    data = build_data(config)
    with caplog.at_level(logging.INFO):
        source = make_source(data.train, data, config, "cpu", train=True)
    assert isinstance(source, ResidentSource)
    assert "decoded 20 images of (3, 24, 24) in" in caplog.text
    assert torch.equal(source.images, torch.cat([pixels[0::2], pixels[1::2]]))
    assert source.targets.tolist() == [0] * 10 + [1] * 10


def test_an_odd_sized_image_among_small_ones_is_brought_to_their_size(tmp_path):
    for number in range(200):
        (tmp_path / "xy"[number % 2]).mkdir(exist_ok=True)
        size = (40, 30) if number == 1 else (24, 24)  # file 1 of 200 is not among the sampled headers
        Image.new("RGB", size).save(tmp_path / "xy"[number % 2] / f"{number:03}.png")
    config = TrainConfig(dataset=str(tmp_path), num_workers=0, val_fraction=0, device="cpu")
    data = build_data(config)
    data.train.sample_sizes = lambda: [(24, 24)]
    assert make_source(data.train, data, config, "cpu", train=True).images.shape == (200, 3, 24, 24)


def test_stored_images_are_brought_to_another_image_size():
    config = TrainConfig(dataset="digits", image_size=16, num_workers=0, device="cpu")
    data = build_data(config)
    source = make_source(data.val, data, config, "cpu", train=False)
    assert isinstance(source, ResidentSource)
    assert source.images.shape == (179, 1, 16, 16)


@pytest.mark.parametrize(("train", "augment"), [(False, True), (True, False)])
def test_validation_and_augment_false_are_never_augmented(train, augment):
    data = small_images()
    source = make_source(data, bundle_for(data), TrainConfig(augment=augment, device="cpu"), "cpu", train=train)
    assert torch.equal(take_all(source, [], augment=True).inputs, take_all(source, [], augment=False).inputs)


def test_a_plain_tensor_data_set_is_passed_through_whatever_its_shape():
    inputs = torch.randn(90, 5)
    source = make_source(TensorDataset(inputs, torch.arange(90) % 3), None, CurriculumConfig(), "cpu", train=True)
    assert isinstance(source, ResidentSource)
    batch = take_all(source, [4])
    assert torch.equal(batch.inputs, inputs[ORDER])
    assert batch.targets.tolist() == (ORDER % 3).tolist()


def test_plain_uint8_data_is_scaled_to_0_to_1_at_its_size():
    images = small_images(90, 80).images
    source = make_source(TensorDataset(images, torch.arange(90) % 3), None, CurriculumConfig(), "cpu", train=True)
    assert torch.equal(take_all(source, []).inputs, images[ORDER] * (1 / 255))


def test_a_subset_of_stored_data_stays_on_the_device():
    data = small_images()
    source = make_source(Subset(data, [3, 1]), bundle_for(data), TrainConfig(device="cpu"), "cpu", train=False)
    assert isinstance(source, ResidentSource)
    assert torch.equal(source.images, data.images[[3, 1]])


def test_data_with_its_own_code_is_read_anew_each_epoch():
    class Counting(Dataset):
        targets = tuple(range(4))

        def __init__(self):
            self.reads = 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.reads += 1
            return torch.zeros(3, 16, 16, dtype=torch.uint8), index

    data = Counting()
    source = make_source(data, bundle_for(data), TrainConfig(num_workers=0, device="cpu"), "cpu", train=True)
    for epoch in range(3):
        source.stream(np.arange(4), epoch=epoch).take(4)
    assert data.reads == 12


def test_labels_that_are_no_class_numbers_are_refused():
    data = TensorDataset(torch.randn(4, 2), torch.randn(4))
    with pytest.raises(DataError, match="a label must be one class number, but it is float32"):
        make_source(data, None, TrainConfig(num_workers=0, device="cpu"), "cpu", train=True)


def test_workers_are_none_in_a_process_that_may_not_start_any(monkeypatch, caplog):
    monkeypatch.setattr(multiprocessing, "current_process", lambda: type("Process", (), {"daemon": True}))
    with caplog.at_level("WARNING", logger=decode.logger.name):
        assert decode.resolve_workers(3) == 0
    assert "may not start workers" in caplog.text


@pytest.mark.parametrize(("cores", "processes"), [(1, 0), (2, 1), (6, 5), (16, 8)])
def test_workers_leave_one_core_free_and_stop_at_eight(monkeypatch, cores, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert decode.resolve_workers(None) == processes


@pytest.mark.gpu
def test_a_batch_on_cuda_equals_the_one_on_the_cpu(photos):
    data = small_images()
    first = take_all(ResidentSource(data.images, data.targets, spec_for(), CPU, augment=True), [7])
    for channels_last in (False, True):
        source = ResidentSource(data.images, data.targets, spec_for(), torch.device("cuda"), True, channels_last)
        assert source.images.is_contiguous(memory_format=LAYOUTS[channels_last])
        second = take_all(source, [7])
        assert second.inputs.is_cuda
        assert torch.allclose(first.inputs, second.inputs.cpu(), atol=1e-6)


@pytest.mark.gpu
def test_taking_a_resident_batch_does_not_wait_for_the_gpu():
    data = small_images()
    source = ResidentSource(data.images, data.targets, spec_for(), torch.device("cuda"), augment=True)
    with source.stream(ORDER, epoch=0, augment=True) as stream:
        stream.take(8)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stream.take(16)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_workers_feed_cuda_the_same_photos(photos):
    config = TrainConfig(dataset=str(photos), image_size=72, val_fraction=0, num_workers=2, seed=5)
    data = build_data(config)
    on_gpu = make_source(data.train, data, config, "cuda", train=True)
    try:
        gpu = take_all(on_gpu, [7, 30])
    finally:
        on_gpu.close()
    assert torch.allclose(gpu.inputs.cpu(), take_all(photo_source(photos, 0), [9]).inputs, atol=1e-6)


def test_a_folder_is_decoded_once_for_all_runs_until_it_changes(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number, 0, 200)).save(tmp_path / "images" / name / f"{number}.png")
    decoded = []

    def decode_all(*each):
        decoded.append(each)
        return decode.decode_all(*each)

    monkeypatch.setattr(data_module, "decode_all", decode_all)

    def pixels():
        config = TrainConfig(
            dataset=str(tmp_path / "images"), image_size=8, num_workers=0, val_fraction=0.0,
            decoded_cache=str(tmp_path / "cache"),
        )  # fmt: skip
        bundle = build_data(config)
        return make_source(bundle.train, bundle, config, "cpu", train=True).images

    first = pixels()
    assert torch.equal(first, pixels())
    assert len(decoded) == 1
    Image.new("RGB", (8, 8), (0, 250, 0)).save(tmp_path / "images" / "a" / "0.png")
    assert not torch.equal(first, pixels())
    assert len(decoded) == 2
    for path in (tmp_path / "cache").glob("*.npy"):
        path.write_bytes(b"not an array")
    assert pixels().shape == first.shape
    assert len(decoded) == 3


@pytest.mark.parametrize("broken", ["empty", "a link to nowhere"])
def test_a_label_that_came_with_the_next_image_is_kept_with_the_decoded_images(broken, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number, 0, 200)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "a" / "2.png").unlink()
    if broken == "empty":
        (tmp_path / "images" / "a" / "2.png").touch()
    else:
        (tmp_path / "images" / "a" / "2.png").symlink_to("nowhere")

    def targets(broken_images):
        config = TrainConfig(
            dataset=str(tmp_path / "images"), image_size=8, num_workers=0, val_fraction=0.0,
            decoded_cache=str(tmp_path / "cache"), broken_images=broken_images,
        )  # fmt: skip
        bundle = build_data(config)
        return make_source(bundle.train, bundle, config, "cpu", train=True).targets.tolist()

    assert [targets("skip"), targets("skip")] == [[0, 0, 1, 1, 1, 1]] * 2
    with pytest.raises(DataError, match=r"2\.png: cannot be read"):
        targets("error")
