"""After an out-of-memory error at any operation, a guarded step leaves no trace of the failed attempt."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.errors import OutOfMemoryForGoodError
from acmds_optimizer.memory.controller import MemoryPressureController
from acmds_optimizer.memory.device import BudgetedCpuMemory
from acmds_optimizer.memory.guard import Guard
from acmds_optimizer.memory.out_of_memory import is_out_of_memory, shortage_bytes
from acmds_optimizer.memory.undo import create_optimizer_state
from acmds_optimizer.zoo.models import build_model


class Tallying(torch.optim.Optimizer):
    """Counts its steps in the groups, as schedule-free ones do, and has a list and a dict in its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "steps": 0})
        self.weight = 1.0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.weight *= 0.9
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(norms=[], moments={"first": torch.zeros_like(p)})
                state["norms"].append(float(p.grad.norm()))
                state["moments"]["first"].mul_(0.9).add_(p.grad)
                share = self.weight * group["lr"] / group["steps"] / len(state["norms"])
                p.add_(state["moments"]["first"], alpha=-share)


def sgd_whose_momentum_comes_later(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)
    create_optimizer_state(optimizer)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    return optimizer


class Bounded(torch.optim.AdamW):
    """A fused step, and then another change of the weights."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)
        return loss


def adamw_whose_hook_changes_weights(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)

    def bound(*_: Any) -> None:
        torch._foreach_mul_([p.data for p in parameters], 0.9)

    optimizer.register_step_post_hook(bound)
    return optimizer


OPTIMIZERS = {
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_two_groups_fused": lambda p: torch.optim.AdamW(
        [{"params": p[:2], "weight_decay": 0.0}, {"params": p[2:]}], lr=0.01, fused=True
    ),
    "sgd_two_groups_fused": lambda p: torch.optim.SGD(
        [{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:]}], lr=0.01, momentum=0.9, nesterov=True, fused=True
    ),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "rmsprop_new_state": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "sgd_momentum_later": sgd_whose_momentum_comes_later,
    "tallying": Tallying,
    "adamw_derived_fused": lambda p: Bounded(p, lr=0.01, fused=True),
    "adamw_hooked_fused": adamw_whose_hook_changes_weights,
}


@pytest.fixture(autouse=True, scope="module")
def _collections_are_quick():
    """Every recovery collects garbage; what the imports have made need not be walked each time."""
    Rig("adamw_foreach").steps(1)  # the first step of a process imports much of PyTorch
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    """Conv, BatchNorm and dropout: the three kinds of state that a naive retry corrupts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 36, 3)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)


