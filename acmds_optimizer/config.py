"""Every setting of the trainer, once: its default, unit, range and reason.

The two dataclasses are the single source of the command-line flags, of the keys a configuration file may hold, and of
what `acmds-tune` may search. A field exists only if code reads it. The docstring under a field is its help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from acmds_optimizer.errors import ConfigError

GIB = 1024**3
"""Bytes in what this project, like CUDA's tools, calls a GB."""

PositiveInt = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True, allow_inf_nan=False)


@dataclass(config=_STRICT)
class CurriculumConfig:
    """What the memory controller, the curriculum and the step need to know. GB are 2**30 bytes."""

    # --- memory: what to hold, and within which bounds
    target_headroom_gb: Annotated[float, Ge(0.0)] = 3.0
    """GB to keep free of what this process may hold. Larger: smaller micro-batches, more room for neighbours."""

    memory_limit_gb: Annotated[float, Gt(0.0)] | None = None
    """GB this process may hold at most; none: all that is free (on the CPU: 24)."""

    min_batch_size: PositiveInt = 4
    """Smallest micro-batch, in samples, that is chosen; only recovery from an out-of-memory error goes below."""

    max_batch_size: PositiveInt = 64
    """Largest micro-batch, in samples. Larger: more throughput up to the knee, more memory."""

    effective_batch_size: PositiveInt | None = None
    """Samples an optimizer step with batch_policy hold; none: max_batch_size."""

    batch_policy: Literal["hold", "free"] = "hold"
    """hold: gradient accumulation keeps the effective batch; free: the effective batch is the micro-batch and moves."""

    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Learning-rate rule for batch_policy free: lr times (batch / max_batch_size) to the power 0, 1 or 1/2."""

    knee_gain_fraction: Fraction = 0.02
    """Growth stops where the next size would add less throughput than this share; 0: memory alone decides."""

    max_oom_retries: PositiveInt = 10
    """How often one step may be repeated smaller after an out-of-memory error before the run gives up with an error."""

    gc_threshold_gb: Annotated[float, Ge(0.0)] = 2.0
    """Below this many free GB (never more than the headroom) cached blocks are released at a step boundary."""

    # --- memory: the PID that trims the feed-forward model
    pid_kp: Annotated[float, Ge(0.0), Le(10.0)] = 0.15
    """Proportional gain on the dimensionless headroom error."""

    pid_ki: Annotated[float, Ge(0.0), Le(10.0)] = 0.02
    """Integral gain, per step."""

    pid_kd: Annotated[float, Ge(0.0), Le(10.0)] = 0.08
    """Derivative gain, per step."""

    pressure_smoothing: Annotated[float, Ge(0.0), Lt(1.0)] = 0.9
    """Share of the old value in the averaged error that growth is judged by; shrinking uses the raw error."""

    # --- curriculum
    direction: Literal["none", "easy", "hard", "random", "matched", "auto"] = "none"
    """Which samples come first: none is plain shuffling; auto is that with the noise gate. Controls: random has the
    paced counts without the scores, matched is a shuffle of as many samples."""

    scoring: str = "loss"
    """What makes a sample hard: loss, margin, entropy, el2n, forgetting, a file of difficulties in [0, 1] (.npy, .csv,
    .txt), or `package.module:callable`."""

    pacing: Literal["none", "linear", "root", "quadratic", "exponential", "logarithmic", "step"] = "linear"
    """How the admitted share grows with progress; used with the directions easy, hard, random and matched."""

    start_fraction: Annotated[float, Gt(0.0), Le(1.0)] = 0.5
    """Share of the samples admitted at the start; used with the directions easy, hard, random and matched."""

    pacing_end_fraction: Annotated[float, Gt(0.0), Le(1.0)] = 0.7
    """Share of the training after which every sample is admitted."""

    coverage_epochs: PositiveInt = 3
    """A sample that is not admitted is still seen once in this many epochs, with this weight."""

    curriculum_alpha: Annotated[float, Gt(0.0), Le(1.0)] = 0.05
    """Share of the new loss in a sample's moving average. Larger: scores follow the model faster, and are noisier."""

    noise_rate: Literal["auto"] | Annotated[float, Ge(0.0), Le(0.5)] = 0.0
    """Samples to leave out as mislabelled: 0 none; auto those whose losses split off clearly, if any; or a share of
    the samples, the highest losses."""

    noise_action: Literal["ignore", "relabel"] = "ignore"
    """What becomes of samples that the noise gate flags: they count nothing, or learn the class that is predicted."""

    start_resolution: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    """Height and width of the images at the start as a share of the full size; 1: full size throughout. The last 30 %
    of the training and every validation are at full size."""

    resolution_stages: PositiveInt = 4
    """Sizes from start_resolution to the full one; used where start_resolution is below 1."""

    difficulty_window: PositiveInt = 1000
    """Most recent samples over which the logged mean difficulty is taken."""

    # --- speed
    enable_amp: bool = True
    """Mixed precision: fp16 or bf16 on CUDA; bf16 on a CPU that computes in it, else float32 with a warning."""

    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Precision under enable_amp; auto: bf16 where the GPU has it, or fp16 where that is measured to be 5 % faster."""

    enable_tf32: bool = True
    """TF32 for float32 matrix products and convolutions on Ampere and later."""

    channels_last: bool | Literal["auto"] = "auto"
    """Store images and convolution weights as NHWC on CUDA; auto: unless NCHW is measured to be 5 % faster."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third more time for much less memory."""

    enable_cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay steps as one CUDA graph for each micro-batch size; auto: where that is measured to be 2 % faster."""

    compile_model: bool = False
    """Compile the model with torch.compile on CUDA, once for each micro-batch size: faster steps after half a minute or
    more."""

    cudnn_benchmark: bool = False
    """Let cuDNN try its convolution algorithms for each micro-batch size, which takes seconds a size."""

    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the weights, the order of the samples, augmentation and dropout."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> CurriculumConfig:
        if self.min_batch_size > self.max_batch_size:
            raise ValueError(f"min_batch_size {self.min_batch_size} is above max_batch_size {self.max_batch_size}")
        limit = self.memory_limit_gb
        if limit is not None and self.target_headroom_gb >= limit:
            raise ValueError(
                f"target_headroom_gb {self.target_headroom_gb:g} leaves nothing of memory_limit_gb {limit:g}"
            )
        return self

    @property
    def gate_rate(self) -> Literal["auto"] | float:
        """What the noise gate is to flag; 0: there is no gate."""
        return "auto" if self.direction == "auto" and self.noise_rate == 0 else self.noise_rate

    @property
    def step_samples(self) -> int:
        """Samples of one optimizer step under batch_policy hold."""
        return self.effective_batch_size or self.max_batch_size


@dataclass(config=_STRICT)
class TrainConfig(CurriculumConfig):
    """One training run: CurriculumConfig plus the model, the data, the optimizer and the outputs."""

    # --- what is trained on what
    model: str = "resnet50"
    """`small_cnn`, a torchvision classification model, `timm/NAME`, or `package.module:callable` given num_classes."""

    pretrained: bool = False
    """Start from torchvision's or timm's weights, with a new last layer; small images then keep the usual stem."""

    freeze: str | None = None
    """`backbone` (all but the last layer), or comma-separated beginnings of parameter names: what is not trained."""

    dataset: str = "cifar10"
    """`digits`, `cifar10`, `cifar100`, `imagenet`, a folder of images, `torchvision:NAME`, `hf:NAME`, or
    `package.module:callable`."""

    data_dir: str = "data"
    """Where downloaded data sets are kept, and where `imagenet` looks for train/ and val/."""

    num_classes: PositiveInt | None = None
    """Classes; none: inferred from the data. Checked against the data where both are known."""

    val_fraction: Annotated[float, Ge(0.0), Lt(1.0)] = 0.1
    """Share of the samples held out for validation where the data has no validation split of its own."""

    image_size: Annotated[int, Ge(4)] | None = None
    """Height and width of an input in pixels; none: as stored for small images of one size, else 224."""

    augment: bool = True
    """Random crops and horizontal flips in training (no flips for digits); false: none of the augmentations below."""

    auto_augment: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment or RandAugment (two operations of magnitude 9), by workers: images are not kept on the GPU."""

    cutout_fraction: Fraction = 0.0
    """Side of a square at a random place that is greyed out, as a share of the image's side; 0: none."""

    mixup_alpha: Annotated[float, Ge(0.0)] = 0.0
    """Images and labels are mixed by a share from Beta(alpha, alpha); 0: never. With cutmix, one of the two a step."""

    cutmix_alpha: Annotated[float, Ge(0.0)] = 0.0
    """A box of an image, and its share of the label, comes from another; its size from Beta(alpha, alpha); 0: never."""

    label_smoothing: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0
    """Share of the target that is spread over all classes. Logged losses and difficulties stay unsmoothed."""

    broken_images: Literal["error", "skip"] = "error"
    """An unreadable file of an image folder: ends the run, or is named in the log and the next takes its place."""

    num_workers: Annotated[int, Ge(0)] | None = None
    """Processes that decode images; none: up to 8, one fewer than there are cores."""

    decoded_cache: str | None = None
    """Folder that keeps a folder's small images decoded for the next run; none: each run decodes them."""

    # --- how
    device: str = "cuda"
    """`cuda`, `cuda:N` or `cpu`."""

    epochs: PositiveInt = 10
    """Passes over the data."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; the schedules are compressed to fit."""

    max_seconds: Annotated[float, Gt(0.0)] | None = None
    """Stop after this many seconds of training, at a step boundary."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""

    momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.9
    """Of SGD."""

    nesterov: bool = False
    """Nesterov's momentum, for SGD."""

    lr: Annotated[float, Gt(0.0)] = 1e-3
    """Peak learning rate."""

    weight_decay: Annotated[float, Ge(0.0)] = 0.05
    """Decoupled for AdamW, L2 for SGD (there 5e-4 and less is usual)."""

    decay_norms_and_biases: bool = False
    """Weight decay also for parameters of one dimension: biases, and the scales of normalisation layers."""

    lr_schedule: Literal["cosine", "one_cycle", "step", "plateau", "linear", "constant"] = "cosine"
    """Runs on samples seen, so that a moving batch does not change it; plateau also looks at the validation loss."""

    warmup_fraction: Annotated[float, Ge(0.0), Lt(1.0)] | None = None
    """Share of the training over which the learning rate rises; none: 0.05, with one_cycle 0.3."""

    lr_decay_factor: Annotated[float, Gt(0.0), Lt(1.0)] = 0.1
    """Factor of each drop of the learning rate under lr_schedule step and plateau."""

    lr_decay_epochs: Annotated[float, Gt(0.0)] | None = None
    """Epochs between drops under step, and without improvement before one under plateau; none: a third, a tenth."""

    ema_decay: Annotated[float, Ge(0.0), Lt(1.0)] | None = None
    """Decay, a step, of a running average of the weights, which is then what is validated (0.999); none: no average."""

    # --- what is kept
    output_dir: str | None = None
    """Folder for checkpoint, resolved configuration, environment and step records; none: a new one in runs/."""

    tensorboard: bool = False
    """Also write the curves for TensorBoard, into the output folder. Needs the extra `tensorboard`."""

    wandb: bool = False
    """Also send the curves to Weights & Biases (WANDB_MODE=offline keeps them here). Needs the extra `wandb`."""

    checkpoint_every: Annotated[int, Ge(0)] = 1
    """Epochs between checkpoints; 0: none, but those that checkpoint_every_steps asks for, and then best and last."""

    checkpoint_every_steps: PositiveInt | None = None
    """Also a checkpoint after every so many optimizer steps, in the middle of an epoch; none: at its end only."""

    keep_checkpoints: PositiveInt = 1
    """How many checkpoints to keep: the newest is checkpoint.pt, older ones have their step in the name."""

    best_metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """By which validation figure best.pt is kept, and early stopping decides."""

    patience_epochs: PositiveInt | None = None
    """Stop early after so many epochs without a better best_metric; none: never."""

    @model_validator(mode="after")
    def _momentum_can_be_nesterovs(self) -> TrainConfig:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs momentum above 0")
        return self


