"""Reading and checking a search-space file: one `Space`, or every problem at once.

Section by section, so that a problem in one does not hide those in another; every bound and choice against the
trainer's own setting, before anything is started.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from acmds_optimizer.config import TrainConfig, build, field_names, hint, nearest, to_dict
from acmds_optimizer.errors import ConfigError, DataError
from acmds_optimizer.zoo.names import check_dataset, check_model
from acmds_tune.controls import control_problems
from acmds_tune.requires import DRAWS, all_hold, draw, parse_requirement
from acmds_tune.space import (
    FIGURE_NAMES,
    MAXIMIZED,
    ONE_OBJECTIVE,
    PRESETS,
    PRUNABLE,
    SET_BY_THE_SEARCH,
    Objective,
    Parameter,
    Space,
    ordered,
    parse_constraint,
)
from acmds_tune.space_aliases import canonical
from acmds_tune.space_yaml import Source, read

MOST = 2**53
"""Above it not every whole number is a float, and the sampler thinks in floats."""

CORNERS = 200
"""Random configurations that are looked at beside the corners, since choices may stand in any order."""


def load(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    fixed: Mapping[str, str] | None = None,
    resumed: bool = False,
    elsewhere: bool = False,
) -> Space:
    """Read and check a search-space file.

    Args:
        path: the YAML file.
        overrides: top-level keys that replace those of the file (name, trials), from the command line.
        fixed: fixed settings that are added or replaced, from `--set`; values as YAML text.
        resumed: a study of it exists, and has taken from others what it was to begin with; these may be gone.
        elsewhere: trials run on other machines, which may have data and models of their own.

    Raises:
        ConfigError: listing every problem at once, each with its line, key and nearest valid key.
    """
    raw, source = read(Path(path))
    values = canonical(raw, source)
    values.setdefault("name", Path(path).stem)
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    _apply_set(values, fixed or {}, source)
    space = _validate(values, source)
    for index, folder in enumerate(() if resumed else space.warm_start):
        if not Path(folder).is_dir():
            source.complain(("warm_start", index), f"{folder!r}: no such folder")
    if not (resumed or elsewhere):  # the relative paths of a study start where it was begun
        _check_names(space, source)
    source.raise_if_any()
    return space


def load_again(directory: Path, about: Mapping[str, Any], trials: int) -> Space:
    """The space of the study in `directory` by its study.yaml as it is now, and by `about`, what it was started with.

    Raises:
        ConfigError: as `load`.
    """
    overrides = {"name": about["name"], "trials": trials}
    path = directory / "study.yaml"
    if not path.exists():
        path.write_text(about["yaml"], encoding="utf-8")  # the journal has it too
    return load(path, overrides=overrides, fixed=about["set"], resumed=True)


def _apply_set(values: dict[str, Any], fixed: Mapping[str, str], source: Source) -> None:
    written, search = values.get("fixed") or {}, values.get("search")
    if not isinstance(written, dict):
        return  # said where the section is checked
    target = dict(written)
    for name, text in fixed.items():
        key = name.replace("-", "_")
        source.origin[("fixed", key)] = (None, f"--set {name}")
        if isinstance(search, dict) and key in search:
            source.complain(("fixed", key), "is searched in the file; remove it there to fix it")
            continue
        try:
            target[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            why = getattr(error, "problem", None) or error
            source.complain(("fixed", key), f"{text!r}: is not valid YAML: {why}; put the value in quotes of its own")
    if fixed:
        values["fixed"] = target


def _validate(values: dict[str, Any], source: Source) -> Space:
    """Section by section, so that a problem in one does not hide those in another."""
    good: dict[str, Any] = {}
    fields = Space.model_fields
    for key, value in values.items():
        if key not in fields:
            source.complain((key,), f"unknown key{nearest(key, list(fields))}")
        elif key == "search":
            good[key] = _parameters(value, source)
        elif key == "objective":
            good[key] = _objectives(value, source)
        elif value is None and isinstance(fields[key].default, BaseModel | dict):
            continue  # a section that is written but empty
        else:
            _section(key, value, good, source)
    if not good.get("search") and not source.problems:
        source.complain((), "search: is empty; name at least one setting with its range or choices")
    space = Space.model_construct(**{**{name: field.default for name, field in fields.items()}, **good})
    _check_name(space, source)
    _check_fixed(space, source)
    _check_constraints(space, source)
    _check_measured(space, source)
    for name, problem in control_problems(space):
        source.complain(("search", name), problem)
    _check_conditions(space, source)
    _check_requirements(space, source)
    _check_stages(space, source)
    if space.pruner != "none" and (len(space.objective) > 1 or space.objective[0].name not in PRUNABLE):
        source.complain(("pruner",), f"needs one objective that a running trial reports: {', '.join(PRUNABLE)}")
    if space.sampler in ONE_OBJECTIVE and len(space.objective) > 1:
        source.complain(("sampler",), f"{space.sampler} takes one objective; tpe and gp take several")
    if not source.problems:
        _check_corners(space, source)
    return space


def _section(key: str, value: Any, good: dict[str, Any], source: Source) -> None:
    field = Space.model_fields[key]
    try:
        good[key] = _adapter(field).validate_python(value)
    except ValidationError as error:
        model = field.annotation if isinstance(field.annotation, type) else None
        valid = list(model.model_fields) if model and issubclass(model, BaseModel) else []
        _complain_all(error, (key,), valid, source)


def _complain_all(error: ValidationError, path: tuple[str | int, ...], valid: list[str], source: Source) -> None:
    said = set()
    for item in error.errors(include_url=False):
        # a union reports one error a member, with the member's name in the location; the key is what the user typed
        loc = [part for part in item["loc"] if part not in ("bool", "int", "float", "str", "none")]
        loc = [part for part in loc if not str(part).startswith(("constrained-", "function-"))]
        where = (*path, *loc)
        if where in said:
            continue
        said.add(where)
        if item["type"] == "extra_forbidden":
            source.complain(where, f"unknown key{nearest(str(loc[-1]), valid)}")
        elif item["type"] == "missing":
            source.complain(where, "is missing")
        elif item["type"] in ("dict_type", "model_type"):
            source.complain(where, f"{item['input']!r}: must be a mapping, {{name: value}}")
        else:
            source.complain(where, f"{item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")


def _objectives(items: list[Any], source: Source) -> list[Objective]:
    result: list[Objective] = []
    for index, item in enumerate(items):
        path = ("objective", index)
        if isinstance(item, str) and item in PRESETS:
            result += [Objective(**entry) for entry in PRESETS[item]]  # type: ignore[arg-type]
            continue
        if isinstance(item, str):
            item = {"name": item}
        if not isinstance(item, dict) or "name" not in item:
            source.complain(path, f"{item!r}: write speed, pareto, a figure, or {{name: ..., direction: ...}}")
            continue
        name = item["name"]
        if isinstance(name, str) and name in PRESETS:
            source.complain((*path, "name"), f"{name} says more than one figure does; write it by itself: {name}")
            continue
        if name not in FIGURE_NAMES:
            valid = [*PRESETS, *FIGURE_NAMES]
            source.complain((*path, "name"), f"no figure is called {name!r}{nearest(str(name), valid)}")
            continue
        if item.get("direction") is None:
            item = {**item, "direction": "maximize" if name in MAXIMIZED else "minimize"}
        try:
            result.append(Objective.model_validate(item))
        except ValidationError as error:
            _complain_all(error, path, list(Objective.model_fields), source)
    names = [objective.name for objective in result]
    if not items:
        source.complain(("objective",), "names no figure; write speed, pareto or a figure, or leave the key out")
    if len(set(names)) < len(names):
        source.complain(("objective",), "the same figure twice")
    return result or Space.model_fields["objective"].default


# --- checks against the trainer's settings


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = field.annotation
    return TypeAdapter(Annotated[kind, *field.metadata] if field.metadata else kind)


def _field_types(name: str) -> set[type]:
    """The plain types a setting may have: {int, NoneType} for `int | None`, {str} for a Literal of names."""
    found: set[type] = set()

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type):
            found.add(annotation)
        elif getattr(annotation, "__origin__", None) is Literal:
            found.update(type(value) for value in get_args(annotation))
        else:
            for part in get_args(annotation)[: 1 if hasattr(annotation, "__metadata__") else None]:
                visit(part)

    visit(TrainConfig.__pydantic_fields__[name].annotation)  # type: ignore[attr-defined]
    return found


def _checked(name: str, value: Any, path: tuple[str | int, ...], source: Source) -> Any:
    """`value` as the setting `name` holds it; a recorded problem and the value itself where it is not allowed."""
    try:
        return _adapter(TrainConfig.__pydantic_fields__[name]).validate_python(value)  # type: ignore[attr-defined]
    except ValidationError as error:
        source.complain(path, f"{value!r}: {'; '.join(sorted({item['msg'].lower() for item in error.errors()}))}")
        return value


def _known_setting(section: str, name: str, source: Source) -> bool:
    if name not in field_names():
        source.complain((section, name), f"the trainer has no such setting{hint(name, field_names())}")
        return False
    if name in SET_BY_THE_SEARCH:
        source.complain((section, name), f"cannot be set here: {SET_BY_THE_SEARCH[name]}")
        return False
    return True


def _parameters(value: Any, source: Source) -> dict[str, Parameter]:
    if not isinstance(value, dict):
        source.complain(("search",), "must hold settings, each with its range or choices")
        return {}
    result = {}
    for name, item in value.items():
        path = ("search", name)
        try:
            parameter = Parameter.model_validate(item)
        except ValidationError as error:
            _complain_all(error, path, list(Parameter.model_fields), source)
            continue
        if not _known_setting("search", name, source):
            continue
        if name == "device":
            source.complain(path, "trials of one search run on one device; put it under fixed")
            continue
        result[name] = _complete(name, parameter, source)
    return result


def _complete(name: str, parameter: Parameter, source: Source) -> Parameter:
    """`parameter` with its type, and values as the setting holds them."""
    path = ("search", name)
    types = _field_types(name)
    kind = parameter.type or ("categorical" if parameter.values is not None else None)
    if kind is None:
        kind = "int" if int in types else "float" if float in types else "categorical"
        if kind == "categorical":
            source.complain(path, "has no range; write {values: [...]}")
            return parameter
    if kind == "categorical":
        return _complete_choices(path, name, parameter, source)
    if (float if kind == "float" else int) not in types and not (kind == "int" and float in types):
        allowed = "int" if int in types else "float" if float in types else "categorical, with values"
        source.complain((*path, "type"), f"'{kind}': {name} must be {allowed}")
        return parameter
    return _complete_range(path, name, parameter.model_copy(update={"type": kind}), source)


def _complete_choices(path: tuple[str, str], name: str, parameter: Parameter, source: Source) -> Parameter:
    for key in ("low", "high", "step", "log"):
        if getattr(parameter, key) not in (None, False):
            source.complain((*path, key), "does not go with values; keep one of them")
    if not parameter.values:
        source.complain(path, "needs values: a list of choices")
        return parameter
    values = [_checked(name, item, (*path, "values", i), source) for i, item in enumerate(parameter.values)]
    if len({(type(item), item) for item in values}) < len(values):
        source.complain((*path, "values"), "the same value twice")
    return parameter.model_copy(update={"type": "categorical", "values": values})


def _complete_range(path: tuple[str, str], name: str, parameter: Parameter, source: Source) -> Parameter:
    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.values is not None:
        source.complain((*path, "values"), f"does not go with type {parameter.type}")
    if low is None or high is None:
        source.complain(path, "needs low and high, or values")
        return parameter
    before = len(source.problems)
    low = _checked(name, low, (*path, "low"), source)
    high = _checked(name, high, (*path, "high"), source)
    if len(source.problems) > before:
        return parameter
    if parameter.type == "int" and (int(low) != low or int(high) != high or (step is not None and int(step) != step)):
        source.complain(path, "low, high and step of an int must be whole numbers")
        return parameter
    if max(abs(low), abs(high)) > MOST or (step is not None and step < abs(high - low) / MOST):
        source.complain(path, f"numbers up to {MOST:g}, and at most as many steps, can be told apart; write others")
        return parameter
    if low >= high:
        source.complain((*path, "high"), f"{high} must be above low, {low}")
    elif parameter.log and low <= 0:
        source.complain((*path, "low"), f"{low} must be above 0 on a logarithmic scale")
    elif parameter.log and step is not None:
        source.complain((*path, "step"), "does not go with log: true")
    elif step is not None and abs(round((high - low) / step) - (high - low) / step) > 1e-6:
        last = low + math.floor((high - low) / step) * step
        source.complain((*path, "high"), f"{high} is not low plus whole steps of {step}; write {last:g}")
    convert = int if parameter.type == "int" else float
    update = {"low": convert(low), "high": convert(high), "step": None if step is None else convert(step)}
    return parameter.model_copy(update=update)


def _check_names(space: Space, source: Source) -> None:
    """A misspelt model or data set would end every trial."""
    for name, check in (("model", check_model), ("dataset", check_dataset)):
        searched = space.search[name].values or [] if name in space.search else []
        given: dict[tuple[str | int, ...], Any] = {
            ("search", name, "values", index): value for index, value in enumerate(searched)
        }
        if name in space.fixed:
            given["fixed", name] = space.fixed[name]
        for path, value in given.items():
            try:
                check(str(value))
            except DataError as error:
                source.complain(path, str(error))


def _check_name(space: Space, source: Source) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{,199}", space.name):
        what = "use up to 200 letters, digits, '.', '_' and '-', as in a folder's name"
        source.complain(("name",), f"{space.name!r}: {what}")


def _check_fixed(space: Space, source: Source) -> None:
    for name, value in list(space.fixed.items()):
        path = ("fixed", name)
        if name in space.search:
            source.complain(path, "is also searched; keep one of them")
        elif _known_setting("fixed", name, source):
            space.fixed[name] = _checked(name, value, path, source)
            if name == "device" and re.fullmatch(r"cuda:\d+", str(value)):
                index = str(value).removeprefix("cuda:")
                source.complain(path, f"each trial sees one GPU: write cuda, and set CUDA_VISIBLE_DEVICES={index}")
    for name, key in (("max_steps", "steps"), ("epochs", "epochs"), ("max_seconds", "seconds")):
        if name in space.search and getattr(space.budget, key) is not None:
            source.complain(("search", name), f"is also given by budget.{key}; keep one of them")


def _check_constraints(space: Space, source: Source) -> None:
    for index, text in enumerate(space.constraints):
        try:
            parse_constraint(text)
        except ValueError as error:
            source.complain(("constraints", index), str(error))


def _check_measured(space: Space, source: Source) -> None:
    """A figure that no trial measures: the search would run in full, and no trial of it could be the best."""
    defaults = to_dict(TrainConfig())

    def choices(name: str) -> list[Any] | None:
        """All values that a setting may have; None where they are a range."""
        return space.search[name].values if name in space.search else [space.fixed.get(name, defaults[name])]

    reasons = {}
    # of other data sets it is not known before they are read whether they have validation samples of their own
    if choices("val_fraction") == [0.0] and choices("dataset") == ["digits"]:
        why = "val_fraction is 0, so no sample of digits is held out"
        reasons = {name: why for name in FIGURE_NAMES if name.startswith("val_")}
    if space.device == "cpu":
        reasons["gpu_busy_fraction"] = "device is cpu"
    asked: list[tuple[tuple[str | int, ...], str]] = [(("objective",), goal.name) for goal in space.objective]
    for index, text in enumerate(space.constraints):
        with contextlib.suppress(ValueError):  # said by _check_constraints
            asked.append((("constraints", index), parse_constraint(text).figure))
    for path, name in asked:
        if name in reasons:
            source.complain(path, f"{name} is never measured: {reasons[name]}")


def _check_conditions(space: Space, source: Source) -> None:
    for name, parameter in space.search.items():
        for other, values in (parameter.when or {}).items():
            path = ("search", name, "when", other)
            if other not in space.search:
                source.complain(path, f"is not searched{nearest(other, list(space.search))}")
                continue
            choices = space.search[other].values
            for value in values:
                if choices is None:
                    source.complain(path, f"{other} has a range; a condition needs one with values")
                    break
                if value not in choices:
                    source.complain(path, f"{value!r} is not one of the values of {other}: {choices}")
    if not source.problems and ordered(space.search) is None:
        source.complain(("search",), "the conditions under `when` go in a circle")


def _check_requirements(space: Space, source: Source) -> None:
    requirements = []
    for index, text in enumerate(space.requires):
        path = ("requires", index)
        try:
            requirement = parse_requirement(text)
        except ValueError as error:
            source.complain(path, str(error))
            continue
        choices = {str(value) for parameter in space.search.values() for value in parameter.values or ()}
        choices |= {str(value) for value in space.fixed.values()} | {"true", "false", "none"}
        for name in sorted(requirement.names - set(field_names()) - choices):
            source.complain(path, f"'{text}': no setting is called {name}{nearest(name, field_names())}")
        if not requirement.names & set(space.search):
            source.complain(path, f"'{text}': names no searched setting")
        requirements.append(requirement)
    if requirements and not source.problems:
        rng = random.Random(0)
        defaults = to_dict(TrainConfig())
        if not any(
            all_hold(requirements, {**defaults, **space.settings(draw(space.search, rng))}) for _ in range(DRAWS)
        ):
            source.complain(("requires",), f"none of {DRAWS} random configurations fulfils it")


def _check_stages(space: Space, source: Source) -> None:
    if space.screen.trials and space.screen.trials < space.trials:
        source.complain(
            ("screen", "trials"),
            f"{space.screen.trials} short trials are fewer than `trials`, {space.trials}, which are chosen from them",
        )
    if len(set(space.baselines)) < len(space.baselines):
        source.complain(("baselines",), "the same one twice")


def _check_corners(space: Space, source: Source) -> None:
    """Settings that are each allowed must also go together somewhere in the space."""
    lows = {
        name: parameter.values[0] if parameter.values else parameter.low for name, parameter in space.search.items()
    }
    highs = {
        name: parameter.values[-1] if parameter.values else parameter.high for name, parameter in space.search.items()
    }
    mixed = {name: highs[name] if name.startswith("max_") else lows[name] for name in lows}
    problems: list[str] = []
    rng = random.Random(0)
    for corner in chain((mixed, lows, highs), (draw(space.search, rng) for _ in range(CORNERS))):
        try:
            build(TrainConfig, {**space.settings(corner), **space.trial_limits(corner)}, source.name)
            return
        except ConfigError as error:
            problems = problems or error.problems
    for problem in problems:
        source.complain(("search",), f"no trial could be trained: {problem}")
