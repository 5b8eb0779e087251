"""Spellings of W&B sweeps, Ray Tune, NNI and Optuna: ours where they mean the same, a hint where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acmds_tune.space_yaml import KeyPath, Source

TOP_LEVEL_ALIASES = {
    "parameters": "search",
    "search_space": "search",
    "param_space": "search",
    "space": "search",
    "num_samples": "trials",
    "n_trials": "trials",
    "max_trials": "trials",
    "max_trial_number": "trials",
    "maxTrialNumber": "trials",
    "run_cap": "trials",
    "method": "sampler",
    "search_alg": "sampler",
    "early_terminate": "pruner",
    "objectives": "objective",
    "metric": "objective",
    "metrics": "objective",
    "random_seed": "seed",
    "study_name": "name",
}
"""Top-level keys of other tools that mean the same here."""

MOVED_KEYS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "max_concurrent_trials": ("resources", "concurrent_trials", lambda value: value),
    "trial_concurrency": ("resources", "concurrent_trials", lambda value: value),
    "trialConcurrency": ("resources", "concurrent_trials", lambda value: value),
    "time_budget_s": ("budget", "minutes", lambda value: value / 60 if isinstance(value, int | float) else value),
}
"""Top-level keys of other tools that belong into one of our sections, with the change of unit."""

REFUSED_TOP_LEVEL = {
    "timeout": "say which: budget.minutes for the whole search, timeouts.trial for one trial (seconds)",
    "direction": "write it with its figure: objective: {name: val_loss, direction: minimize}",
    "directions": "write each with its figure: objective: [{name: val_loss, direction: minimize}, ...]",
    "mode": "write it with its figure: objective: {name: val_loss, direction: minimize}",
    "config": "settings that stay the same belong under fixed, searched ones under search",
    "program": "acmds-tune runs its own trainer; remove this key",
    "command": "acmds-tune runs its own trainer; remove this key",
    "project": "there are no projects here; name: is the study's folder",
    "entity": "there are no entities here; remove this key",
    "description": "write it as a comment",
    "n_jobs": "trials run one a GPU; resources.concurrent_trials sets another number",
    "grace_period": "the pruner waits for 30 % of a trial; there is nothing to set",
}
"""Top-level keys of other tools that mean something else here, with what to write instead."""

SAMPLER_ALIASES = {
    "bayes": "tpe",
    "bayesian": "tpe",
    "optuna": "tpe",
    "gaussian_process": "gp",
    "cma_es": "cmaes",
    "cma-es": "cmaes",
    "sobol": "qmc",
    "quasirandom": "qmc",
}
PRUNER_ALIASES = {"asha": "halving", "successive_halving": "halving", "medianstop": "median"}
REFUSED_VALUES = {
    ("sampler", "grid"): "a grid is not offered; random covers more values of each setting in as many trials",
    ("sampler", "nsga2"): "not offered: it needs hundreds of trials; tpe handles several objectives",
    ("sampler", "nsgaii"): "not offered: it needs hundreds of trials; tpe handles several objectives",
    ("pruner", "hyperband"): "not offered; halving is one bracket of it",
}

PARAMETER_ALIASES = {
    "min": "low",
    "lower": "low",
    "max": "high",
    "upper": "high",
    "choices": "values",
    "categories": "values",
    "q": "step",
    "distribution": "type",
    "_type": "type",
    "condition": "when",
}
"""Keys of one searched setting in other tools that mean the same here."""

REFUSED_PARAMETER_KEYS = {
    "mu": "normal distributions are not offered; give low, high and perhaps log: true",
    "sigma": "normal distributions are not offered; give low, high and perhaps log: true",
    "probabilities": "every value is equally likely at first; remove this key",
    "parameters": "settings are not nested here; write each one on its own under search",
    "default": "the trainer's default is always tried first; remove this key",
}

TYPES: dict[str, dict[str, Any]] = {
    "float": {"type": "float"},
    "int": {"type": "int"},
    "categorical": {"type": "categorical"},
    "bool": {"type": "categorical", "values": [True, False]},
    "choice": {"type": "categorical"},
    "uniform": {"type": "float"},
    "loguniform": {"type": "float", "log": True},
    "log_uniform_values": {"type": "float", "log": True},
    "int_uniform": {"type": "int"},
    "q_uniform": {},
    "quniform": {},
}
"""What `type` or `distribution` may say, and what it means. Quantised ones keep the type of the setting."""

REFUSED_TYPES = {
    "log_uniform": "in W&B its bounds are exponents; write log_uniform_values with the bounds themselves",
    "q_log_uniform_values": "a logarithmic scale has no step; leave one of the two out",
    "qloguniform": "a logarithmic scale has no step; leave one of the two out",
    "randint": "in Ray and NNI its upper end is excluded; write int, whose high is included",
    "lograndint": "in Ray its upper end is excluded; write int and log: true, whose high is included",
    "constant": "a single value belongs under fixed",
    "normal": "not offered; give low, high and perhaps log: true",
    "q_normal": "not offered; give low, high and perhaps log: true",
}


def canonical(raw: dict[str, Any], source: Source) -> dict[str, Any]:
    """`raw` with our keys. What cannot be translated is recorded in `source.problems` and left out."""
    result: dict[str, Any] = {}
    for key, value in raw.items():
        if key in REFUSED_TOP_LEVEL:
            source.complain((key,), REFUSED_TOP_LEVEL[key])
        elif key not in MOVED_KEYS:
            new = TOP_LEVEL_ALIASES.get(key, key)
            _put(result, new, value, (key,), (new,), source)
    for key in (key for key in raw if key in MOVED_KEYS):  # into sections that may stand below them
        section, name, convert = MOVED_KEYS[key]
        result[section] = {} if result.get(section) is None else result[section]
        if isinstance(result[section], dict):  # else it is said where the section is checked
            _put(result[section], name, convert(raw[key]), (key,), (section, name), source)
    for key, aliases in (("sampler", SAMPLER_ALIASES), ("pruner", PRUNER_ALIASES)):
        if key in result:
            result[key] = _choice(key, result[key], aliases, source)
            if result[key] is None:
                del result[key]
    if "objective" in result:
        result["objective"] = _objectives(result["objective"], source)
    if isinstance(result.get("search"), dict):
        fixed = result.setdefault("fixed", {}) or {}
        result["fixed"] = fixed
        constants = fixed if isinstance(fixed, dict) else {}  # else it is said where the section is checked
        searched = {}
        for name, value in result["search"].items():
            parameter = _parameter(name, value, constants, source)
            if parameter is not None:
                searched[name] = parameter
        result["search"] = searched
    return result


def _put(target: dict[str, Any], key: str, value: Any, old: KeyPath, new: KeyPath, source: Source) -> None:
    if key in target:
        first = source.origin.get(new, (None, ".".join(map(str, new))))
        source.complain(old, f"the same as {first[1]} on line {first[0]}; keep one of them")
        return
    target[key] = value
    if old != new:
        source.moved(old, new)


def _choice(key: str, value: Any, aliases: dict[str, str], source: Source) -> Any:
    if isinstance(value, dict) and (set(value) == {"type"} or (key, str(value.get("type"))) in REFUSED_VALUES):
        value = value["type"]  # W&B: early_terminate: {type: hyperband, min_iter: 3}
    if value is None or value is False:  # `pruner: null` reads as no pruner
        return "none"
    name = str(value).lower()
    if (key, name) in REFUSED_VALUES:
        source.complain((key,), f"'{value}': {REFUSED_VALUES[key, name]}")
        return None
    return aliases.get(name, value if isinstance(value, dict) else name)


def _objectives(value: Any, source: Source) -> Any:
    """A list of {name, direction}, of names, or one of either."""
    single = not isinstance(value, list)
    result = []
    for index, item in enumerate([value] if single else value):
        path: KeyPath = ("objective",) if single else ("objective", index)
        if isinstance(item, dict):
            item = dict(item)
            for old, new in (("goal", "direction"), ("mode", "direction"), ("metric", "name")):  # W&B and Ray
                if old in item and new in item:
                    source.complain((*path, old), f"the same as {new}; keep one of them")
                elif old in item:
                    source.moved((*path, old), (*path, new))
                    item[new] = item.pop(old)
            short = {"max": "maximize", "min": "minimize"}
            if "direction" in item:
                item["direction"] = short.get(str(item["direction"]), item["direction"])
        result.append(item)
        if single:
            source.moved(("objective",), ("objective", 0))
    return result


def _parameter(name: str, value: Any, fixed: dict[str, Any], source: Source) -> dict[str, Any] | None:
    path: KeyPath = ("search", name)
    if not isinstance(value, dict):
        what = "a list could be a range or choices; write {low: ..., high: ...} or {values: [...]}"
        source.complain(path, what if isinstance(value, list) else "a plain value belongs under fixed")
        return None
    if set(value) <= {"value", "distribution"} and "value" in value:  # W&B: {value: 3} is a constant
        _put(fixed, name, value["value"], (*path, "value"), ("fixed", name), source)
        return None
    result: dict[str, Any] = {}
    for key, item in value.items():
        if key in REFUSED_PARAMETER_KEYS:
            source.complain((*path, key), REFUSED_PARAMETER_KEYS[key])
        elif key == "_value":  # NNI
            if not isinstance(item, list):
                source.complain((*path, key), "must be a list")
                continue
            names = ("low", "high", "step")
            if value.get("_type") != "choice" and len(item) > len(names):
                source.complain((*path, key), f"{len(item)} numbers; a range has low, high and perhaps a step")
            parts = {"values": item} if value.get("_type") == "choice" else dict(zip(names, item, strict=False))
            for part, part_value in parts.items():
                _put(result, part, part_value, (*path, key), (*path, part), source)
        else:
            new = str(PARAMETER_ALIASES.get(key, key))
            _put(result, new, item, (*path, key), (*path, new), source)
    return _resolve_type(path, result, source)


def _resolve_type(path: KeyPath, parameter: dict[str, Any], source: Source) -> dict[str, Any]:
    kind = parameter.get("type")
    if isinstance(kind, str):
        name = kind.lower()
        if name in REFUSED_TYPES:
            source.complain((*path, "type"), f"'{kind}': {REFUSED_TYPES[name]}")
            del parameter["type"]
        elif name in TYPES:
            del parameter["type"]
            if TYPES[name].get("log") and parameter.get("log") is False:
                source.complain((*path, "log"), f"type {kind} says the opposite; keep one of them")
            for key, item in TYPES[name].items():
                parameter.setdefault(key, item)
    if isinstance(parameter.get("when"), dict):
        parameter["when"] = {
            str(other).replace("-", "_"): item if isinstance(item, list) else [item]
            for other, item in parameter["when"].items()
        }
    return parameter
