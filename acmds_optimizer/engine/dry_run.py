"""What a configuration would need, before it needs it: a step on fake tensors, which have sizes but no memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acmds_optimizer.config import GIB, TrainConfig
from acmds_optimizer.engine import data
from acmds_optimizer.engine.loss import make_loss
from acmds_optimizer.engine.prepare import amp_dtype, build_optimizer, checkpoint_activations, logits_of
from acmds_optimizer.errors import DataError
from acmds_optimizer.memory.device import open_memory
from acmds_optimizer.memory.undo import create_optimizer_state
from acmds_optimizer.zoo.datasets import DataBundle

CARD_GB = 23.2
"""What the allocator of a 24 GB card can hold, once the driver has its part."""

_SIZES = (4, 256, 512)
"""Micro-batches that are tried. Peak memory is a line in the micro-batch, but for small ones the gradients' peak."""


@dataclass(frozen=True)
class Prediction:
    """What was found. Bytes; 2**30 are a GB.

    Attributes:
        layers: (name, type, parameters, shape of the output without the batch) of the model's parts.
        parameters: how many there are.
        trained: how many of them are trained.
        sizes: micro-batches that were tried.
        peaks: peak bytes of a step at each of them.
    """

    layers: list[tuple[str, str, int, str]]
    parameters: int
    trained: int
    sizes: tuple[int, ...]
    peaks: tuple[int, ...]

    @property
    def bytes_per_sample(self) -> float:
        return (self.peaks[-1] - self.peaks[-2]) / (self.sizes[-1] - self.sizes[-2])

    def peak_bytes(self, micro_batch: int) -> int:
        """Of a step with that micro-batch: the line through the larger sizes tried, and at least the smallest's."""
        return max(self.peaks[0], round(self.peaks[-1] + (micro_batch - self.sizes[-1]) * self.bytes_per_sample))

    def largest_batch(self, budget_bytes: float) -> int:
        """The largest micro-batch whose peak fits; 0 where none does."""
        if budget_bytes < self.peaks[0]:
            return 0
        return max(1, int((budget_bytes - self.peaks[-1]) / self.bytes_per_sample + self.sizes[-1]))


def predict(model: nn.Module, shape: tuple[int, ...], config: TrainConfig, resident_bytes: int = 0) -> Prediction:
    """Peak memory of training steps of `model`, without a GPU and without the memory.

    Counted are weights, gradients, optimizer state, averaged weights, activations, the inputs of a step, and data that
    stays on the device; where the configuration's GPU is at hand, also the workspaces that its matrix products keep.
    Not counted are workspaces of convolutions and fragmentation.

    Args:
        model: on the CPU; its parameters are fake afterwards.
        shape: of one input.
        config: optimizer, precision, checkpointing of activations, effective batch.
        resident_bytes: of data kept on the device.

    Raises:
        DataError: the model cannot run on fake tensors (it looks at values), or not with such inputs, or gives
            something else than one tensor.
    """
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    real = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    average = 0
    if config.ema_decay is not None:
        average = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    held = config.step_samples if config.batch_policy == "hold" else 0
    input_bytes = 4 * torch.Size(shape).numel() + 24  # and target, index and weight
    kept = average + resident_bytes + _workspace_bytes(config.device, config.enable_amp)
    peaks: list[int] = []
    layers: list[tuple[str, str, int, str]] = []
    for size in _SIZES:
        try:
            peak, layers = _step(model, real, shape, config, size)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"--dry-run: {config.model} does not run on inputs {shape} without data: {said}") from error
        peaks.append(peak + kept + max(0, held - size) * input_bytes)
    parameters = list(model.parameters())
    return Prediction(
        layers,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        _SIZES,
        tuple(peaks),
    )


