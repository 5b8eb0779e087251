"""A search-space file: what stays fixed, what is searched, for what, and at what cost.

The models below are the reference of the file; docs/search_spaces.md is made from them. space_load.py reads it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel, ConfigDict, field_validator

from acmds_optimizer.config import TrainConfig, nearest
from acmds_optimizer.errors import ACMDSError
from acmds_tune.columns import FIGURES

Scalar = bool | int | float | str | None

FIGURE_NAMES = [*(column.name for column in FIGURES), "seconds"]
"""What a trial measures, and so what an objective or a constraint may name."""

MAXIMIZED = (
    "samples_per_second", "val_accuracy", "headroom_min_gb", "batch_size_mean", "samples", "steps", "gpu_busy_fraction"
)  # fmt: skip
"""Figures of which more is better; of the others less is."""

PRESETS: dict[str, list[dict[str, str]]] = {
    "speed": [{"name": "samples_per_second", "direction": "maximize"}],
    "pareto": [
        {"name": "samples_per_second", "direction": "maximize"},
        {"name": "val_loss", "direction": "minimize"},
    ],
}
"""Objectives by a short name."""

PRUNABLE = ("samples_per_second", "val_loss", "val_accuracy", "train_loss")
"""Objectives that a running trial reports, so that a pruner can judge them."""

ONE_OBJECTIVE = ("cmaes",)
"""Samplers that cannot propose for several objectives."""

MAY_DIFFER = (
    "name", "trials", "timeouts", "resources", "budget.minutes", "confirm", "baselines", "anchor_every", "warm_start"
)  # fmt: skip
"""Keys of a search-space file that may change when a search is resumed: they do not change what a trial is."""

SET_BY_THE_SEARCH = {
    "output_dir": "every trial has its own folder",
    "checkpoint_every": "trials keep no checkpoints",
    "decoded_cache": "the trials of a study share decoded images while it runs",
    "seed": "every trial has its own seed, derived from the top-level seed",
}
"""Settings that a file cannot set for trials."""

_CONSTRAINT = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|<|>|=)\s*(\S+)\s*")


class ResourceError(ACMDSError):
    """The machine has not what the trials need."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


class Parameter(_Model):
    """One searched setting."""

    type: Literal["float", "int", "categorical"] | None = None
    """Inferred: categorical with `values`, else the type of the setting."""

    low: int | float | None = None
    """Smallest value, included."""

    high: int | float | None = None
    """Largest value, included."""

    log: bool = False
    """Search on a logarithmic scale."""

    step: Annotated[int | float, Gt(0)] | None = None
    """Distance between the values; `high` must be a whole number of steps above `low`."""

    values: list[Scalar] | None = None
    """The choices, instead of `low` and `high`."""

    when: dict[str, list[Scalar]] | None = None
    """Searched only while another searched setting has one of these values: `{batch_policy: [free]}`."""

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether the condition under `when` is met by the searched `values`."""
        return all(values.get(other) in allowed for other, allowed in (self.when or {}).items())

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of a range."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high


class Objective(_Model):
    """A figure to make large or small."""

    name: str
    """A figure of trials.csv."""

    direction: Literal["maximize", "minimize"]
    """Inferred from the figure where only its name is given."""


class Constraint(_Model):
    """`figure <= bound` or `figure >= bound`."""

    figure: str
    sense: Literal["<=", ">="]
    bound: float

    def violation(self, value: float | None) -> float:
        """How far `value` is on the wrong side of the bound; 0 or less where it is kept, 1 where not measured."""
        if value is None or math.isnan(value):
            return 1.0
        return value - self.bound if self.sense == "<=" else self.bound - value


class Budget(_Model):
    """How long a trial and the whole search may take. What comes first ends it."""

    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps a trial; the schedules are compressed to fit."""

    epochs: Annotated[int, Ge(1)] | None = None
    """Epochs a trial."""

    seconds: Annotated[float, Gt(0)] | None = None
    """Seconds of training a trial."""

    minutes: Annotated[float, Gt(0)] | None = None
    """Minutes for the whole search, baselines and confirmation included. No trial is started that would end later."""


