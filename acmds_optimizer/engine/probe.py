"""Which precision and memory layout are fastest for this model on this GPU: measured in seconds, and remembered.

A forward and backward pass of a copy of the model is captured as a CUDA graph and replayed, so that the GPU is timed
and not the launches. What was found is kept in `acmds/probes.json` under $XDG_CACHE_HOME (~/.cache), for each model,
input shape, GPU and version of PyTorch.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmds_optimizer.config import CurriculumConfig
from acmds_optimizer.engine.prepare import amp_dtype
from acmds_optimizer.errors import first_line
from acmds_optimizer.files import write_json
from acmds_optimizer.memory.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_BATCH = 64
_WARM_UP = 2
_REPLAYS = 5
_LEAST_GAIN = 0.05
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}


def choose(
    model: nn.Module, config: CurriculumConfig, device: torch.device, shape: tuple[int, ...]
) -> tuple[torch.dtype | None, bool]:
    """The dtype to autocast to (None: float32) and whether to store images and weights as NHWC.

    Only what the configuration leaves to `auto` is tried, and another choice than bf16 and NHWC has to gain 5 %.

    Args:
        model: on `device`; a copy of it is run, and it is left as it is.
        config: `enable_amp`, `amp_dtype`, `channels_last` and `max_batch_size`.
        device: where nothing but CUDA is probed.
        shape: of one input, (C, H, W).
    """
    usual = amp_dtype(config, device)
    layout = config.channels_last is not False and device.type == "cuda"
    if device.type != "cuda":
        return usual, layout
    other_dtype = usual is torch.bfloat16 and config.amp_dtype == "auto"
    other_layout = config.channels_last == "auto" and any(isinstance(m, nn.Conv2d) for m in model.modules())
    if not (other_dtype or other_layout):
        return usual, layout
    batch = min(_BATCH, config.max_batch_size)
    key = _key(model, shape, batch, device)
    seconds = _remembered(key)
    wanted = [(usual, layout)]
    wanted += [(torch.float16, layout)] if other_dtype else []
    wanted += [(usual, not layout)] if other_layout else []
    missing = [choice for choice in wanted if _name(*choice) not in seconds]
    if missing:
        try:
            seconds |= {_name(*choice): _measure(model, *choice, batch, shape, device) for choice in missing}
        except Exception as error:  # noqa: BLE001  # a model that cannot be copied or captured is trained all the same
            reason = first_line(error) or type(error).__name__
            log = logger.debug if is_out_of_memory(error) else logger.info
            log("precision and layout: not probed (%s)", reason)
            return usual, layout
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        _remember(key, seconds)
    best = min(wanted, key=lambda choice: seconds[_name(*choice)])
    gain = seconds[_name(usual, layout)] / seconds[_name(*best)] - 1.0
    chosen = best if gain >= _LEAST_GAIN else wanted[0]
    table = ", ".join(f"{_name(*choice)} {1000 * seconds[_name(*choice)]:.1f} ms" for choice in wanted)
    logger.info("precision and layout: %s (%s for a batch of %d)", _name(*chosen), table, batch)
    return chosen


def _name(dtype: torch.dtype | None, channels_last: bool) -> str:
    return f"{_NAMES[dtype]} {'NHWC' if channels_last else 'NCHW'}"


def _measure(
    model: nn.Module, dtype: torch.dtype | None, channels_last: bool, batch: int, shape: tuple[int, ...], device: Any
) -> float:
    """Seconds that the GPU needs for forward and backward."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.random.fork_rng(devices=[device]):
        twin = copy.deepcopy(model).train().requires_grad_(True)
        inputs = torch.randn((batch, *shape), device=device)
        if len(shape) == 3:
            twin, inputs = twin.to(memory_format=layout), inputs.to(memory_format=layout)

        def step() -> None:
            with torch.autocast("cuda", dtype, cache_enabled=False) if dtype else nullcontext():
                outputs = twin(inputs)
            outputs.float().square().mean().backward()

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # gradients belong to the stream that first made them
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / _REPLAYS


def _key(model: nn.Module, shape: tuple[int, ...], batch: int, device: torch.device) -> str:
    parts = [type(model).__qualname__, *(f"{name}{tuple(p.shape)}" for name, p in model.named_parameters())]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    gpu = torch.cuda.get_device_name(device)
    versions = f"torch {torch.__version__}, cudnn {torch.backends.cudnn.version()}"
    return f"{type(model).__name__} {digest}, {batch} x {shape}, {gpu}, {versions}"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acmds" / "probes.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remembered(key: str) -> dict[str, float]:
    found = _read().get(key)
    return dict(found) if isinstance(found, dict) else {}


def _remember(key: str, seconds: dict[str, float]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _read() | {key: seconds})
    except OSError as error:
        logger.debug("probe results cannot be kept in %s: %s", path, error)
