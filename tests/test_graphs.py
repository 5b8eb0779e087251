"""What a run with CUDA graphs does where nothing is captured; what is captured is in test_gpu.py."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acmds_optimizer import CurriculumConfig, Guard, MemoryPressureController
from acmds_optimizer.engine.batches import Batch
from acmds_optimizer.engine.graphs import GraphedMicroBatches
from acmds_optimizer.engine.loss import TrainingLoss
from acmds_optimizer.engine.replayable import can_be_captured
from acmds_optimizer.engine.step import StepClock, Timing, TrainStep
from acmds_optimizer.memory.device import BudgetedCpuMemory, MemoryReading


class Net(nn.Module):
    """One layer is never used, another only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.both = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs) + (self.sometimes(inputs) if self.both else 0.0)


def step_of(cuda_graphs: bool) -> tuple[Net, TrainStep]:
    torch.manual_seed(0)
    model = Net()
    controller = MemoryPressureController("cpu", CurriculumConfig(memory_limit_gb=1, target_headroom_gb=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    step = TrainStep(model, Guard(model, optimizer, controller), TrainingLoss(), cuda_graphs=cuda_graphs)
    if step.graphs is not None:
        step.graphs._is_due = lambda size: False  # type: ignore[method-assign]  # there is nothing to capture with
        step.graphs._optimizer_eager = True
    return model, step


def train(step: TrainStep, number: int, micro_batch: int) -> None:
    """One guarded step, and what the trainer does after it."""
    step.guard.run(lambda micro: step(batch_of(8, number), micro), micro_batch)
    step.guard.zero_grad()


def batch_of(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator),
        torch.arange(count), torch.ones(count),
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_gradients_in_fixed_buffers_train_as_fresh_ones_do_and_leave_unused_parameters_alone(micro_batch):
    weights = []
    for cuda_graphs in (False, True):
        model, step = step_of(cuda_graphs)
        for number in range(6):
            train(step, number, micro_batch)
            if number == 2 and step.graphs is not None:
                step.graphs._fix_gradients()  # as the first capture does
                where = [p.grad.data_ptr() for p in model.used.parameters() if p.grad is not None]
        weights.append([value.clone() for value in model.parameters()])
        torch.manual_seed(0)
        assert torch.equal(model.never.weight, Net().never.weight), "decay is for what was trained"
    assert [p.grad.data_ptr() for p in model.used.parameters() if p.grad is not None] == where
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_gradients_of_other_processes_are_dropped_after_a_step_without_samples_of_its_own():
    _, step = step_of(True)
    train(step, 0, 8)
    assert step.graphs is not None
    step.graphs._fix_gradients()
    train(step, 1, 8)
    for gradient in step.graphs._gradients:
        gradient.add_(1.0)  # as the sum over all processes does
    step.guard.finish(step.update)
    step.guard.zero_grad()
    assert all((gradient == 0).all() for gradient in step.graphs._gradients)


def test_a_capture_in_the_midst_of_a_step_keeps_what_was_added_up():
    weights = []
    for cuda_graphs in (False, True):
        _, step = step_of(cuda_graphs)
        train(step, 0, 4)
        if step.graphs is not None:
            eager, graphs = step.graphs._step.backward, step.graphs

            def fixing(*arguments: Any, eager: Any = eager, graphs: Any = graphs) -> Tensor:
                losses: Tensor = eager(*arguments)
                graphs._fix_gradients()  # after the first of the two parts
                return losses

            step.backward = fixing  # type: ignore[method-assign, assignment]
        train(step, 1, 4)
        train(step, 2, 4)
        weights.append([value.clone() for value in step.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("first", [False, True])
def test_a_model_that_uses_other_parameters_from_step_to_step_is_never_captured_and_trains_the_same(first):
    weights = []
    for cuda_graphs in (False, True):
        model, step = step_of(cuda_graphs)
        for number in range(6):
            model.both = (number % 2 == 1) != first
            train(step, number, 4)
        weights.append([value.clone() for value in model.parameters()])
    assert step.graphs is not None
    assert "changes from step to step" in step.graphs.off_reason
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_parameter_that_is_used_only_after_a_capture_turns_graphs_off_with_its_gradient_kept():
    weights = []
    for cuda_graphs in (False, True):
        model, step = step_of(cuda_graphs)
        for number in range(6):
            model.both = number >= 3
            train(step, number, 4)
            if number == 2 and step.graphs is not None:
                step.graphs._fix_gradients()
        weights.append([value.clone() for value in model.parameters()])
    assert step.graphs is not None
    assert step.graphs.off_reason
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def captures(step: TrainStep) -> None:
    """Have micro-batches captured, as far as that goes without CUDA: what is recorded runs, and adds no gradient."""
    assert step.graphs is not None
    step.graphs._is_due = lambda size: True  # type: ignore[method-assign]

    def record(run: Any, what: str = "model") -> tuple[Any, Tensor]:
        gradients = [None if p.grad is None else p.grad.clone() for p in step.model.parameters()]
        losses = run()
        for parameter, gradient in zip(step.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return SimpleNamespace(replay=lambda: None), losses

    step.graphs._record = record  # type: ignore[method-assign]


def count(model: Net) -> None:
    vars(model)["steps"] = vars(model).get("steps", 0) + 1


def append(model: Net) -> None:
    vars(model).setdefault("means", []).append(1.0)


def keep_nested(model: Net) -> None:
    kept = vars(model).setdefault("kept", {"of": {"steps": 0}, "itself": []})
    kept["itself"] = kept
    kept["of"]["steps"] += 1


def keep_tensor(model: Net) -> None:
    vars(model).setdefault("outputs", deque(maxlen=1)).append(torch.ones(2))


def keep_the_same(model: Net) -> None:
    vars(model).setdefault("positions", {8: torch.ones(2)})


def average(model: Net) -> None:
    model.register_buffer("mean", getattr(model, "mean", torch.zeros(())) + 1.0)


def average_in_place(model: Net) -> None:
    if not hasattr(model, "mean"):
        model.register_buffer("mean", torch.zeros(()))
    model.get_buffer("mean").add_(1.0)


@pytest.mark.parametrize(
    ("besides", "reason"),
    [
        (lambda _: random.random(), "it draws random numbers on the host"),
        (lambda _: np.random.rand(), "it draws random numbers on the host"),  # noqa: NPY002
        (lambda _: torch.rand(()), "it draws random numbers on the host"),
        (count, "it changes an attribute"),
        (append, "it changes an attribute"),
        (keep_nested, "it changes an attribute"),
        (keep_tensor, "it changes an attribute"),
        (keep_the_same, ""),
        (average, "it puts another tensor in the place of one that it keeps"),
        (average_in_place, ""),
    ],
)
def test_a_model_whose_forward_pass_does_more_than_a_replay_would_is_not_replayed(besides, reason):
    class More(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            besides(self)
            return super().forward(inputs)

    model, step = step_of(True)
    model.__class__ = More
    train(step, 0, 8)
    captures(step)
    train(step, 1, 8)
    assert step.graphs is not None
    assert step.graphs.off_reason == (f"{reason}, which a replay would not" if reason else "")
    assert step.graphs.largest == (0 if reason else 8)


def test_a_hook_is_called_in_every_step_and_those_of_torch_are_replayed():
    model, step = step_of(True)
    torch.nn.utils.spectral_norm(model.used)
    train(step, 0, 8)
    captures(step)
    train(step, 1, 8)
    assert step.graphs is not None
    assert step.graphs.largest == 8
    calls: list[int] = []
    model.used.register_forward_hook(lambda *_: calls.append(1))
    step.graphs.forget()
    for number in range(2, 5):
        train(step, number, 8)
    assert step.graphs.off_reason == "used has a hook, which a replay would not call"
    assert len(calls) == 3


def test_a_model_whose_attributes_have_changed_is_captured_anew():
    model, step = step_of(True)
    assert step.graphs is not None
    kept = []
    for both in (False, False, True, True, False):
        model.both = both
        step.graphs._graphs = {8: cast(Any, None)}
        step.graphs.begin_epoch()
        kept.append(bool(step.graphs._graphs))
    assert kept == [True, True, False, True, False]


def test_other_parameters_than_before_are_trained_once_that_is_said():
    weights = []
    for cuda_graphs in (False, True):
        model, step = step_of(cuda_graphs)
        model.both = True
        for number in range(9):
            model.sometimes.requires_grad_(number >= 3)
            model.used.requires_grad_(number < 6)
            if number in (0, 3, 6) and step.graphs is not None:
                step.graphs.set_parameters([p for p in model.parameters() if p.requires_grad])
            train(step, number, 4)
            if number in (2, 5, 8) and step.graphs is not None:
                step.graphs._fix_gradients()
        weights.append([value.clone() for value in model.parameters()])
    assert step.graphs is not None
    assert not step.graphs.off_reason
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("captured", "decided", "micro_batch", "odd", "kept"),
    [
        (300, 512, 300, True, True),  # all samples there are, or all of this process: never more than 300 at once
        (300, 512, 512, False, False),  # 512 is about to be warmed up, and asks for the pool's memory
        (512, 512, 300, True, True),
        (512, 256, 256, False, True),
    ],
)
def test_graphs_are_dropped_for_a_larger_size_that_is_to_run_not_for_one_that_was_only_decided(
    captured, decided, micro_batch, odd, kept
):
    _, step = step_of(True)
    assert step.graphs is not None
    controller = step.guard.controller
    controller.observe(512, excess_bytes=2**20)
    step.graphs._graphs = {captured: cast(Any, None)}
    decision = dataclasses.replace(controller.decide(), batch=decided, reason="hold")
    assert step.graphs.make_room(decision, micro_batch, 1.0, odd=odd) == micro_batch
    assert bool(step.graphs._graphs) == kept


class Scripted(BudgetedCpuMemory):
    """A card whose reading is what the test says, in bytes."""

    def __init__(self) -> None:
        super().__init__(10_000)
        self.reading = MemoryReading(10_000, 0, 0, 0, 0, 0, 0)

    def read(self) -> MemoryReading:
        return self.reading

    def step(self, *, base: int, peak: int, reserved: int) -> None:
        self.reading = MemoryReading(self.total_bytes, base, reserved, peak, reserved, 0, 0)


def test_a_replayed_step_counts_all_that_is_reserved_and_an_eager_one_beside_the_pool_does_not():
    memory = Scripted()
    config = CurriculumConfig(min_batch_size=1, max_batch_size=512, target_headroom_gb=1000 / 2**30)
    controller = MemoryPressureController(memory=memory, config=config)
    memory.step(base=1000, peak=3000, reserved=3200)
    controller.observe(64)  # eager: a tenth more is reserved than was allocated between steps and peak
    eager = controller.state.peaks.predict(64)
    assert eager == pytest.approx(1000 + 2000 * 1.1)
    memory.step(base=1100, peak=1200, reserved=3900)
    controller.observe(64, excess_bytes=2000)
    assert controller.reading.peak_allocated_bytes == 3100
    ratio = controller._reserved_ratio
    assert controller.state.peaks.predict(64) > eager + 100
    assert controller._pool_ratio == pytest.approx(2800 / 2000)
    # an odd last batch: its own 400 bytes are reserved beside the 2,800 of the pool
    controller._highest_allocated = 0
    memory.step(base=1100, peak=1500, reserved=1100 + 2800 + 400)
    controller.observe(8, pool_bytes=2800)
    assert controller._reserved_ratio == pytest.approx(ratio + 0.3 * (1.0 - ratio))
    assert controller.state.peaks.predict(8) == pytest.approx(1100 + 400 * 1.4), "what it would need as a graph"
    controller.observe(4)
    assert controller.state.peaks.predict(4) == pytest.approx(1100 + 400 * controller._reserved_ratio)


def test_how_much_more_is_reserved_than_allocated_is_learned_anew_from_a_step_twice_as_large():
    memory = Scripted()
    controller = MemoryPressureController(memory=memory, config=CurriculumConfig(target_headroom_gb=1000 / 2**30))
    memory.step(base=1000, peak=1100, reserved=1150)
    controller.observe(1)
    assert controller._reserved_ratio == 1.5, "much of a small step is what blocks are rounded up by"
    memory.step(base=1000, peak=1190, reserved=1190)
    controller.observe(2)
    assert controller._reserved_ratio == pytest.approx(1.35)
    memory.step(base=1000, peak=3000, reserved=3020)
    controller.observe(20)
    assert controller._reserved_ratio == pytest.approx(1.01)


def test_a_replay_in_a_pool_of_larger_graphs_counts_what_a_pool_of_its_own_would_need():
    memory = Scripted()
    config = CurriculumConfig(min_batch_size=1, max_batch_size=512, target_headroom_gb=1000 / 2**30)
    controller = MemoryPressureController(memory=memory, config=config)
    memory.step(base=1000, peak=1100, reserved=1000 + 5600)
    controller.observe(64, excess_bytes=4000)
    assert controller.state.peaks.predict(64) == 6600
    controller.observe(8, excess_bytes=500, pool_bytes=5600)
    assert controller.state.peaks.predict(8) == pytest.approx(1000 + 500 * 1.4)
    assert controller._pool_ratio == pytest.approx(1.4)


@pytest.mark.parametrize(("graphs", "scaled", "captured"), [(0, False, 0), (0, True, 1), (1, False, 1)])
def test_the_optimizer_is_captured_beside_a_graph_or_with_a_scaler(graphs, scaled, captured):
    _, step = step_of(True)
    assert step.graphs is not None
    step.graphs._optimizer_eager = False
    step.graphs._used = (True,)
    step.graphs._graphs = {8: cast(Any, None)} if graphs else {}
    step.guard.scaler = cast(Any, object()) if scaled else None
    step.graphs._fix_gradients = lambda: None  # type: ignore[method-assign]
    asked: list[Any] = []
    step.graphs._capture_optimizer = asked.append  # type: ignore[method-assign, assignment]
    assert not any(step.graphs.optimizer_step() for _ in range(6))
    assert len(asked) == captured


def test_an_odd_last_batch_is_not_captured_however_many_epochs_there_are():
    _, step = step_of(True)
    graphs = step.graphs
    assert graphs is not None
    del graphs._is_due
    captured: list[int] = []
    graphs._capture = lambda part, total: captured.append(len(part))  # type: ignore[method-assign]
    step.guard.controller.observe(8)
    decision = step.guard.controller.decide()
    for _ in range(8):
        for size, odd in ((8, False), (3, True)):
            graphs.make_room(decision, size, 1.0, odd=odd)
            step.guard.run(lambda micro: step(batch_of(micro, 0), micro), size)
            step.guard.zero_grad()
    assert set(captured) == {8}


def test_a_graph_that_does_not_pay_goes_with_that_of_the_part_that_is_one_sample_shorter():
    _, step = step_of(True)
    graphs = step.graphs
    assert graphs is not None
    graphs._only_if_faster = True
    graphs._graphs = {683: cast(Any, None), 682: cast(Any, None), 64: cast(Any, None)}
    for replayed, seconds in ((False, 0.1), (True, 0.099)):
        for _ in range(5):
            graphs.timed(Timing(683, seconds, replayed=replayed))
    assert list(graphs._graphs) == [64]


def undecided() -> GraphedMicroBatches:
    """Graphs that are kept where they are faster, and micro-batches of 64 that were used often enough for one."""
    _, step = step_of(True)
    graphs = step.graphs
    assert graphs is not None
    del graphs._is_due
    graphs._only_if_faster, graphs._used = True, (True,)
    graphs._uses[64] = 100
    return graphs


@pytest.mark.parametrize(
    ("waits", "due"),
    [
        ([True, True], False),  # too few to tell
        ([True, True, False], True),
        ([True, False, False, True], False),
        ([True] * 16 + [False] * 9, False),  # the newest sixteen count, so a host that becomes slow is noticed
        ([False] * 300 + [True] * 9, True),
    ],
)
def test_a_size_is_captured_where_the_gpu_waited_for_the_host_in_most_of_its_newest_steps(waits, due):
    graphs = undecided()
    graphs._launches.append(0.01)
    for waited in waits:
        graphs.timed(Timing(64, 0.1, waited=waited))
    assert graphs._is_due(64) is due


@pytest.mark.parametrize(
    ("launches", "due"), [([0.3, 0.041], True), ([0.3, 0.039], False), ([0.001, *[0.041] * 64], True)]
)
def test_a_size_is_captured_where_its_steps_take_little_longer_than_their_launch(launches, due):
    graphs = undecided()
    graphs._launches.extend(launches)
    for _ in range(5):
        graphs.timed(Timing(64, 0.1, waited=False))
    assert graphs._is_due(64) is due


def test_launches_of_eager_micro_batches_are_timed():
    _, step = step_of(True)
    for number in range(3):
        train(step, number, 4)
    assert step.graphs is not None
    assert len(step.graphs._launches) == 6, "two parts a step"
    assert min(step.graphs._launches) > 0.0


@pytest.mark.parametrize(("launch_s", "due"), [(0.01, False), (0.05, True)])
def test_steps_that_wait_to_learn_of_an_overflow_are_judged_by_their_launch_alone(launch_s, due):
    graphs = undecided()
    graphs._optimizer_eager = False
    graphs._launches.append(launch_s)
    graphs._step.guard.scaler = cast(Any, object())
    for _ in range(5):
        graphs.timed(Timing(64, 0.1, waited=True))
    assert graphs._is_due(64) is due
    graphs._optimizer = cast(Any, object())  # from now on the scaler asks within the graph
    for _ in range(6):
        graphs.timed(Timing(64, 0.1, waited=True))
    assert graphs._is_due(64)


@pytest.mark.parametrize(("replay_s", "kept"), [(0.0985, False), (0.098, True)])
def test_a_graph_is_kept_from_a_gain_of_two_percent_on_over_the_newest_eager_steps(replay_s, kept):
    _, step = step_of(True)
    graphs = step.graphs
    assert graphs is not None
    graphs._only_if_faster = True
    graphs._graphs = {64: cast(Any, None)}
    for seconds in [0.2] * 20 + [0.1] * 9:  # the first use of its kernels was slow
        graphs.timed(Timing(64, seconds))
    for _ in range(5):
        graphs.timed(Timing(64, replay_s, replayed=True))
    assert bool(graphs._graphs) == kept
    assert (64 in graphs._not_faster) != kept


class _Event:
    """A CUDA event that has passed once the GPU has come to it."""

    came_to = 0
    made = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        _Event.made += 1
        self.number = _Event.made

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.number <= _Event.came_to

    def elapsed_time(self, end: Any) -> float:
        return 50.0 * (end.number - self.number)


def test_a_step_has_kept_the_gpu_busy_where_it_had_not_ended_when_the_host_came_to_the_next_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    _Event.made = _Event.came_to = 0
    clock = StepClock(torch.device("cuda"))
    for _ in range(2):  # the first of a size is not counted, so the second ends with the third event
        clock.start()
        clock.stop(64, 2, steady=True)
    assert clock.timings() == []
    clock.start()
    clock.stop(64, 2, steady=True)
    _Event.came_to = _Event.made
    clock.start()
    assert clock.timings() == [Timing(64, 0.025, waited=False), Timing(64, 0.025, waited=True)]
    clock.stop(64, 2, steady=True)
    _Event.came_to = _Event.made
    assert clock.timings() == [Timing(64, 0.025, waited=True)], "before the host came to the next step"


@pytest.mark.parametrize("budget_mb", [3300, 3700, 4100])
def test_a_size_that_needs_more_as_a_graph_than_eagerly_is_not_captured_again_and_again(budget_mb):
    mb, memory = 2**20, Scripted()
    memory.total_bytes = budget_mb * mb
    config = CurriculumConfig(
        min_batch_size=64, max_batch_size=512, target_headroom_gb=1e-4, knee_gain_fraction=0.0, effective_batch_size=512
    )
    controller = MemoryPressureController(memory=memory, config=config)
    uses, captures = 0, 0
    size = 0
    for _ in range(2000):
        before, size = size, controller.decide().batch
        uses = uses + 1 if size == before else 1
        peak = 4 * size * mb  # above 1,000 MB between steps; a tenth more is reserved for it eagerly, 40 % for a replay
        captures += uses == 5
        base = (1090 if uses > 4 else 1000) * mb
        reserved = base + int((1.4 if uses > 4 else 1.1) * peak)
        allocated = base + (0 if uses > 4 else peak)
        memory.step(base=base, peak=allocated, reserved=reserved)
        if uses > 4:
            controller.observe(size, excess_bytes=peak)
        else:
            controller.observe(size, pool_bytes=0)
    assert captures <= 3
    assert size == (512 if budget_mb > 1090 + 1.4 * 4 * 512 else 256)


class _Counting(torch.optim.SGD):
    """What it does besides on the host, a replay would not."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize(("kind", "captured"), [(torch.optim.SGD, True), (torch.optim.AdamW, True), (_Counting, False)])
def test_the_step_of_a_derived_optimizer_is_not_captured(kind, captured):
    assert can_be_captured(kind([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True)) is captured
