"""The card on the CPU counts what PyTorch holds, and refuses with the real error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acmds_optimizer.errors import ConfigError
from acmds_optimizer.memory.device import BudgetedCpuMemory, CudaMemory, open_memory

MIB = 2**20


def test_live_bytes_are_those_of_the_tensors_that_exist():
    memory = BudgetedCpuMemory(64 * MIB)
    with memory.watch():
        first = torch.zeros(MIB, dtype=torch.float32)
        second = first + 1
        assert memory.read().allocated_bytes == 8 * MIB
        del first
        assert memory.read().allocated_bytes == 4 * MIB
        view = second[10:]
        del second
        assert memory.read().allocated_bytes == 4 * MIB, "a view keeps its storage"
        del view
    assert memory.read().allocated_bytes == 0
    assert memory.read().peak_allocated_bytes == 8 * MIB


def test_what_was_refused_is_not_part_of_the_peak():
    memory = BudgetedCpuMemory(6 * MIB)
    with memory.watch():
        kept = torch.zeros(MIB)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4.00 MiB.*6.00 MiB of which 4.00 MiB"):
            torch.ones(MIB)
    assert memory.read().peak_allocated_bytes == kept.nbytes
    assert memory.read().out_of_memory_errors == 1


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_the_error_strikes_in_forward_backward_and_optimizer(where):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    inputs = torch.randn(64, 256)
    memory = BudgetedCpuMemory(1024 * MIB)
    memory.track(model.parameters())
    reached = None

    def squeeze() -> None:
        nonlocal reached
        if reached == where:
            memory.neighbour_bytes = memory.total_bytes - memory.read().allocated_bytes

    with pytest.raises(torch.OutOfMemoryError), memory.watch():  # noqa: PT012  # three places, one of which raises
        reached = "forward"
        squeeze()
        loss = model(inputs).square().sum()
        reached = "backward"
        squeeze()
        loss.backward()
        reached = "optimizer"
        squeeze()
        optimizer.step()
    assert reached == where


def test_a_neighbour_takes_from_the_budget_and_gives_it_back():
    memory = BudgetedCpuMemory(8 * MIB)
    memory.neighbour_bytes = 5 * MIB
    assert memory.read().budget_bytes == 3 * MIB
    with memory.watch(), pytest.raises(torch.OutOfMemoryError):
        torch.zeros(MIB)
    memory.neighbour_bytes = 0
    with memory.watch():
        torch.zeros(MIB)


def test_tracked_tensors_count_once():
    memory = BudgetedCpuMemory(64 * MIB)
    tensor = torch.zeros(MIB)
    memory.track([tensor, {"again": tensor, "view": tensor[:5]}])
    memory.track(t for t in [tensor])
    assert memory.read().allocated_bytes == 4 * MIB


def test_the_default_card_on_the_cpu_has_24_gb():
    assert open_memory("cpu").total_bytes == 24 * 2**30
    assert open_memory("cpu", 1.5).total_bytes == 1.5 * 2**30


@pytest.mark.parametrize(("device", "word"), [("tpu", "no device"), ("xla", "not supported"), ("mps", "not supported")])
def test_another_device_is_refused_with_the_ones_that_work(device, word):
    with pytest.raises(ConfigError, match=rf"{word}.*cuda, cuda:N or cpu"):
        open_memory(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA")
def test_without_cuda_the_error_says_how_to_ask_for_the_cpu():
    with pytest.raises(RuntimeError, match=r'^CUDA is not available: .*device_id="cpu" \(command line: --device cpu\)'):
        open_memory(0)


@pytest.mark.gpu
def test_a_limit_on_cuda_caps_the_process_with_an_error_that_can_be_caught():
    torch.cuda.empty_cache()  # what is cached could be used again without asking for more
    memory = open_memory("cuda", 1.0)
    assert isinstance(memory, CudaMemory)
    try:
        assert memory.read().budget_bytes <= 2**30
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30 + 1, dtype=torch.uint8, device="cuda")
        assert memory.read().out_of_memory_errors >= 1
    finally:
        memory.close()


def test_what_is_used_after_the_card_was_closed_counts_once():
    memory, held = BudgetedCpuMemory(2**20), torch.zeros(256)
    memory.track(held)
    memory.close()
    with memory.watch():
        held.add_(1)
    assert memory.read().allocated_bytes == 1024
