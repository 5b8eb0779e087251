"""What only a CUDA card can show. Run with: pytest -m gpu"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from acmds_optimizer import ACMDSTrainer, CurriculumConfig, TrainConfig
from acmds_optimizer.engine.prepare import build_optimizer
from acmds_optimizer.memory.device import CudaMemory, open_memory
from acmds_optimizer.memory.undo import create_optimizer_state
from acmds_optimizer.zoo.models import build_model

pytestmark = pytest.mark.gpu

GIB = 2**30


def make(count: int = 4096, **settings: Any) -> ACMDSTrainer:
    torch.manual_seed(0)
    model = build_model("resnet18", 10, image_size=32)
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
    )
    settings = {"memory_limit_gb": 8.0, "target_headroom_gb": 1.0, "max_batch_size": 256} | settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return ACMDSTrainer(model, dataset, optimizer, CurriculumConfig(**settings), "cuda")


@pytest.fixture(autouse=True)
def _nothing_is_left_by_the_test_before():
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_fused_step_of_two_groups_allocates_nothing(kind):
    model = build_model("resnet18", 10, image_size=32).cuda()
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind))
    create_optimizer_state(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def losses(trainer: ACMDSTrainer, epochs: int = 2) -> list[float]:
    with trainer:
        return [trainer.train_epoch()["epoch_loss"] for _ in range(epochs)]


@pytest.mark.parametrize("precision", [{"enable_amp": False}, {"amp_dtype": "bf16"}, {"amp_dtype": "fp16"}])
@pytest.mark.parametrize("micro_batch", [256, 96])
def test_graphs_give_the_losses_of_eager_mode(precision, micro_batch):
    settings = precision | {"min_batch_size": micro_batch, "max_batch_size": micro_batch, "effective_batch_size": 256}
    graphed = make(enable_cuda_graphs=True, **settings)
    with graphed:
        with_graphs = [graphed.train_epoch()["epoch_loss"] for _ in range(2)]
        assert graphed.train_step.graphs is not None
        assert graphed.train_step.graphs.largest > 0, "something was captured"
    assert with_graphs == pytest.approx(losses(make(**settings)), rel=0.02)


def test_layers_that_are_frozen_and_trained_in_turn_learn_with_graphs_what_they_do_without():
    found = []
    for graphs in (True, False):
        trainer = make(enable_cuda_graphs=graphs, enable_amp=False, min_batch_size=256)
        layer, last = (trainer.model.get_submodule(name) for name in ("layer1", "fc"))
        with trainer:
            layer.requires_grad_(False)
            epochs = [trainer.train_epoch()["epoch_loss"]]
            layer.requires_grad_(True)
            last.requires_grad_(False)
            # not detached, they would keep nodes of the autograd graph alive, which no capture can use
            before = [parameter.detach().clone() for parameter in (*layer.parameters(), *last.parameters())]
            epochs += [trainer.train_epoch()["epoch_loss"] for _ in range(2)]
            after = [*layer.parameters(), *last.parameters()]
            assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False] * 12 + [True] * 2
            if graphs:
                assert trainer.train_step.graphs is not None
                assert trainer.train_step.graphs.largest > 0, "something was captured again"
        found.append(epochs)
    assert found[0][:2] == pytest.approx(found[1][:2], rel=0.02), "in the third they learn the labels by heart"


class _Asks(nn.Module):
    """Asks the GPU for a number, as no graph can."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum().item() != 0.5 else -inputs


class _Refuses(nn.Module):
    """Raises an error of its own, after which the capture can be ended in order."""

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while a graph is captured")
        return inputs


