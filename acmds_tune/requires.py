"""`requires:` of a search space: expressions over settings that a configuration must fulfil, and points that do."""

from __future__ import annotations

import ast
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acmds_tune.space import Parameter, ordered

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _same(left: Any, right: Any) -> bool:
    """`direction == none`: none is a choice of some settings, and no value at all of others."""
    return (None if left == "none" else left) == (None if right == "none" else right)


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: _same,
    ast.NotEq: lambda left, right: not _same(left, right),
}
_CONSTANTS = {"true": True, "false": False, "none": None}

MOST_PARTS = 300
"""Settings, values and operations of one expression."""

DRAWS = 4000
"""Random configurations among which one that fulfils everything is looked for."""


@dataclass(frozen=True)
class Requirement:
    """One expression; `names` are the settings in it."""

    tree: ast.expr
    names: frozenset[str]

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether `settings` fulfil it; also where it cannot be said, because a setting in it is none."""
        try:
            return bool(_value(self.tree, settings))
        except (TypeError, ZeroDivisionError, OverflowError):
            return True


def parse_requirement(text: str) -> Requirement:
    """The requirement in `text`, such as `max_batch_size >= 4 * min_batch_size or optimizer == sgd`.

    Names that are no settings stand for themselves, so that choices need no quotes.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (RecursionError, MemoryError):
        raise ValueError(f"'{text[:40]}...': is nested too deeply") from None
    except (SyntaxError, ValueError):
        raise ValueError(f"'{text}': is no expression; write max_batch_size >= 4 * min_batch_size") from None
    allowed = (ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Constant, ast.boolop, ast.unaryop,
               ast.expr_context, *_BINARY, *_COMPARE)  # fmt: skip
    if sum(isinstance(node, ast.expr) for node in ast.walk(tree)) > MOST_PARTS:
        raise ValueError(f"'{text[:40]}...': has more than {MOST_PARTS} parts; write several")
    for node in ast.walk(tree):
        if not isinstance(node, allowed) or isinstance(node, ast.Invert):
            raise ValueError(f"'{text}': only settings, values, + - * / // %, comparisons, and, or, not")
    if not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Name):
        raise ValueError(f"'{text}': says nothing that is true or false; compare two things")
    return Requirement(tree, frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))


def _value(node: ast.expr, settings: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return settings[node.id] if node.id in settings else _CONSTANTS.get(node.id.lower(), node.id)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, settings)
        return not inner if isinstance(node.op, ast.Not) else -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, settings), _value(node.right, settings))
    if isinstance(node, ast.BoolOp):
        parts = (bool(_value(each, settings)) for each in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    assert isinstance(node, ast.Compare)
    left = _value(node.left, settings)
    for operation, comparator in zip(node.ops, node.comparators, strict=True):
        right = _value(comparator, settings)
        if not _COMPARE[type(operation)](left, right):
            return False
        left = right
    return True


def draw(search: Mapping[str, Parameter], rng: random.Random) -> dict[str, Any]:
    """A random configuration of the searched settings; those whose condition is not met are left out."""
    values: dict[str, Any] = {}
    for name in ordered(search) or []:
        parameter = search[name]
        if not parameter.applies(values):
            continue
        if parameter.values is not None:
            values[name] = rng.choice(parameter.values)
            continue
        (low, high), step = parameter.bounds, parameter.step
        if parameter.type == "int" and step is None and not parameter.log:
            step = 1
        if step is not None:
            values[name] = low + step * rng.randint(0, round((high - low) / step))
        elif parameter.log:
            values[name] = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            values[name] = rng.uniform(low, high)
        values[name] = min(max(round(values[name]) if parameter.type == "int" else values[name], low), high)
    return values


def nearest_allowed(
    values: Mapping[str, Any],
    search: Mapping[str, Parameter],
    allowed: Callable[[Mapping[str, Any]], bool],
    rng: random.Random,
) -> dict[str, Any] | None:
    """The configuration nearest to `values` among DRAWS random ones that is `allowed`; None where there is none."""
    found = [point for _ in range(DRAWS) if allowed(point := draw(search, rng))]
    return min(found, key=lambda point: distance(values, point, search), default=None)


def distance(one: Mapping[str, Any], other: Mapping[str, Any], search: Mapping[str, Parameter]) -> float:
    """Sum over the settings of how far apart two configurations are, as shares of the ranges; choices differ by 1."""
    total = 0.0
    for name, parameter in search.items():
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if parameter.values is not None or a is None or b is None:
            total += 1.0
            continue
        low, high = parameter.bounds
        total += abs(math.log(a / b)) / math.log(high / low) if parameter.log else abs(a - b) / (high - low)
    return total


def all_hold(requirements: Sequence[Requirement], settings: Mapping[str, Any]) -> bool:
    """Whether `settings` fulfil everything."""
    return all(requirement.holds(settings) for requirement in requirements)
