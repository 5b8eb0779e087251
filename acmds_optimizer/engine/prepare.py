"""Precision, memory layout, optimizer and checkpointing of activations, each with a fallback that says so."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.checkpoint import checkpoint

from acmds_optimizer.config import CurriculumConfig, TrainConfig
from acmds_optimizer.errors import DataError

logger = logging.getLogger(__name__)


def amp_dtype(config: CurriculumConfig, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, or None for float32; warns where what is asked for is not supported."""
    if not config.enable_amp:
        return None
    if device.type == "cpu":
        if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
            return torch.bfloat16
        logger.warning("mixed precision: this CPU does not compute in bf16; training in float32")
        return None
    if config.amp_dtype == "fp16":
        return torch.float16
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if config.amp_dtype == "bf16":
        logger.warning("mixed precision: %s has no bf16; using fp16", torch.cuda.get_device_name(device))
    return torch.float16


def set_up_cuda(config: CurriculumConfig) -> None:
    """Let float32 matrix products and convolutions run in TF32 and cuDNN search, or forbid it. Applies to the process.

    TF32 through the settings that other libraries read too: Lightning fails where it meets the newer, finer ones.
    """
    torch.set_float32_matmul_precision("high" if config.enable_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.enable_tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer the configuration names, fused (it allocates nothing in its step) where the device has it.

    Its last parameter group decays; the first holds what does not, unless `decay_norms_and_biases`. In this order,
    since the guard copies all groups but the last.

    Raises:
        DataError: all parameters are frozen.
    """
    groups = _groups(model, config)
    if not groups:
        raise DataError(
            f"model {config.model!r}: none of its parameters requires a gradient, so nothing can be trained"
        )
    if config.optimizer == "sgd" and config.weight_decay > 0.01:
        logger.warning(
            "weight decay: %g is for AdamW; SGD adds it to the gradient, and is usually given 1e-4 to 5e-4",
            config.weight_decay,
        )
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": lambda **kw: torch.optim.AdamW(groups, lr=config.lr, **kw),
        "sgd": lambda **kw: torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, **kw
        ),
    }
    try:
        return kinds[config.optimizer](fused=True)
    except (RuntimeError, TypeError) as error:
        logger.warning("fused %s is not available here (%s); using the plain one", config.optimizer, error)
        return kinds[config.optimizer]()


def logits_of(model: nn.Module, outputs: Any) -> Tensor:
    """The outputs of the model.

    Raises:
        DataError: they are something else than one tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    raise DataError(
        f"{type(model).__name__} must give one tensor of logits (B, C), but gives a {type(outputs).__name__}: wrap it "
        "in a module that picks the logits"
    )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that steps of this optimizer train this model, and can be undone and repeated in pieces.

    Raises:
        DataError: they cannot.
    """
    name, parameters = type(optimizer).__name__, list(model.parameters())
    _check_shapes(parameters)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in stepped for parameter in parameters):
        raise DataError(
            f"{name} holds no parameter of the model that requires a gradient, so nothing can be trained; make it from "
            "model.parameters(), and freeze fewer of them"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise DataError(f"{name} evaluates the loss again within its step, which cannot be undone; use AdamW or SGD")


def _check_shapes(parameters: list[nn.Parameter]) -> None:
    if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
        raise DataError("the model has layers without a shape; run one batch through it before its optimizer is made")


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not: of one dimension, or named by timm's `no_weight_decay`."""
    _check_shapes(list(model.parameters()))
    method: Any = getattr(model, "no_weight_decay", None)
    named = set(method()) if callable(method) else set()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = not config.decay_norms_and_biases and (parameter.dim() <= 1 or name in named)
            (others if exempt else decayed).append(parameter)
    groups = [(others, 0.0), (decayed, config.weight_decay)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def checkpoint_activations(model: nn.Module) -> bool:
    """Make backward recompute the activations of a model's blocks instead of keeping them.

    timm and Hugging Face models have a method for it. Otherwise the blocks are the elements of every `nn.Sequential`
    that hold at least two layers with weights. Running statistics are left alone in the recomputation. Blocks with a
    spectral_norm are kept as they are, since their weights would be others then.

    Returns:
        Whether anything was found; warns where nothing was.
    """
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if callable(method := getattr(model, name, None)):
            method()
            return True
    blocks = [
        block
        for module in model.modules()
        if isinstance(module, nn.Sequential)
        for block in module
        if sum(any(True for _ in part.parameters(recurse=False)) for part in block.modules()) >= 2
    ]
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    outermost = [block for block in blocks if id(block) not in inner]
    changing = [block for block in outermost if any(map(_takes_turns, block.modules()))]
    if changing:
        logger.warning("gradient checkpointing: %d blocks have a spectral_norm, so they are kept", len(changing))
        outermost = [block for block in outermost if block not in changing]
    for block in outermost:
        block.forward = _recomputed(block, block.forward)
    if not outermost:
        logger.warning("gradient checkpointing: %s has no sequence of blocks; training without", type(model).__name__)
    return bool(outermost)


def _takes_turns(module: nn.Module) -> bool:
    """Whether it is spectral_norm, by either of torch's ways, which goes on with its iteration in each pass."""
    return "SpectralNorm" in {type(each).__name__.lstrip("_") for each in (module, *module._forward_pre_hooks.values())}


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _statistics_untouched(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


Modes = list[tuple[nn.Module, bool]]
"""Modules, a parent before its parts, and whether each trains."""


def training_modes(model: nn.Module) -> Modes:
    """Which modules are to train: all, but for those in evaluation mode within a model that is not in it itself."""
    if not model.training:
        model.train()
    return modes_of(model)


def modes_of(model: nn.Module) -> Modes:
    """The modes that the modules are in now."""
    return [(module, module.training) for module in model.modules()]


def put_into(modes: Modes) -> None:
    """Put each module into its mode, by its own `train`: some do more there than to note it."""
    for module, training in modes:
        if module.training != training:
            module.train(training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in the mode that it had."""
    modes = modes_of(model)
    model.eval()
    try:
        yield
    finally:
        put_into(modes)


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers as in evaluation: for one sample whose maps are 1x1, which has no statistics of its own."""
    _warn_of_single_samples()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@cache
def _warn_of_single_samples() -> None:
    logger.warning(
        "batch of one sample: BatchNorm cannot normalise it by itself, so its running statistics are used. Where that "
        "happens in each step, make room for more samples (--gradient-checkpointing, a smaller --image-size)"
    )


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    # a second forward would enter the same batch into the running statistics twice
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            counts = isinstance(norm, nn.modules.batchnorm._BatchNorm)  # InstanceNorm has the number, but not its rise
            if counts and norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