class _Keeps(nn.Module):
    """Counts in a list, as no replay would."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps.append(len(inputs))
        return inputs


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(_Asks, "CUDA error"), (_Refuses, "not while a graph"), (_Keeps, "it changes an attribute")],
)
def test_a_model_that_cannot_be_captured_trains_without_and_leaves_nothing_behind(layer, reason):
    torch.zeros(1, device="cuda")
    reserved = torch.cuda.memory_reserved()
    found = []
    for graphs in (True, False):
        trainer = make(enable_cuda_graphs=graphs, min_batch_size=256, enable_amp=False)
        trainer.model.fc = nn.Sequential(layer(), nn.Dropout(0.1), trainer.model.get_submodule("fc"))
        found.append(losses(trainer))
        if graphs:
            assert trainer.train_step.graphs is not None
            assert reason in trainer.train_step.graphs.off_reason
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
            assert torch.cuda.memory_reserved() - reserved < 64 * 2**20, "the pool is gone"
    assert found[0] == pytest.approx(found[1], rel=0.02)
    # the allocator still gives cached blocks back where memory is short
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * GIB) / torch.cuda.mem_get_info()[1])
    try:
        block = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        del block
        torch.empty(GIB + GIB // 2, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    again = make(enable_cuda_graphs=True, min_batch_size=256)
    with again:
        again.train_epoch()
        assert again.train_step.graphs is not None
        assert again.train_step.graphs.largest == 256, "another model is captured as ever"


def test_the_headroom_is_kept_by_graphs():
    trainer = make(enable_cuda_graphs=True, max_batch_size=4096, batch_policy="free", memory_limit_gb=4.0, count=40_000)
    losses(trainer, 3)
    outcome = trainer.recorder.outcome(seconds=0.0, epochs=3)
    # an odd last batch runs eager, beside the pool of the graphs
    assert outcome.headroom_breach_fraction is not None
    assert outcome.headroom_breach_fraction < 0.1
    assert outcome.batch_size_mean is not None
    assert outcome.batch_size_mean > 256


def squeeze(trainer: ACMDSTrainer, limit_gb: float) -> None:
    """What a neighbour leaves: the cap of the process moves, and what it has cached goes."""
    memory = trainer.controller.memory
    assert isinstance(memory, CudaMemory)
    memory._limit_bytes = int(limit_gb * GIB)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(memory._limit_bytes / total)
    memory.release_cache()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_a_neighbour_in_the_same_card_is_made_room_for(graphs, amp_dtype):
    trainer = make(
        enable_cuda_graphs=graphs, amp_dtype=amp_dtype, batch_policy="free", max_batch_size=4096, memory_limit_gb=6.0,
        count=30_000,
    )  # fmt: skip
    with trainer:
        trainer.train_epoch()
        alone = trainer.controller.batch_size
        squeeze(trainer, 2.5)
        trainer.train_epoch()
        squeezed = trainer.controller.batch_size
        squeeze(trainer, 6.0)
        for _ in range(3):
            trainer.train_epoch()
        assert squeezed < alone
        assert trainer.controller.batch_size > squeezed
        assert torch.equal(trainer.dataset.scores.count, torch.full((30_000,), 5, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_a_real_error_on_the_card_loses_no_sample(amp_dtype):
    # a graph that is captured already would take nothing from the allocator
    trainer = make(amp_dtype=amp_dtype, min_batch_size=64, enable_cuda_graphs=False, count=2048)
    with trainer:
        first = trainer.train_epoch()["epoch_loss"]
        reading = trainer.controller.reading
        needed = reading.peak_allocated_bytes - reading.allocated_bytes
        # without a word to the controller, which reads it only after the error
        squeeze(trainer, (reading.allocated_bytes + needed / 2) / GIB)
        trainer.train_epoch()
        squeeze(trainer, 8.0)
        last = trainer.train_epoch()["epoch_loss"]
        assert trainer.recorder.figures["oom_events"] > 0
        assert torch.equal(trainer.dataset.scores.count, torch.full((2048,), 3, dtype=torch.int32, device="cuda"))
        # the losses themselves cannot be compared: BatchNorm sees other micro-batches
        assert last < first


def test_reading_the_device_costs_microseconds():
    import time

    memory = open_memory("cuda")
    torch.zeros(1, device="cuda")
    memory.read()
    began = time.perf_counter()
    for _ in range(1000):
        memory.read()
        memory.reset_peak()
    assert (time.perf_counter() - began) / 1000 < 200e-6


def stepped(trainer: ACMDSTrainer, sizes: list[int]) -> list[float]:
    """Mean losses of steps over the same 256 samples, in micro-batches of these sizes, with a changing rate."""
    with trainer:
        trainer.sampler.set_epoch(0, 0.0)
        plan = trainer.sampler.plan
        with trainer.source.stream(plan.order, plan.weights, epoch=0) as stream:
            batch = stream.take(256)
        found = []
        for number, size in enumerate(sizes):
            trainer.optimizer.param_groups[0]["lr"] = 1e-3 * (1.0 - number / len(sizes))
            result = trainer.guard.run(lambda micro: trainer.train_step(batch, micro), size)
            found.append(result.value.mean())
        return torch.stack(found).tolist()


@pytest.mark.parametrize(("amp", "tolerance"), [({"enable_amp": False, "enable_tf32": False}, 2e-3), ({}, 0.05)])
def test_200_steps_by_graphs_follow_eager_ones_while_the_size_and_the_rate_change(amp, tolerance):
    sizes = [256] * 40 + [128] * 40 + [64] * 40 + [128] * 40 + [256] * 40
    settings = {"amp_dtype": "bf16"} | amp
    graphed = make(enable_cuda_graphs=True, **settings)
    with_graphs = stepped(graphed, sizes)
    assert graphed.train_step.graphs is not None
    assert graphed.train_step.graphs.captures >= 4, "three sizes and the optimizer"
    eager = stepped(make(enable_cuda_graphs=False, **settings), sizes)
    assert with_graphs == pytest.approx(eager, rel=tolerance, abs=tolerance)


def test_a_setting_that_changes_is_captured_again():
    trainer = make(enable_cuda_graphs=True, min_batch_size=256)
    with trainer:
        trainer.train_epoch()
        graphs = trainer.train_step.graphs
        assert graphs is not None
        before = graphs.captures
        trainer.optimizer.param_groups[0]["weight_decay"] = 0.5
        trainer.train_epoch()
        assert graphs.captures == before + 1


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(graphs, amp_dtype):
    trainer = make(20_000, enable_cuda_graphs=graphs, amp_dtype=amp_dtype, min_batch_size=128, max_batch_size=128)
    with trainer:

        def hot() -> bool:
            torch.cuda.set_sync_debug_mode("error" if 30 <= trainer.step < 140 else "default")
            return False

        trainer.should_stop = hot
        try:
            trainer.train_epoch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert trainer.step > 140


def test_graphs_turn_themselves_on_where_launches_are_what_takes_time():
    trainer = make(20_000, min_batch_size=64, max_batch_size=64, amp_dtype="bf16")
    with trainer:
        trainer.train_epoch()
        assert trainer.train_step.graphs is not None
        assert trainer.train_step.graphs.largest == 64


def test_graphs_stay_off_where_the_card_is_busy():
    trainer = make(20_000, min_batch_size=2048, max_batch_size=2048, enable_amp=False, enable_tf32=False)
    with trainer:
        for _ in range(3):
            trainer.train_epoch()
        assert trainer.train_step.graphs is not None
        assert trainer.train_step.graphs.largest == 0