@functools.cache
def _workspace_bytes(device: str, amp: bool) -> int:
    """What the libraries of the GPU keep once matrices were multiplied in a forward and a backward pass."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 0
    try:
        memory = open_memory(device)
        before = memory.read().allocated_bytes
        layer = nn.Linear(64, 64, device=device)
        inputs = torch.ones(64, 64, device=device, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            outputs = layer(inputs)
        outputs.float().sum().backward()
        del layer, inputs, outputs
        return max(0, memory.read().allocated_bytes - before)
    except RuntimeError:  # a card that is full, or refuses: the prediction does without
        return 0


_Tensors = list[tuple[nn.Module, dict[str, nn.Parameter | None], dict[str, Tensor | None]]]


def _step(
    model: nn.Module, real: _Tensors, shape: tuple[int, ...], config: TrainConfig, size: int
) -> tuple[int, list[tuple[str, str, int, str]]]:
    """Peak bytes of one step, and the model's parts."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    device = torch.device("cpu")  # fake CUDA tensors need a CUDA driver; sizes are the same
    dtype = amp_dtype(config, device) if config.device == "cpu" else torch.bfloat16 if config.enable_amp else None
    loss_fn = make_loss(config, None)
    # fp16 needs as much as bf16, and graphs the casts of a weight in each use of it
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        _replace(real)
        model.train()
        optimizer = build_optimizer(model, config)
        create_optimizer_state(optimizer)
        inputs, targets = torch.empty(size, *shape), torch.zeros(size, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, inputs, targets)
        with _frozen_once_entered(model), tracker, _outputs(model) as layers:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                logits = logits_of(model, model(inputs))
            losses, _ = loss_fn(logits.float(), targets)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        snapshot = tracker.get_tracker_snapshot("peak")
    return max(int(values["Total"]) for values in snapshot.values()), layers


@contextmanager
def _frozen_once_entered(model: nn.Module) -> Iterator[None]:
    """Frozen parameters are frozen from the model's forward on: PyTorch's tracker hooks all just before, or fails."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]

    def freeze(*_: object) -> None:
        for parameter in frozen:
            parameter.requires_grad_(False)

    for parameter in frozen:
        parameter.requires_grad_(True)
    hook = model.register_forward_pre_hook(freeze)  # the tracker's, being of all modules, come first
    try:
        yield
    finally:
        hook.remove()
        freeze()


def _replace(real: _Tensors) -> None:
    """Put tensors of the same sizes into the modules: fake ones, within FakeTensorMode."""

    def alike(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)

    fakes: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module, parameters, buffers in real:
        for name, parameter in parameters.items():
            if parameter is not None:
                fake = nn.Parameter(alike(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes.setdefault(id(parameter), fake)
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = alike(buffer)


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[tuple[str, str, int, str]]]:
    """The model's parts, filled in by its forward."""
    layers: list[tuple[str, str, int, str]] = []

    def note(name: str, module: nn.Module, output: object) -> None:
        shape = "x".join(str(side) for side in output.shape[1:]) if isinstance(output, Tensor) else ""
        layers.append((name, type(module).__name__, sum(p.numel() for p in module.parameters()), shape))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_children()
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def resident_bytes(config: TrainConfig, bundle: DataBundle) -> int:
    """Bytes of data that stays on the card; on the CPU they lie beside it."""
    if config.device == "cpu":
        return 0
    limit = data.resident_limit(torch.device("cuda"), _usable_bytes(config))
    parts = ((bundle.train, True), (bundle.val, False))
    return sum(
        data.resident_bytes(part, data.input_spec(bundle, config, train=train), limit)
        for part, train in parts
        if part is not None
    )


def _usable_bytes(config: TrainConfig) -> float:
    """What training may use of the card."""
    return ((config.memory_limit_gb or CARD_GB) - config.target_headroom_gb) * GIB


def report(prediction: Prediction, shape: tuple[int, ...], config: TrainConfig) -> list[str]:
    """Lines for a terminal."""
    width = max([len(name) for name, *_ in prediction.layers] + [4])
    lines = [f"{'part':<{width}}  {'type':<22} {'parameters':>12}  output"]
    lines += [f"{name:<{width}}  {kind:<22} {count:>12,}  {output}" for name, kind, count, output in prediction.layers]
    card = config.memory_limit_gb or CARD_GB
    usable = _usable_bytes(config)
    largest = prediction.largest_batch(usable)
    chosen = max(1, min(config.max_batch_size, largest))
    what = "a 24 GB card" if config.memory_limit_gb is None else "the card"
    lines += [
        "",
        f"model: {config.model}, {prediction.parameters:,} parameters, {prediction.trained:,} of them trained",
        f"input: {'x'.join(str(side) for side in shape)}",
        f"memory_per_sample_mb: {prediction.bytes_per_sample / 2**20:.3g}",
        f"largest_batch: {largest}, on {what} ({card:g} GB to allocate), {config.target_headroom_gb:.3g} GB kept free",
        f"peak_gb: {prediction.peak_bytes(chosen) / GIB:.3g} at micro-batch {chosen}, for an effective batch of "
        f"{config.step_samples}",
    ]
    if largest < 1:
        lines.append(
            "nothing fits: try --gradient-checkpointing, a smaller --image-size or model, or a smaller headroom"
        )
    return lines
