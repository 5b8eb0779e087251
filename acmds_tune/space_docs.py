"""The tables of docs/search_spaces.md, made from the models and the alias tables.

python -m acmds_tune.space_docs docs/search_spaces.md
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from acmds_optimizer.config import OTHER_NAMES
from acmds_tune.columns import with_tables
from acmds_tune.space import Budget, Confirm, NeighbourStep, Parameter, Prescreen, Resources, Screen, Space, Timeouts
from acmds_tune.space_aliases import (
    MOVED_KEYS,
    PARAMETER_ALIASES,
    PRUNER_ALIASES,
    REFUSED_PARAMETER_KEYS,
    REFUSED_TOP_LEVEL,
    REFUSED_TYPES,
    REFUSED_VALUES,
    SAMPLER_ALIASES,
    TOP_LEVEL_ALIASES,
    TYPES,
)

SECTIONS: dict[str, type[BaseModel]] = {
    "top": Space,
    "search": Parameter,
    "budget": Budget,
    "prescreen": Prescreen,
    "screen": Screen,
    "confirm": Confirm,
    "neighbour": NeighbourStep,
    "timeouts": Timeouts,
    "resources": Resources,
}
"""Models by the name of their table in the page."""

SHOWN_TYPES = {"objective": "name or mapping, or a list", "constraints": "list of texts", "fixed": "mapping"}
"""Where the type of the file is not that of the model."""


def tables() -> dict[str, str]:
    """Every generated block of the page by name."""
    result = {name: _model_table(model) for name, model in SECTIONS.items()}
    result["aliases"] = _alias_table()
    result["refused"] = _refused_list()
    return result


def with_current_tables(text: str) -> str:
    """`text` of the page with the blocks between its `<!-- table: NAME -->` and `<!-- end -->` marks made anew."""
    return with_tables(text, tables())


def _model_table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        shown = SHOWN_TYPES.get(name) or _type_name(field.annotation)
        meaning = (field.description or "").replace("\n", " ")
        rows.append(f"| `{name}` | {shown} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _type_name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _type_name(get_args(kind)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        if bool in members or members == [int, float]:
            return "number" if bool not in members else "value"
        return " or ".join(_type_name(member) for member in members)
    if origin is list:
        return f"list of {_type_name(get_args(kind)[0])}s"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return "mapping"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kind, str(kind))


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None or field.is_required() or isinstance(value, BaseModel) or value in ({}, []):
        return ""
    if isinstance(value, list):
        parts = ["speed" if isinstance(item, BaseModel) else str(item) for item in value]
        return f"`{', '.join(parts)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _alias_table() -> str:
    meanings: dict[str, list[str]] = {}
    for alias, key in TOP_LEVEL_ALIASES.items():
        meanings.setdefault(f"`{key}`", []).append(alias)
    for alias, (section, name, _) in MOVED_KEYS.items():
        meanings.setdefault(f"`{section}.{name}`", []).append(alias)
    for alias, name in SAMPLER_ALIASES.items():
        meanings.setdefault(f"`sampler: {name}`", []).append(alias)
    for alias, name in PRUNER_ALIASES.items():
        meanings.setdefault(f"`pruner: {name}`", []).append(alias)
    for alias, key in PARAMETER_ALIASES.items():
        meanings.setdefault(f"`{key}` of a setting", []).append(alias)
    for alias, meaning in TYPES.items():
        if alias not in ("float", "int", "categorical"):
            ours = ", ".join(f"{key}: {str(value).lower()}" for key, value in meaning.items()) or "step"
            meanings.setdefault(f"`{ours}` of a setting", []).append(f"type: {alias}")
    rows = ["| here | also read |", "| --- | --- |"]
    rows += [f"| {ours} | {', '.join(f'`{alias}`' for alias in aliases)} |" for ours, aliases in meanings.items()]
    return "\n".join(rows)


def _refused_list() -> str:
    lines = [f"- `{key}`: {hint}." for key, hint in REFUSED_TOP_LEVEL.items()]
    lines += [f"- `{key}: {value}`: {hint}." for (key, value), hint in REFUSED_VALUES.items()]
    lines += [f"- `{name}` under `search` or `fixed`: {hint}." for name, hint in OTHER_NAMES.items()]
    lines += [f"- `{key}` of a setting: {hint}." for key, hint in REFUSED_PARAMETER_KEYS.items()]
    lines += [f"- `type: {kind}` of a setting: {hint}." for kind, hint in REFUSED_TYPES.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_current_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