class Rig:
    """A model, its optimizer and a guard, in a state that depends on the seed alone."""

    def __init__(self, optimizer: str, amp: bool = False, micro_batches: int = 1) -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        create_optimizer_state(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", enabled=amp, growth_interval=1, init_scale=8.0)
        self.memory = BudgetedCpuMemory(2**30)
        config = CurriculumConfig(target_headroom_gb=0.1, min_batch_size=1, max_batch_size=8)
        self.controller = MemoryPressureController("cpu", config, memory=self.memory)
        self.guard = Guard(self.model, self.optimizer, self.controller, self.scaler)
        self.amp = amp
        self.micro_batches = micro_batches
        self.inputs = torch.randn(8, 1, 8, 8)
        self.targets = torch.randint(0, 3, (8,))

    def attempt(self, micro_batch: int) -> torch.Tensor:
        losses = []
        size = len(self.inputs) // self.micro_batches
        for x, y in zip(self.inputs.split(size), self.targets.split(size), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                loss = nn.functional.cross_entropy(self.model(x).float(), y, reduction="sum") / len(self.inputs)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        result = torch.stack(losses)
        self.guard.optimizer_step()
        return result

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.guard.run(self.attempt, 8)

    def state(self) -> list[torch.Tensor]:
        tensors = [*self.model.state_dict().values(), torch.get_rng_state()]
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                values = [value for _, value in sorted(self.optimizer.state.get(parameter, {}).items())]
                tensors += [torch.as_tensor(leaf) for leaf in tree_leaves(values)]
        if self.amp:
            tensors += [
                torch.tensor(self.scaler.get_scale()),
                torch.tensor(self.scaler.state_dict()["_growth_tracker"]),
            ]
        return [tensor.clone() for tensor in tensors]


def operations_of_a_step(make) -> int:
    rig = make()
    rig.steps(1)
    operations = []
    rig.memory.on_operation = lambda operation: operations.append(operation) if computes(operation) else None
    rig.steps(1)
    return len(operations)


def computes(operation) -> bool:
    """Whether it works on tensors; the profiler's marks pass through the dispatcher too, and allocate nothing."""
    return not str(operation).startswith("profiler.")


def fail_at(rig: Rig, number: int) -> None:
    """Raise the real error just before operation `number` of the next attempt, once."""
    count = itertools.count()

    def strike(operation) -> None:
        if computes(operation) and next(count) == number:
            rig.memory.on_operation = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    rig.memory.on_operation = strike


CASES = [
    *[(name, False, 1) for name in OPTIMIZERS],
    ("adamw_fused", True, 1),
    ("adamw_foreach", True, 1),
    ("adamw_fused", False, 4),
    ("sgd_momentum", True, 2),
]


@pytest.mark.parametrize(("optimizer", "amp", "micro_batches"), CASES)
def test_an_error_at_any_operation_leaves_every_bit_as_if_it_had_not_happened(optimizer, amp, micro_batches):
    def make() -> Rig:
        return Rig(optimizer, amp, micro_batches)

    clean = make()
    clean.steps(3)
    expected = clean.state()
    total = operations_of_a_step(make)
    assert total > 30
    for number in range(total):
        rig = make()
        rig.steps(1)
        fail_at(rig, number)
        rig.guard.run(rig.attempt, 8)
        assert rig.memory.on_operation is None, f"operation {number} of {total} was not reached"
        rig.steps(1)
        for kept, wanted in zip(rig.state(), expected, strict=True):
            assert torch.equal(kept, wanted), f"error at operation {number} of {total}"


@pytest.mark.parametrize(
    ("optimizer", "amp"), [("adamw_two_groups_fused", False), *[(name, True) for name in OPTIMIZERS]]
)
def test_an_error_at_any_operation_of_an_update_whose_gradients_stay_leaves_no_trace(optimizer, amp):
    def updated(strike: Callable[[Rig], None]) -> list[torch.Tensor]:
        rig = Rig(optimizer, amp)
        rig.steps(1)
        rig.guard.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(rig.model(rig.inputs).float(), rig.targets)
        rig.scaler.scale(loss).backward()
        strike(rig)
        rig.guard.finish(rig.guard.optimizer_step)
        rig.memory.on_operation = None
        rig.steps(1)
        return rig.state()

    operations: list[Any] = []
    expected = updated(lambda rig: setattr(rig.memory, "on_operation", operations.append))
    total = sum(map(computes, operations))
    for number in range(total):
        struck = updated(lambda rig, number=number: fail_at(rig, number))  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(struck, expected, strict=True)), f"operation {number} of {total}"


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_error_in_the_first_step_leaves_no_trace(optimizer):
    clean = Rig(optimizer)
    clean.steps(2)
    expected = clean.state()
    for number in range(0, 200, 7):
        rig = Rig(optimizer)
        fail_at(rig, number)
        rig.steps(2)
        assert all(torch.equal(a, b) for a, b in zip(rig.state(), expected, strict=True)), number


@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_two_groups_fused", "sgd_two_groups_fused"])
def test_a_fused_step_allocates_nothing(optimizer):
    rig = Rig(optimizer)
    rig.steps(1)
    for parameter in rig.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    operations = []
    made: list[Any] = []

    def remember(operation) -> None:
        if not str(operation).startswith("profiler."):
            operations.append(str(operation))
            made.extend(result for result in operation._schema.returns if result.alias_info is None)

    rig.memory.on_operation = remember
    rig.memory.neighbour_bytes = rig.memory.total_bytes  # not one more byte is to be had
    assert rig.guard._undo._atomic_step_counts() is not None
    with rig.memory.watch():
        rig.optimizer.step()
    assert sum("_fused_" in name for name in operations) == len(rig.optimizer.param_groups)
    assert made == []


def test_nothing_of_the_failed_attempt_stays_alive():
    rig = Rig("adamw_fused")
    rig.steps(1)
    gc.collect()
    rig.optimizer.zero_grad()
    before = rig.memory.read().allocated_bytes
    rig.memory.neighbour_bytes = rig.memory.total_bytes - before - 10_000
    held = []

    def attempt(micro_batch: int) -> None:
        held.append(rig.memory.read().allocated_bytes)
        rig.model(rig.inputs.repeat(micro_batch, 1, 1, 1))

    with pytest.raises(OutOfMemoryForGoodError):
        rig.guard.run(attempt, 8)
    assert len(held) > 2
    assert set(held) == {before}, "each try starts with the model and the guard's copies, and no more"


def test_the_error_at_micro_batch_1_says_what_to_change():
    rig = Rig("adamw_fused")
    rig.memory.neighbour_bytes = rig.memory.total_bytes - 100
    with pytest.raises(
        OutOfMemoryForGoodError, match=r"one sample.*--gradient-checkpointing.*--memory-limit-gb"
    ) as error:
        rig.guard.run(rig.attempt, 8)
    assert [event.micro_batch for event in error.value.events][-1] == 1
    assert error.value.__context__ is None, "a chained error would keep the failed step's tensors"


def test_tries_are_bounded():
    rig = Rig("adamw_fused")
    rig.controller.config.max_oom_retries = 2
    rig.memory.neighbour_bytes = rig.memory.total_bytes - 100
    with pytest.raises(OutOfMemoryForGoodError, match="3 tries in a row") as error:
        rig.guard.run(rig.attempt, 8)
    assert len(error.value.events) == 3


def test_the_next_try_is_smaller():
    rig = Rig("adamw_fused")
    asked = []

    def attempt(micro_batch: int) -> None:
        asked.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    result = rig.guard.run(attempt, 8)
    assert asked == sorted(asked, reverse=True)
    assert result.micro_batch == asked[-1] <= 2
    assert [event.next_micro_batch for event in result.events] == asked[1:]


@pytest.mark.parametrize(
    "error", [ValueError("bad"), RuntimeError("CUDA error: an illegal memory access"), KeyboardInterrupt()]
)
def test_any_other_error_is_raised_untouched(error):
    rig = Rig("adamw_fused")

    def attempt(_: int) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        rig.guard.run(attempt, 8)
    assert caught.value is error


def test_a_rehearsal_leaves_no_trace_whether_it_fits_or_not():
    rig = Rig("adamw_foreach")
    rig.steps(1)
    before = rig.state()
    assert rig.guard.rehearse(rig.attempt, 8) is None
    rig.memory.neighbour_bytes = rig.memory.total_bytes - 100
    assert rig.guard.rehearse(rig.attempt, 8) is not None
    assert all(torch.equal(a, b) for a, b in zip(rig.state(), before, strict=True))
    assert all(p.grad is None for p in rig.model.parameters())


class Centred(nn.Module):
    """Puts another tensor in the place of a buffer, rather than writing into it; one of them is there only later."""

    centre: torch.Tensor
    largest: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("largest", None)
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(inputs) - self.centre
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        self.largest = outputs.detach().amax(0)
        return outputs


def test_buffers_that_a_model_replaces_are_put_back_too():
    torch.manual_seed(0)
    model = Centred()
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1))
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), controller)
    guard.rehearse(lambda _: model(torch.ones(2, 4)).sum().backward(), 8)
    assert {name: value.tolist() for name, value in model.named_buffers()} == {"centre": [0.0, 0.0, 0.0]}
    model(torch.ones(2, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guard.rehearse(lambda _: model(torch.ones(2, 4)).sum().backward(), 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("micro_batch", "still"), [(1, True), (8, False)])
def test_copies_are_made_on_the_device_again_once_a_step_of_several_samples_fits(micro_batch, still):
    model = nn.Linear(4, 3)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1))
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), controller)
    guard._undo.copy_on_host = True

    def attempt(_: int) -> None:
        model(torch.ones(2, 4)).sum().backward()
        guard.optimizer_step()

    guard.run(attempt, micro_batch)
    assert guard._undo.copy_on_host is still


