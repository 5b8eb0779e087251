"""A search space in Optuna's words: distributions, the sampler, the pruner."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Container
from typing import Any

import optuna
from optuna.trial import TrialState

from acmds_optimizer.errors import ConfigError
from acmds_tune.space import Parameter, Space
from acmds_tune.stages import SAMPLED

WITHOUT_CONSTRAINTS = ("cmaes",)
"""Samplers that do not ask whether a trial kept the constraints: one that did not is told with the worst values."""

PRUNER_REPORT_PERCENT = 5
"""A running trial is judged each time it has come this much further."""


class OnlySampled(optuna.Study):
    """A study as its sampler and its pruner see it: without baselines, anchors, confirmations and short runs.

    These are ordinary trials of the study, so that Optuna's dashboard and other readers show them as what they are. A
    sampler would take the best ones for several findings, and stop looking for settings that some of them do not have.
    """

    def __init__(self, whole: optuna.Study) -> None:
        super().__init__(whole.study_name, whole._storage, whole.sampler, whole.pruner)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[optuna.trial.FrozenTrial]:
        """What all of Optuna's samplers and pruners read; HyperbandPruner overrides it for the same purpose."""
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [
            trial
            for trial in trials
            if trial.user_attrs.get("stage", SAMPLED[-1]) in SAMPLED and "replaced" not in trial.user_attrs
        ]


def contains(parameter: Parameter, value: Any) -> bool:
    """`value` may be proposed. None is a choice like others, but never within a range."""
    if parameter.values is not None:
        return value in parameter.values
    kind = distribution(parameter)
    try:
        return value is not None and bool(kind._contains(float(kind.to_internal_repr(value))))
    except ValueError:
        return False


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """The parameter in Optuna's words."""
    if parameter.values is not None:
        return optuna.distributions.CategoricalDistribution(parameter.values)
    low, high = parameter.bounds
    if parameter.type == "int":
        step = int(parameter.step or 1)
        return optuna.distributions.IntDistribution(int(low), int(high), step=step, log=parameter.log)
    return optuna.distributions.FloatDistribution(float(low), float(high), step=parameter.step, log=parameter.log)


def suggest(trial: optuna.trial.Trial, name: str, parameter: Parameter) -> Any:
    """The value that the sampler proposes."""
    return trial._suggest(name, distribution(parameter))


def new_sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that the search space asks for.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    trials = space.screen.trials or space.trials
    startup = min(10, max(4, trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if space.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if space.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if space.sampler == "qmc":
            return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        if space.sampler == "cmaes":
            if importlib.util.find_spec("cmaes") is None:
                raise ConfigError("sampler", ["cmaes: the package is not installed; pip install cmaes"])
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=startup, warn_independent_sampling=False, with_margin=True
            )
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=False)


def new_pruner(space: Space) -> optuna.pruners.BasePruner:
    """The pruner that the search space asks for."""
    if space.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=30, interval_steps=PRUNER_REPORT_PERCENT)
    if space.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=20, reduction_factor=2)
    return optuna.pruners.NopPruner()