class Screen(_Model):
    """A first stage of short trials, of which the best are trained with the whole budget."""

    trials: Annotated[int, Ge(0)] = 0
    """Short trials; of these the best `trials` are trained in full. 0: no such stage, every trial is in full."""

    share: Annotated[float, Gt(0), Lt(1)] = 0.25
    """Of a trial's budget. Schedules and curriculum are compressed into it, not cut off."""


class Confirm(_Model):
    """A last stage that runs the best trials again before one of them is named the best."""

    top: Annotated[int, Ge(0)] = 0
    """Best trials that are run again; 0: none."""

    seeds: Annotated[int, Ge(1)] = 3
    """Seeds for each of them, and for the baselines `default` and `fixed batch`."""


class Prescreen(_Model):
    """Settings of the controller tried on a plant: a model of the machine, fitted from short runs."""

    keep: Annotated[int, Ge(0)] = 0
    """Best settings on the plant that are tried right after the defaults; 0: no plant."""

    settings: Annotated[int, Ge(1)] = 500
    """Random settings that are simulated, on the CPU: some thousands a minute."""


class NeighbourStep(_Model):
    """A moment at which another process on the card changes what it holds."""

    at: Annotated[float, Ge(0), Lt(1)]
    """Share of the trial that is done."""

    holds_gb: Annotated[float, Ge(0)]
    """GB that it holds from then on."""


class Timeouts(_Model):
    """When a trial is taken for hung and killed."""

    trial: Annotated[float, Gt(0)] | None = None
    """Seconds a trial, from the start of its process to its end."""

    silence: Annotated[float, Gt(0)] = 300.0
    """Seconds without a sign of progress."""