Config = TypeVar("Config", bound=CurriculumConfig)


def field_names(config_type: type[CurriculumConfig] = TrainConfig) -> list[str]:
    """Names of all settings of `config_type`, in their order of declaration."""
    return [field.name for field in dataclasses.fields(config_type)]


def field_help() -> dict[str, str]:
    """The text under each field of TrainConfig, by name."""
    texts = {}
    for owner in reversed(TrainConfig.__mro__):  # pydantic keeps a field's text only on the class that declares it
        for name, field in getattr(owner, "__pydantic_fields__", {}).items():
            if field.description:
                texts[name] = field.description.replace("\n", " ")
    return texts


def field_types() -> dict[str, Any]:
    """The type of each field of TrainConfig, by name, without its bounds."""
    return {name: field.annotation for name, field in TrainConfig.__pydantic_fields__.items()}  # type: ignore[attr-defined]


def to_dict(config: CurriculumConfig) -> dict[str, Any]:
    """All settings as plain values, as written to JSON."""
    return dataclasses.asdict(config)


OTHER_NAMES = {
    "batch_size": "there are two: effective_batch_size is what a step learns from, max_batch_size what memory holds",
    "learning_rate": "it is called lr",
    "num_epochs": "it is called epochs",
    "wd": "it is called weight_decay",
}
"""What other trainers call their settings, with what it is here. Not read as ours: they would differ in best.json."""


