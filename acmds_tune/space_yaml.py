"""A search-space file as plain data with the line of every key. Refuses a key that is written twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from acmds_optimizer.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of the file down to a value."""

_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


@dataclass
class Source:
    """What a file says, and where it says it."""

    name: str
    """The file, for messages."""

    origin: dict[KeyPath, tuple[int | None, str]] = field(default_factory=dict)
    """Canonical path of a key -> (line from 1, the key as the user wrote it)."""

    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line for sorting, message) of everything found wrong so far."""

    def complain(self, path: KeyPath, message: str) -> None:
        """Record a problem at `path`, with the line and spelling of the nearest key that is in the file."""
        line: int | None = None
        written = ".".join(str(part) for part in path)
        for length in range(len(path), 0, -1):
            if path[:length] in self.origin:
                line, known = self.origin[path[:length]]
                rest = ".".join(str(part) for part in path[length:])
                written = f"{known}.{rest}" if rest else known
                break
        where = f"line {line}: " if line else ""
        text = f"{where}{written}: {message}" if written else f"{where}{message}"
        self.problems.append((line or 0, text))

    def moved(self, old: KeyPath, new: KeyPath) -> None:
        """The key at `old` is now known as `new`; so are the keys below it."""
        for path in [path for path in self.origin if path[: len(old)] == old]:
            self.origin[new + path[len(old) :]] = self.origin[path]

    def raise_if_any(self) -> None:
        """Raise ConfigError with all problems in the order of the file."""
        if self.problems:
            raise ConfigError(self.name, [text for _, text in sorted(self.problems, key=lambda item: item[0])])


def read(path: Path) -> tuple[dict[str, Any], Source]:
    """The mapping in a YAML file and the lines of its keys. A key written twice is a recorded problem.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), ["does not exist"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    source = Source(str(path))
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        values = _construct(loader, node, (), source) if node is not None else None
    except RecursionError:
        raise ConfigError(str(path), ["is nested too deeply to be read"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(
            str(path), [f"{where}is not valid YAML: {getattr(error, 'problem', None) or error}"]
        ) from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["must hold keys and values; docs/search_spaces.md shows them"])
    return values, source


def _construct(
    loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath, source: Source, above: tuple[yaml.Node, ...] = ()
) -> Any:
    if any(node is outer for outer in above):  # `a: &x [*x]`
        source.complain(path, "holds itself, through an alias")
        return None
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        _check_duplicates(node, path, source)
        loader.flatten_mapping(node)  # `<<: *anchor`
        result = {}
        for key_node, value_node in node.value:
            written = str(_object(loader, key_node))
            key = written.replace("-", "_")
            line = key_node.start_mark.line + 1
            source.origin[(*path, key)] = (line, ".".join(str(part) for part in (*path, written)))
            result[key] = _construct(loader, value_node, (*path, key), source, above)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            dotted = ".".join(str(part) for part in (*path, index))
            source.origin[(*path, index)] = (item.start_mark.line + 1, dotted)
        return [_construct(loader, item, (*path, index), source, above) for index, item in enumerate(node.value)]
    value = _object(loader, node)
    if (
        isinstance(value, str)
        and isinstance(node, yaml.ScalarNode)
        and node.style is None
        and _FLOAT_WITHOUT_DOT.fullmatch(value)
    ):
        return float(value)  # YAML 1.1 reads 1e-3 as text, which nobody means
    return value


def _object(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # looks like a date or a number and is none: 2024-13-45
        raise yaml.constructor.ConstructorError(problem=str(error), problem_mark=node.start_mark) from None


def _check_duplicates(node: yaml.MappingNode, path: KeyPath, source: Source) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(key_node.value).replace("-", "_")
        line = key_node.start_mark.line + 1
        if key in seen and key != "<<":
            dotted = ".".join(str(part) for part in (*path, key_node.value))
            source.problems.append((line, f"line {line}: {dotted}: written twice, first on line {seen[key]}"))
        seen.setdefault(key, line)