class Resources(_Model):
    """What the trials share."""

    concurrent_trials: Annotated[int, Ge(1)] | None = None
    """Trials at once; none: as many as GPUs allow, one on the CPU, because trials measure throughput."""

    gpus_per_trial: Annotated[float, Gt(0)] = 1
    """GPUs that a trial sees, a whole number; or the share of one that it may use, such as 0.5."""

    host_memory_gb: Annotated[float, Gt(0)] | None = None
    """Host memory a trial and its workers may hold; none: until 5 % of the host's (2 GB at most) are left."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_or_share(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a whole number, or a share of one GPU below 1")
        return value


class Space(_Model):
    """A whole search-space file."""

    name: str = "study"
    """Folder of the study under results/; the file's name where it is not given."""

    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the sampler, and of every trial together with the trial's number."""

    trials: Annotated[int, Ge(1)] = 20
    """Trials to run."""

    objective: list[Objective] = [Objective(name="samples_per_second", direction="maximize")]
    """`speed`, `pareto`, a figure, `{name: ..., direction: ...}`, or a list of those."""

    constraints: list[str] = ["oom_events <= 0"]
    """What a trial must keep to be the best: a figure, `<=` or `>=`, a number."""

    budget: Budget = Budget()
    """How long a trial and the whole search may take."""

    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random"] = "tpe"
    """Who proposes: tree-structured Parzen estimator (univariate), Gaussian process, CMA-ES, Sobol points, chance."""

    pruner: Literal["none", "median", "halving"] = "none"
    """Who ends trials early: nobody, the median rule, or asynchronous successive halving."""

    requires: list[str] = []
    """What settings must fulfil to be tried: `max_batch_size >= 4 * min_batch_size`."""

    prescreen: Prescreen = Prescreen()
    """Settings of the controller tried on a fitted model first."""

    screen: Screen = Screen()
    """A first stage of short trials."""

    confirm: Confirm = Confirm()
    """A last stage that runs the best trials again."""

    baselines: list[Literal["default", "fixed batch", "halving"]] = []
    """What the search is compared with, as rows of the study: the defaults, the best fixed batch, halving on error."""

    anchor_every: Annotated[int, Ge(0)] = 0
    """Trials after which the default settings are run again, to see drift; 0: never."""

    warm_start: list[str] = []
    """Folders of earlier studies whose best settings are tried first."""

    neighbour: list[NeighbourStep] = []
    """Another process on the card in every trial: a list of moments `{at: 0.3, holds_gb: 8}`."""

    timeouts: Timeouts = Timeouts()
    """When a trial is taken for hung and killed."""

    resources: Resources = Resources()
    """What the trials share."""

    fixed: dict[str, Any] = {}
    """Settings of the trainer that are the same in every trial."""

    search: dict[str, Parameter] = {}
    """Settings of the trainer that are searched, each with its range or choices."""

    @field_validator("neighbour")
    @classmethod
    def _in_order(cls, value: list[NeighbourStep]) -> list[NeighbourStep]:
        return sorted(value, key=lambda step: step.at)

    @property
    def parsed_constraints(self) -> list[Constraint]:
        """The constraints, in their order."""
        return [parse_constraint(text) for text in self.constraints]

    @property
    def device(self) -> str:
        """The device that the trials run on."""
        return str(self.fixed.get("device", TrainConfig().device))

    @property
    def sharers(self) -> int:
        """Trials that may be at once on one device: on the CPU all of them, else as many as have a share of a GPU."""
        wanted, each = self.resources.concurrent_trials, self.resources.gpus_per_trial
        if self.device == "cpu":
            return wanted or 1
        fit = int(1 / each + 1e-6) if each < 1 else 1
        return min(fit, wanted or fit)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to train with, given the searched `values`: fixed and searched ones, no trial's budget."""
        return {**self.fixed, **values}

    def trial_limits(self, values: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
        """The settings that make a training run a trial: its budget, or a share of it, and no checkpoints.

        Of a short trial the settings that end a run are cut as well, where the budget leaves it to them.
        """
        steps, epochs, seconds = self.budget.steps, self.budget.epochs, self.budget.seconds
        if share < 1.0:
            settings = self.settings(values)
            epochs = epochs or int(settings.get("epochs", TrainConfig().epochs))
            steps, seconds = steps or settings.get("max_steps"), seconds or settings.get("max_seconds")
        budget = {
            "max_steps": None if steps is None else max(1, round(steps * share)),
            "epochs": None if epochs is None else max(1, round(epochs * share)),
            "max_seconds": None if seconds is None else seconds * share,
        }
        return {**{key: value for key, value in budget.items() if value is not None}, "checkpoint_every": 0}


def derived_seed(seed: int, number: int) -> int:
    """A seed below 2**32 that differs for every pair of `seed` and `number`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def parse_constraint(text: str) -> Constraint:
    """The constraint in `text`.

    Raises:
        ValueError: saying what is wrong with it.
    """
    match = _CONSTRAINT.fullmatch(text)
    if not match:
        raise ValueError(f"'{text}': write a figure, <= or >=, and a number: oom_events <= 0")
    figure, sense, bound = match.groups()
    if figure not in FIGURE_NAMES:
        raise ValueError(f"'{text}': no figure is called {figure}{nearest(figure, FIGURE_NAMES)}")
    if sense not in ("<=", ">="):
        raise ValueError(f"'{text}': write <= or >=")
    try:
        return Constraint(figure=figure, sense=sense, bound=float(bound))  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"'{text}': {bound} is not a number") from None


def ordered(search: Mapping[str, Parameter]) -> list[str] | None:
    """Names such that every setting comes after those that its condition names; None where that cannot be."""
    done: list[str] = []
    waiting = list(search)
    while waiting:
        ready = [name for name in waiting if all(other in done for other in search[name].when or {})]
        if not ready:
            return None
        done += ready
        waiting = [name for name in waiting if name not in ready]
    return done


def space_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value is not the same in two search spaces, apart from MAY_DIFFER."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in sorted(set(before) | set(after)):
        free = any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER)
        one, other = before.get(key, "not set"), after.get(key, "not set")
        if not free and one != other:
            lines.append(f"{key}: {one} in the study, {other} now")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        elif value is not None:
            result[f"{prefix}{key}"] = value
    return result