def hint(key: str, valid: list[str]) -> str:
    """`; it is called x` for what other trainers call it, else the nearest valid key, or nothing."""
    name = key.replace("-", "_")
    return f"; {OTHER_NAMES[name]}" if name in OTHER_NAMES else nearest(key, valid)


def nearest(key: str, valid: list[str]) -> str:
    """` (did you mean 'x'?)` for the closest valid key, or nothing."""
    matches = difflib.get_close_matches(key.replace("-", "_"), valid, n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def build(config_type: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Check `values` and make a configuration from them.

    Args:
        config_type: CurriculumConfig or TrainConfig.
        values: settings by name; strings are converted where they read as the field's type.
        source: where they come from, for the message (a file's path, or "command line").

    Raises:
        ConfigError: listing every problem at once, each with its key, value and what is allowed.
    """
    try:
        return TypeAdapter(config_type).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(source, [problem for _, problem in describe(error, field_names(config_type))]) from None


def describe(error: ValidationError, valid_keys: list[str]) -> list[tuple[list[str], str]]:
    """For each problem that pydantic found its keys, and a line: dotted key, value, what is allowed, nearest valid key.

    Settings that do not go together have several keys, or one.
    """
    problems: list[tuple[list[str], str]] = []
    tried: dict[tuple[str, str], list[str]] = {}
    for item in error.errors(include_url=False):
        # a union reports one error a member, with the member's name in the location; the key is what the user typed
        members = ("constrained-", "function-", "literal[", "bool")
        key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(members))
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(([key], f"{key}: unknown key{hint(str(item['loc'][-1]), valid_keys)}"))
        elif key:
            allowed = tried.setdefault((key, f"{item['input']!r}"), [])
            allowed.append(f"{item['msg'][:1].lower()}{item['msg'][1:]}")
        else:
            said = item["msg"].removeprefix("Value error, ")
            problems.append(([word for word in re.findall(r"\w+", said) if word in valid_keys], said))
    return problems + [([key], f"{key}: {value}: {', or '.join(allowed)}") for (key, value), allowed in tried.items()]


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, or in a `best.json` of acmds-tune. Keys may be written with dashes.

    Raises:
        ConfigError: the file is missing, is not JSON or YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(str(path), ["is nested too deeply to be read"]) from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            str(path), [f"is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}"]
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"must hold keys and values, but holds a {type(values).__name__}"])
    if "acmds_study" in values:  # best.json: where the settings come from, beside the settings
        values = values.get("config", {})
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def load(
    path: str | Path | None, overrides: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Defaults, overridden by `base` (a resumed run's settings), by the file at `path`, by `overrides` (the flags).

    The word none, where a setting may be none, is None.

    Raises:
        ConfigError: listing every problem at once, each with where its value was given.
    """
    layers = {"settings of the run": base, str(path): read_file(path) if path else None, "command line": overrides}
    given = {place: settings for place, settings in layers.items() if settings}
    values = {name: value for settings in given.values() for name, value in settings.items()}
    kinds = field_types()
    for name, value in values.items():
        if value == "none" and type(None) in get_args(kinds.get(name)):
            values[name] = None
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        raise _with_places(describe(error, field_names()), given) from None


def _with_places(problems: list[tuple[list[str], str]], given: Mapping[str, Mapping[str, Any]]) -> ConfigError:
    """The error of settings from several places, the later ones over the earlier; says whose each problem is."""
    last = {name: place for place, settings in given.items() for name in settings}
    places = []
    for names, _ in problems:
        its = {last[name] for name in names if name in last} or set(given)
        places.append([place for place in given if place in its])
    source = " and ".join(place for place in given if any(place in each for each in places))
    if all(each == places[0] for each in places):
        return ConfigError(source, [said for _, said in problems])
    told = zip(places, problems, strict=True)
    return ConfigError(source, [f"{' and '.join(each)}: {said}" for each, (_, said) in told])