def test_what_the_user_names_besides_is_put_back_though_a_step_writes_into_its_tensors():
    model = nn.Linear(4, 3)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1))
    seen = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), controller, others=(seen,))
    tries = iter([True, False])

    def attempt(_: int) -> None:
        seen.n_averaged.add_(1)
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    guard.run(attempt, 8)
    assert int(seen.n_averaged) == 1


def test_another_optimizer_is_put_back_after_each_of_several_errors():
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1))
    guard = Guard(model, torch.optim.SGD(model.parameters(), lr=0.1), controller, others=(other, second))

    def steps(errors: int) -> None:
        left = iter(range(errors))

        def attempt(_: int) -> None:
            second.zero_grad()
            other(torch.ones(2, 4)).sum().backward()
            second.step()
            for _ in left:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        guard.run(attempt, 8)

    steps(0)
    steps(2)
    # the gradient of each bias is 2, the momentum after two steps 0.9 * 2 + 2
    assert second.state[other.bias]["momentum_buffer"].tolist() == pytest.approx([3.8] * 3)


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_a_learning_rate_that_the_failed_attempt_has_set_is_put_back(lr):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    controller = MemoryPressureController("cpu", CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1))
    guard = Guard(model, optimizer, controller, others=(schedule,))
    optimizer.step()  # without gradients; else the schedule warns
    guard.run(fails_once(schedule.step), 8)
    assert (schedule.last_epoch, float(optimizer.param_groups[0]["lr"])) == (1, 0.5)


def fails_once(step: Callable[[], Any]) -> Callable[[int], None]:
    """An attempt that takes the step, and runs out of memory after it the first time."""
    tries = iter([True])

    def attempt(_: int) -> None:
        step()
        if next(tries, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return attempt


def guarded(model: nn.Module, optimizer: torch.optim.Optimizer) -> Guard:
    config = CurriculumConfig(target_headroom_gb=0.1, memory_limit_gb=1)
    return Guard(model, optimizer, MemoryPressureController("cpu", config))


def test_a_buffer_that_is_an_expanded_number_does_not_end_the_recovery():
    model, seen = nn.Linear(4, 3), torch.zeros(())
    model.register_buffer("scale", torch.tensor(2.0).expand(3))
    model.register_buffer("seen", seen)
    guarded(model, torch.optim.SGD(model.parameters(), lr=0.1)).run(fails_once(lambda: seen.add_(1)), 8)
    assert int(seen) == 1


class Counting(nn.Linear):
    """Makes a buffer in its first forward."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(()))
        self.get_buffer("seen").add_(len(inputs))
        return super().forward(inputs)


def test_a_buffer_that_the_failed_attempt_made_is_made_again():
    model = Counting(4, 3)
    guard = guarded(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for expected in (2, 4):
        guard.run(fails_once(lambda: model(torch.ones(2, 4))), 8)
        assert int(model.get_buffer("seen")) == expected


def test_a_rehearsal_that_ends_in_another_error_leaves_no_trace():
    rig = Rig("sgd_momentum")
    before = rig.state()

    def mistaken(_: int) -> None:
        rig.model(rig.inputs)
        raise KeyError("a mistake in the loop")

    with pytest.raises(KeyError):
        rig.guard.rehearse(mistaken, 8)
    assert all(torch.equal(a, b) for a, b in zip(rig.state(), before, strict=True))


def test_an_error_without_words_is_recovered_from_too():
    model = nn.Linear(4, 3)
    errors = iter([torch.OutOfMemoryError()])

    def attempt(_: int) -> None:
        for error in errors:
            raise error

    result = guarded(model, torch.optim.SGD(model.parameters(), lr=0.1)).run(attempt, 8)
    assert [event.message for event in result.events] == [""]


@pytest.mark.parametrize("kind", ["adamw_fused", "adamw_foreach"])
def test_an_error_after_the_optimizers_step_undoes_it_or_says_that_it_cannot(kind):
    rig = Rig(kind)
    before = [p.detach().clone() for p in rig.model.parameters()]
    attempt = fails_once(lambda: rig.attempt(8))
    if kind == "adamw_fused":
        with pytest.raises(OutOfMemoryForGoodError, match=r"optimizer_step\(\) be the last thing of the attempt"):
            rig.guard.run(attempt, 8)
    else:
        rig.guard.run(attempt, 8)
    clean = Rig(kind)
    clean.steps(1)
    for now, was, wanted in zip(rig.model.parameters(), before, clean.model.parameters(), strict=True):
        assert not torch.equal(now, was)
        assert torch.equal(now, wanted), "taken once, not twice"


@pytest.mark.parametrize("outside", [True, False])
def test_a_step_that_went_through_is_not_undone_by_the_next_ones_error(outside):
    model = nn.Linear(4, 3)
    guard = guarded(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step(_: int) -> None:
        model(torch.ones(2, 4)).sum().backward()
        guard.optimizer_step()
        raise KeyError("a mistake in what the loop reports")

    if outside:
        model(torch.ones(2, 4)).sum().backward()
        guard.optimizer_step()
    else:
        with pytest.raises(KeyError):
            guard.run(step, 8)
    expected = model.weight.detach().clone()
    guard.run(fails_once(lambda: None), 8)
    assert torch.equal(model.weight, expected)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_all_variants_of_the_error_are_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        MemoryError("numpy"),
        ValueError("CUDA out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0: of which 0.50 GiB is free.", 1.5 * 2**30),
        (
            "CUDA out of memory. Tried to allocate 294.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which "
            "115.93 GiB is free. Including non-PyTorch memory, this process has 23.86 GiB memory in use. 23.20 GiB "
            "allowed; Of the allocated memory 23.03 GiB is allocated by PyTorch, and 90.23 MiB is reserved by PyTorch "
            "but unallocated.",  # as PyTorch 2.11 says it under a cap
            int((294 - (23.20 - 23.03) * 1024) * 2**20),
        ),
        ("Tried to allocate 4.00 MiB. The card has a budget of 6.00 MiB of which 5.00 MiB are allocated.", 3 * 2**20),
        ("CUDA out of memory. Tried to allocate 20.00 MiB", 20 * 2**20),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", 0),
    ],
)  # fmt: skip
def test_the_shortage_is_read_from_the_words(message, expected):
    assert shortage_bytes(message) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("kind", ["adamw_foreach", "adamw_fused", "sgd_momentum"])
def test_creating_the_optimizer_state_ahead_changes_no_step(kind):
    def run(ahead: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = OPTIMIZERS[kind](list(model.parameters()))
        if ahead:
            create_optimizer_state(optimizer)
            assert all(p in optimizer.state for p in model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.0), (torch.float16, 1e-8)])
def test_creating_the_optimizer_state_ahead_leaves_the_weights_alone_where_eps_is_nothing(dtype, eps):
    model = nn.Linear(4, 2, dtype=dtype)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), eps=eps)
    create_optimizer_state(optimizer)
    assert torch.equal(model.weight, before)
    assert optimizer.param_groups[0]["eps"] == eps


class CountingSGD(torch.optim.SGD):
    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


def test_no_step_is_taken_ahead_that_a_hook_or_a_derived_class_would_count():
    weights = [nn.Parameter(torch.zeros(2))]
    derived, hooked = CountingSGD(weights, momentum=0.9), torch.optim.SGD(weights, momentum=0.9)
    calls = []
    hooked.register_step_post_hook(lambda *_: calls.append(1))
    create_optimizer_state(derived)
    create_optimizer_state(hooked)
    assert derived.steps == 0
    assert calls == []


def test_memory_that_this_process_takes_itself_moves_the_predictions_and_is_used_again_when_it_is_free():
    torch.manual_seed(0)
    memory = BudgetedCpuMemory(12 * 2**20)
    config = CurriculumConfig(
        memory_limit_gb=12 / 1024, target_headroom_gb=1.5 / 1024, min_batch_size=16, max_batch_size=128,
        effective_batch_size=128, knee_gain_fraction=0.0,
    )  # fmt: skip
    model = build_model("small_cnn", 10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    controller = MemoryPressureController(memory=memory, config=config)
    guard = Guard(model, optimizer, controller)
    inputs = torch.rand(128, 3, 12, 12)

    def attempt(micro_batch: int) -> None:
        for part in inputs.split(micro_batch):
            model(part).sum().backward()
        guard.optimizer_step()

    def steps(count: int) -> tuple[list[int], int]:
        sizes, errors = [], 0
        for _ in range(count):
            result = guard.run(attempt, controller.decide().batch)
            controller.observe(result.micro_batch)
            sizes.append(result.micro_batch)
            errors += len(result.events)
        return sizes, errors

    alone, errors = steps(10)
    assert errors == 0
    taken = torch.empty(6 * 2**20, dtype=torch.uint8)
    memory.track([taken])
    beside, errors = steps(20)
    assert errors <= 1
    assert 16 <= beside[-1] < alone[-1], "the smallest size that was asked for fits, if not beside the headroom"
    del taken
    again, errors = steps(20)
    assert errors == 0
    assert again[-1] == alone[-1]


def test_where_not_even_the_copies_before_a_step_fit_it_is_said(monkeypatch):
    rig = Rig("adamw_fused")

    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(rig.guard._undo, "remember", refuse)
    with pytest.raises(
        OutOfMemoryForGoodError, match=r"copies of the BatchNorm statistics.*--memory-limit-gb.*2\.00 MiB"
    ):
        rig.guard.run(lambda micro_batch: None, 4)
